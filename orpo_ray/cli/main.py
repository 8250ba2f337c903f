"""`orpo-ray`: finds the command, prints its result, turns errors into one line and an exit code."""

import atexit
import importlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from orpo_ray.cli.console import (
    drop_temporary_log,
    fresh_line,
    keep_log,
    log_failure,
    stdout_for_result,
)
from orpo_ray.errors import OrpoRayError, RunError, SetupError, StoppedError
from orpo_ray.runs.stop import SIGNALS, interrupt

COMMANDS = (
    "demo",
    "plan",
    "prepare",
    "train",
    "tune",
    "compare",
    "evaluate",
    "generate",
    "chat",
    "export",
    "judge",
    "report",
    "cluster",
    "slurm",
    "submit",
    "status",
    "logs",
    "stop",
    "doctor",
    "bench",
    "config",
)
UNEXPECTED, WRONG_USAGE = 1, 2
_LOOKS_ITSELF = "doctor"
_TRAINING = ("demo", "train", "tune", "compare")
_HELP = ("-h", "--help")

_INTERRUPTED = 130
"""What Typer returns, in place of a command's result, after Ctrl-C; after --help it returns 0."""


@dataclass(frozen=True)
class _Outcome:
    """How a command ended: its exit code, the object for --json, and the line of its error."""

    code: int
    result: Any
    said: str = ""


class LazyGroup(TyperGroup):
    """Imports a command's module when that command, or the list of all, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        command: Any = typer.main.get_command(
            importlib.import_module(f"orpo_ray.cli.{cmd_name}").app
        )
        command.name = cmd_name
        found: TyperCommand | TyperGroup = command
        return found


app = typer.Typer(cls=LazyGroup, context_settings={"help_option_names": list(_HELP)})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"orpo-ray {version('orpo-ray')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """From a base model and preference pairs to an aligned chat model."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    A command returns its JSON object; one with an `exit_code` ends with that. With --json, stdout
    holds one object only: the result, or the error.
    """
    as_json = "--json" in arguments and not set(_HELP) & set(arguments)
    with stdout_for_result(as_json) as stdout:
        ended = _invoke(list(arguments) or ["--help"])
        log = keep_log()
        if log is not None and log not in ended.said:
            drop_temporary_log()
        if as_json:
            print(json.dumps(_finite(ended.result), allow_nan=False), file=stdout, flush=True)
    return ended.code


def _finite(value: Any) -> Any:
    """Plain data with null for each NaN and infinity, which JSON cannot write."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _invoke(arguments: list[str]) -> _Outcome:
    try:
        result = app(args=arguments, prog_name="orpo-ray", standalone_mode=False)
        if result == _INTERRUPTED:
            return _interrupted(arguments[0])
        code = result.get("exit_code", 0) if isinstance(result, dict) else 0
        return _Outcome(code, result)
    except typer.TyperException as error:
        return _fail(_usage(error, arguments[0]), WRONG_USAGE)
    except OrpoRayError as error:
        log_failure(error)
        log = keep_log() if isinstance(error, RunError) else None
        return _fail(f"{error}{_who_helps(error, arguments[0])}", error.exit_code, log)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments[0])
    except SystemExit as stop:
        # Ray turns SIGTERM into SystemExit with this code. Typer's SystemExit has other codes.
        if stop.code != signal.SIGTERM:
            raise
        return _interrupted(arguments[0])
    except Exception as error:  # noqa: BLE001 - the last resort: the traceback goes to the log, its path to the user
        log_failure(error)
        return _fail(f"unexpected {type(error).__name__}: {error}", UNEXPECTED, keep_log())


def _who_helps(error: OrpoRayError, command: str) -> str:
    """The command that looks for the cause of an error, if there is one."""
    if not isinstance(error, SetupError) or command == _LOOKS_ITSELF:
        return ""
    return f"; `orpo-ray {_LOOKS_ITSELF}` looks for the cause"


def _interrupted(command: str) -> _Outcome:
    message = "interrupted; run the same command again"
    if command in _TRAINING:
        message += " (training resumes from its last checkpoint, if there is one)"
    return _fail(message, StoppedError.exit_code)


def _usage(error: typer.TyperException, command: str) -> str:
    """What is wrong with a command line, and which command shows its usage."""
    message = error.format_message().rstrip(".")
    if command not in COMMANDS and not command.startswith("-"):
        near = get_close_matches(command, COMMANDS, 1)
        return f"{message}; " + (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        )
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    parameters = context.command.params
    takes_settings = any(parameter.name == "overrides" for parameter in parameters)
    option = getattr(error, "option_name", "")
    is_its_own = any(option in parameter.opts for parameter in parameters)
    setting = _setting_of(option) if takes_settings and not is_its_own else ""
    if setting:
        message = message.partition(" (Possible options")[0]
        return f"{message}; a setting is written without dashes: {setting}"
    return f"{message} (see {context.command_path} --help)"


def _setting_of(option: str) -> str:
    """How to write a setting that somebody wrote as an option; "" if it is none."""
    from orpo_ray.config import RunConfig
    from orpo_ray.config.foreign.words import word_of
    from orpo_ray.config.keys import values_outside_lists

    name = option.lstrip("-").replace("-", "_")
    keys = values_outside_lists(RunConfig)
    # Names in `compare` mean less to a user: one command reads it, and its judge has a model, too.
    ours = [
        key
        for key in keys
        if name == key or (name == key.rpartition(".")[2] and not key.startswith("compare."))
    ]
    word = word_of("", name, "")
    if not ours and word and word.here:
        return f"{word.here}=VALUE" + (f"; {word.differs}" if word.differs else "")
    return " or ".join(f"{key}=VALUE" for key in ours)


def _fail(message: str, code: int, log: str | None = None) -> _Outcome:
    line = " ".join(message.split())
    said = f"{line} (full log: {log})" if log else line
    with suppress(OSError):  # a stderr that nobody reads must not change the exit code
        print(f"{fresh_line()}orpo-ray: {said}", file=sys.stderr)
    return _Outcome(code, {"error": line, "exit_code": code}, said)


def main() -> None:
    """Entry point of the `orpo-ray` command; SIGTERM ends it as Ctrl-C does."""
    code = UNEXPECTED
    # Python calls the functions of `atexit` in reverse order. The libraries register theirs later,
    # so the libraries have ended when `_leave` runs.
    atexit.register(lambda: _leave(code))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell that gave the command
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - to the end
    signal.signal(signal.SIGTERM, interrupt)
    # A script starts its background commands with SIGINT ignored, and it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = run(sys.argv[1:])
        # The work is done, and only Ray's shutdown is left, so a signal may end it at once.
        for number in SIGNALS:
            signal.signal(number, lambda *_: os._exit(code))
    except OSError as error:
        code = _fail(f"the result cannot be written to stdout: {error.strerror}", UNEXPECTED).code
    except SystemExit as stop:  # from Typer's completion of the shell
        code = int(stop.code or 0)
    sys.exit(code)


def _leave(code: int) -> None:
    """End the process without Python's own clean-up.

    The clean-up takes a second, and threads of Ray that are still alive may crash during it.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

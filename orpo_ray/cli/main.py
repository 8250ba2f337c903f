"""`orpo-ray`: finds the command, prints its result, turns errors into one line and an exit code."""

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from orpo_ray.cli.console import full_log, log_failure, stdout_for_result
from orpo_ray.errors import OrpoRayError, RunError, StoppedError

COMMANDS = ("demo", "prepare", "train", "evaluate", "config")
UNEXPECTED, WRONG_USAGE = 1, 2


class LazyGroup(TyperGroup):
    """Imports a command's module when that command, or the list of all, is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """The commands in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(f"orpo_ray.cli.{cmd_name}").app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False)


@app.callback()
def _root() -> None:
    """From a base model and preference pairs to an aligned chat model."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    A command returns its JSON object; with --json that object, or one that tells the error, is all of stdout.
    """
    as_json = "--json" in arguments
    with stdout_for_result(as_json) as stdout:
        code, result = _invoke(arguments)
        if as_json:
            print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
    return code


def _invoke(arguments: Sequence[str]) -> tuple[int, Any]:
    try:
        return 0, app(args=list(arguments), prog_name="orpo-ray", standalone_mode=False)
    except typer.TyperException as error:
        # Without a command the help has been printed, and there is nothing to add.
        line = error.format_message()
        return _fail(line, WRONG_USAGE) if line else (WRONG_USAGE, {"error": "no command", "exit_code": WRONG_USAGE})
    except OrpoRayError as error:
        log_failure(error)
        return _fail(str(error), error.exit_code, full_log() if isinstance(error, RunError) else None)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; the same command goes on from the last checkpoint", StoppedError.exit_code)
    except Exception as error:  # noqa: BLE001 - the last resort: the traceback goes to the log, its path to the user
        log_failure(error)
        return _fail(f"unexpected {type(error).__name__}: {error}", UNEXPECTED, full_log())


def _fail(message: str, code: int, log: str | None = None) -> tuple[int, dict[str, Any]]:
    line = " ".join(message.split())
    print(f"orpo-ray: {line}" + (f" (full log: {log})" if log else ""), file=sys.stderr)
    return code, {"error": line, "exit_code": code}


def main() -> None:
    """Entry point of the `orpo-ray` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""`orpo-ray chat`: a conversation with a trained model in the terminal.

Answers go to stdout, and all else to stderr.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_ray.cli.options import (
    Adapter,
    Json,
    MaxNewTokens,
    NamedRun,
    Overrides,
    Seed,
    Temperature,
    TopP,
)

if TYPE_CHECKING:
    from orpo_ray.evaluation.chat import Chat, Reply

app = typer.Typer(add_completion=False)

_WIDE = 80
"""Columns of a terminal that has room for two answers beside each other."""
_OF_TERMINALS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
_OF_ORDER = {*range(0x202A, 0x202F), *range(0x2066, 0x2070)}
"""Unicode's embeddings, overrides and isolates, which show text in another order, and the
deprecated controls after them. The marks and joiners that scripts and emoji need are not here."""
_OF_NOTES = {*range(0xFFF9, 0xFFFC)}
"""A program may hide what stands between these."""
_CONTROLS = dict.fromkeys(_OF_TERMINALS | _OF_ORDER | _OF_NOTES, "\ufffd")


@app.command("chat")
def chat(
    run: NamedRun,
    overrides: Overrides = None,
    once: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this question, and end.")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system text.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    adapter: Adapter = None,
    json: Json = False,
) -> dict[str, Any] | None:
    """Talk to a trained model. Ctrl-C ends an answer, and Ctrl-D the chat."""
    from orpo_ray.cli.console import Terminal, announce, open_log
    from orpo_ray.errors import ConfigError
    from orpo_ray.runs.named import named_config

    if json and once is None:
        raise ConfigError("--json: a conversation has no single result; ask with --once TEXT")
    settings = named_config(run, overrides or ())
    open_log()
    from orpo_ray import api

    talk = api.chat(
        settings,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        adapter=adapter,
        console=Terminal(),
    )
    if system:
        talk.set_system(system)
    ends = " or ".join(each if each.strip() else repr(each) for each in talk.ends)
    announce(printable(f"{talk.title}; an answer ends with {ends}"))
    for stream in (sys.stdin, sys.stdout):  # no character that is typed or said ends the chat
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    if once is not None:
        return _answer_once(talk, once, json)
    _converse(talk)
    return None


def printable(text: str) -> str:
    """A text of a model without characters that control a terminal, or reorder or hide text there.

    Line ends and tabs stay.
    """
    return text.translate(_CONTROLS)


def _answer_once(talk: Chat, text: str, json: bool) -> dict[str, Any]:
    from orpo_ray.runs.console import SILENT
    from orpo_ray.training.generate import Listener

    reply = talk.ask(text, Listener(SILENT.announce, lambda: False))
    if not json:
        print(printable(reply.text))
        _tell_end(talk, reply)
    return {
        "prompt": text,
        "answer": reply.text,
        "tokens": reply.tokens,
        "stopped": reply.stopped,
    }


def _converse(talk: Chat) -> None:
    """Answer what is typed, line by line, to the end of the chat."""
    from orpo_ray.cli.console import announce
    from orpo_ray.errors import ResourceError, UserError

    if sys.stdin is None:  # closed by the shell that gave the command
        return
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # a Python without it reads plain lines
            import readline  # noqa: F401 - from now on `input` edits lines and keeps a history
        announce("/help shows what else can be typed; Ctrl-C ends an answer, and Ctrl-D the chat")
    while (line := _next_line("> " if is_terminal else "")) is not None:
        pressed: list[bool] = []
        with _on_ctrl_c(partial(pressed.append, True)):
            try:
                if not _take(talk, line, partial(bool, pressed)):
                    return
            except (UserError, ResourceError) as error:
                announce(printable(" ".join(str(error).split())))


def _next_line(prompt: str) -> str | None:
    """The next line that is typed; None if the chat ends. Ctrl-C drops what a line has so far."""
    while True:
        try:
            with _on_ctrl_c(_drop_line):
                return input(prompt)
        except EOFError:
            break
        except _Dropped:
            if not (prompt and _has_begun_line()):
                break
            print()
    if prompt:
        print()
    return None


def _has_begun_line() -> bool:
    """Whether something is typed already, as far as this Python can tell."""
    readline: Any = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer())


class _Dropped(KeyboardInterrupt):
    """Ctrl-C at a prompt. SIGTERM, which ends the command, is a plain KeyboardInterrupt."""


def _drop_line() -> None:
    raise _Dropped


@contextmanager
def _on_ctrl_c(do: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls a function, and nothing else."""
    former = signal.getsignal(signal.SIGINT)
    if former is not signal.SIG_IGN:  # as a script's background commands have it
        signal.signal(signal.SIGINT, lambda number, frame: do())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _take(talk: Chat, line: str, was_pressed: Callable[[], bool]) -> bool:
    """Do what a line asks for. Returns whether the chat goes on."""
    from orpo_ray.cli.console import announce
    from orpo_ray.evaluation.chat import help_lines, parse_line

    typed = parse_line(line)
    if typed is None:
        return True
    match typed.command:
        case "":
            _ask(talk, typed.text, was_pressed)
        case "/reset":
            talk.reset()
            announce("the conversation is forgotten, but not a system text")
        case "/system":
            talk.set_system(typed.text)
            with_one = "this" if typed.text else "no"
            announce(f"the conversation begins anew with {with_one} system text")
        case "/base":
            _show_both(*talk.base_reply(was_pressed))
        case "/save":
            announce(f"saved: {talk.save(typed.text)}")
        case "/help":
            for each in help_lines():
                announce(each)
        case "/exit":
            return False
    return True


def _ask(talk: Chat, question: str, was_pressed: Callable[[], bool]) -> None:
    from orpo_ray.training.generate import Listener

    def show(piece: str) -> None:
        print(printable(piece), end="", flush=True)

    reply = talk.ask(question, Listener(show, was_pressed))
    print(flush=True)
    _tell_end(talk, reply)


def _tell_end(talk: Chat, reply: Reply) -> None:
    """Say what ended an answer if the model did not, and if there is none."""
    from orpo_ray.cli.console import announce

    if reply.stopped == "user":
        announce("stopped")
    elif reply.stopped == "length":
        announce(talk.why_cut())
    if not reply.text:
        announce("there is no answer, so the question is not remembered")


def _show_both(base: Reply, trained: Reply) -> None:
    """Print two answers beside each other, or one below the other where there is no room."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    answers = {
        "base" + _how_ended(base): Text(printable(base.text)),
        "trained" + _how_ended(trained): Text(printable(trained.text)),
    }
    if not console.is_terminal or console.width < _WIDE:
        for name, answer in answers.items():
            console.print(Text(f"{name}:"), answer, sep="\n", soft_wrap=True)
        return
    table = Table(expand=True)
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*answers.values())
    console.print(table)


def _how_ended(reply: Reply) -> str:
    return {"end": "", "length": " (cut)", "user": " (stopped)"}[reply.stopped]

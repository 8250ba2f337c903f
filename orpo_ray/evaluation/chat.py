"""A conversation with a trained model, and the commands that can be typed in it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Literal

from peft import PeftModel

from orpo_ray.config.storage import expanded
from orpo_ray.data.endings import end_texts
from orpo_ray.data.pairs import Message
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.runs.console import SILENT
from orpo_ray.training.generate import Listener, Speaker
from orpo_ray.training.sampling import Sampling

COMMANDS = {
    "/reset": "forget the conversation; the system text stays",
    "/system": "set the system text, or without TEXT remove it, and begin anew",
    "/base": "show the base's answer to the last question beside the trained model's",
    "/save": "write the conversation as one line of JSON",
    "/help": "show this",
    "/exit": "end the chat",
}
"""What can be typed in place of a question, and what it does."""
_TAKES = {"/system": "TEXT", "/save": "FILE"}
_ALIASES = {"/quit": "/exit"}
_SEED_BITS = 31


@dataclass(frozen=True)
class Typed:
    """A line that was typed: a question if `command` is empty."""

    command: str
    text: str


@dataclass(frozen=True)
class Reply:
    """An answer without special tokens, the number of its tokens, and what ended it.

    That is the model itself, a limit of length, or the user.
    """

    text: str
    tokens: int
    stopped: Literal["end", "length", "user"]


def parse_line(line: str) -> Typed | None:
    """What a typed line asks for; None if it is empty.

    A question that begins with a slash has a space before it. Raises ConfigError for an unknown
    command.
    """
    if not line.startswith("/"):
        return Typed("", line.strip()) if line.strip() else None
    name, *rest = line.strip().split(maxsplit=1)
    command, text = _ALIASES.get(name, name), "".join(rest)
    if command not in COMMANDS:
        near = get_close_matches(command, [*COMMANDS, *_ALIASES], 1)
        raise ConfigError(
            f"{name}: no such command; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
        )
    if text and command not in _TAKES:
        raise ConfigError(f"{command}: nothing can follow it; type {command} alone")
    if command == "/save" and not text:
        raise ConfigError("/save: name the file to write, such as /save chat.jsonl")
    return Typed(command, text)


def help_lines() -> list[str]:
    """What can be typed, a line each."""
    usages = {name: f"{name} {_TAKES.get(name, '')}" for name in COMMANDS}
    lines = [f"{usages[name]:14}{does}" for name, does in COMMANDS.items()]
    return [*lines, "A question that begins with / has a space before it."]


class Chat:
    """A conversation with one model, without a terminal.

    Every question is asked with all that was said before. `load_base` loads the base, for a model
    of which every weight was trained. `title` says who answers, and with which chat template.
    """

    def __init__(
        self,
        speaker: Speaker,
        sampling: Sampling,
        load_base: Callable[[], Speaker],
        title: str = "",
    ) -> None:
        self.title = title
        self._speaker = speaker
        self._sampling = sampling
        self._load_base = load_base
        self._tokeniser = PairTokeniser(speaker.tokenizer)
        self._base: Speaker | None = None
        self._system: list[Message] = []
        self._said: list[Message] = []
        self._last: tuple[list[int], Sampling, Reply] | None = None

    @property
    def messages(self) -> list[Message]:
        """The system text, if there is one, and what was said."""
        return [*self._system, *self._said]

    @property
    def ends(self) -> list[str]:
        """The tokens that end an answer, as texts."""
        return end_texts(self._speaker.tokenizer, self._speaker.ends)

    def ask(self, text: str, listener: Listener) -> Reply:
        """The answer to a question; both are remembered unless nothing was answered.

        Raises DataError for a question that cannot be asked, which is not remembered.
        """
        self._check("the question", text)
        if not text.strip():
            raise DataError("the question is empty")
        asked: Message = {"role": "user", "content": text}
        prompt = self._prompt([*self.messages, asked])
        positions = self._speaker.model.positions
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"the conversation has {len(prompt)} tokens with this question, but the base reads "
                f"{positions}, so there is no room for an answer; /reset forgets what was said"
            )
        turn = len(self._said) // 2
        seed = Random(f"{self._sampling.seed}:{turn}").getrandbits(_SEED_BITS)
        sampling = replace(self._sampling, seed=seed)
        reply = _reply(self._speaker, prompt, sampling, listener)
        self._last = (prompt, sampling, reply)
        if reply.text:
            self._said += [asked, {"role": "assistant", "content": reply.text}]
        return reply

    def base_reply(self, has_enough: Callable[[], bool]) -> tuple[Reply, Reply]:
        """The base's reply to the last question, and the trained model's, which was given before.

        The conversation stays as it is. Raises ConfigError if nothing was asked.
        """
        if self._last is None:
            raise ConfigError("/base: nothing was asked yet; ask a question first")
        prompt, sampling, trained = self._last
        with self._as_base() as base:
            listener = Listener(SILENT.announce, has_enough)
            return _reply(base, prompt, sampling, listener), trained

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self._said, self._last = [], None

    def set_system(self, text: str) -> None:
        """Set the system text, or remove it with an empty one, and forget what was said.

        Raises DataError for a text that the chat template refuses or does not write.
        """
        self._check("the system text", text)
        system: list[Message] = [{"role": "system", "content": text}] if text else []
        asked: Message = {"role": "user", "content": "x"}
        if text and self._prompt([*system, asked]) == self._prompt([asked]):
            raise DataError("the chat template writes no system text; put it into a question")
        self._system = system
        self.reset()

    def save(self, file: str) -> Path:
        """Write the conversation as one line of JSON, which `generate` reads, too.

        Raises ConfigError for a file that exists or cannot be written, or if nothing was said.
        """
        if not self._said:
            raise ConfigError("/save: nothing was said yet")
        path = expanded(file, "/save")
        try:
            with path.open("x", encoding="utf-8") as out:
                out.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except FileExistsError as error:
            raise ConfigError(f"/save: {path} exists; name another file") from error
        except OSError as error:
            raise ConfigError(f"/save: {path} cannot be written: {error.strerror}") from error
        return path

    def why_cut(self) -> str:
        """What ended the last answer before the model did, and what to do."""
        assert self._last is not None, "something was asked"
        prompt, sampling, reply = self._last
        if reply.tokens < sampling.max_new_tokens:
            return (
                f"cut, because the base reads {len(prompt) + reply.tokens} tokens; /reset forgets "
                "what was said"
            )
        return f"cut after {reply.tokens} tokens; --max-new-tokens allows more"

    def _prompt(self, messages: list[Message]) -> list[int]:
        """Token ids; what the model has said is ordinary text, and all else was checked."""
        [prompt] = self._tokeniser.prompts([messages], given=[0])
        return prompt

    def _check(self, what: str, text: str) -> None:
        """Raise DataError for a user's text with a mark that belongs to the chat template."""
        if mark := self._tokeniser.mark_in(text):
            raise DataError(
                f"{what} has {mark}, which is for the chat template alone; leave it out"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{what} is not UTF-8; check the terminal's locale")

    @contextmanager
    def _as_base(self) -> Iterator[Speaker]:
        """The base: the model without its adapter, or what the run began with."""
        model = self._speaker.model.model
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield self._speaker
            return
        if self._base is None:
            self._base = self._load_base()
        yield self._base


def _reply(
    speaker: Speaker, prompt: Sequence[int], sampling: Sampling, listener: Listener
) -> Reply:
    [answer] = speaker.answer([prompt], sampling, listener)
    if not answer.is_cut:
        return Reply(answer.text, answer.tokens, "end")
    return Reply(answer.text, answer.tokens, "user" if listener.has_enough() else "length")

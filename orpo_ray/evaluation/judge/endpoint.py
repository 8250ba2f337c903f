"""A judge behind an OpenAI-compatible endpoint: one request at a time, and what its errors mean."""

import email.utils
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from orpo_ray.config.storage import expanded
from orpo_ray.data.pairs import Message
from orpo_ray.errors import ConfigError, ResourceError, RunError

_CHAT = "/chat/completions"
_LONGEST_ANSWER = 2048
"""Tokens. A judge that does not end costs no more than these."""
_LONGEST_THOUGHT = 25_000
"""Tokens of a judge that thinks first. OpenAI advises to leave so many for thought and answer."""
_ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": _LONGEST_ANSWER}
"""How a judge is asked."""
_INSTEAD: dict[str, dict[str, Any]] = {
    "temperature": {},
    "max_tokens": {"max_completion_tokens": _LONGEST_THOUGHT},
}
"""What a judge is asked with in place of a setting that it does not take."""
_UNSUPPORTED = re.compile(r"unsupported|n[o']t support|deprecated", re.IGNORECASE)
"""How servers say so. A question that is too long names `max_tokens`, too, but not like this."""
_PASSING = (408, 409, 425, 429)
"""Besides 5xx, the statuses that may be others a little later."""
_OF_ONE_QUESTION = (400, 413, 422)
"""Statuses for a question that is too long, or that a filter does not let through."""
_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a judge is waited for, in seconds, and how often it is asked for one verdict.

    `tries` is after failures, with pauses that double; `readings` is after answers that have no
    verdict in them.
    """

    tries: int = 7
    first_pause: float = 1.0
    longest_pause: float = 60.0
    answer: float = 300.0
    readings: int = 3

    def pause(self, failures: int, asked_for: float | None) -> float:
        """How long to wait after so many failures; the endpoint may have asked for a time."""
        wanted = self.first_pause * 2.0 ** (failures - 1)
        return min(max(wanted, asked_for or 0.0), self.longest_pause)


PATIENCE = Patience()


class Failed(Exception):  # noqa: N818 - what comes next is another try
    """A request without an answer, which may have one if it is made again."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Refused(Exception):  # noqa: N818 - the next question may be answered
    """A question that will never be answered, such as one that is too long for the judge."""


class Changed(Exception):  # noqa: N818 - the next request may be answered
    """A request that was refused for how it was made. From now on others are made as it says."""


class Chat(Protocol):
    """A model that answers."""

    def say(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation, by one request.

        Raises Failed if another may succeed, Changed if another is made in another way, Refused if
        none will succeed, and ConfigError or RunError if no question will be answered.
        """


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a judge answers, and by which name. The key is in no message and in no file."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def connect(self, seconds: float) -> Chat:
        """A client, whose requests may take so long. Raises ResourceError without the package."""
        return _Client(self, seconds)


def endpoint_of(url: str, model: str | None, key_file: str | None) -> Endpoint:
    """What is asked for. Raises ConfigError for what is no endpoint, or no key."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises ValueError for what is no number
    except ValueError:
        is_whole = False
    if not is_whole or not url.isprintable():
        raise ConfigError("endpoint: must be a URL such as http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "endpoint: must be a URL without a user, a password or parameters; a key goes into a "
            "file that key_file names"
        )
    if not model:
        raise ConfigError("model: name the model that judges, as the endpoint calls it")
    key = "" if key_file is None else _key_in(key_file)
    return Endpoint(url=url.rstrip("/").removesuffix(_CHAT), model=model, key=key)


def _key_in(file: str) -> str:
    """The key in a file. Messages name the file only."""
    try:
        key = expanded(file, "key_file").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"key_file: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"key_file: {file} must hold the key on one line, and nothing else")
    return key


class _Client:
    """The client of the package openai, for one request at a time.

    Its own retries are off, because each request counts. Redirects are off, because they would
    carry the answers elsewhere.
    """

    def __init__(self, endpoint: Endpoint, seconds: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise ResourceError(
                "endpoint: needs the package openai (the extra judge); pip install openai"
            ) from error
        self._openai: Any = openai
        self._endpoint = endpoint
        # What the environment says of other accounts is not for this endpoint.
        unsent = ["OpenAI-Organization", "OpenAI-Project"]
        unsent += [] if endpoint.key else ["Authorization"]
        self._settings = _ASKED
        self._lock = threading.Lock()
        self._headers: Any = {name: openai.Omit() for name in unsent}
        self._client = openai.OpenAI(
            api_key=endpoint.key or "none",
            base_url=endpoint.url,
            max_retries=0,
            timeout=seconds,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def say(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation, by one request."""
        asked: Any = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        settings = self._settings
        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=self._endpoint.model,
                messages=asked,
                **settings,
                extra_headers=self._headers,
            )
            content = _content(reply.http_response.content)
        except self._openai.APITimeoutError:
            raise Failed("no answer in time") from None
        except self._openai.APIConnectionError as error:
            raise Failed(f"no connection, or it was cut ({self._shown(error.__cause__)})") from None
        except self._openai.APIStatusError as error:
            # The server's words may repeat the key, so this error does not go on to the log.
            raise self._changed(error, settings) or self._refusal(error) from None
        if content is None:
            raise Failed("its reply is no chat completion")
        return self._without_key(content.encode(errors="backslashreplace").decode())

    def _changed(self, error: Any, settings: Mapping[str, Any]) -> Changed | None:
        """Leave out the settings that a refusal names; None if it was for something else."""
        if error.status_code != 400 or not _UNSUPPORTED.search(error.message):
            return None
        named = [name for name in _INSTEAD if name in settings and name in error.message]
        if not named:
            return None
        instead = {key: value for name in named for key, value in _INSTEAD[name].items()}
        with self._lock:  # requests at the same time may each learn of another setting
            kept = {name: value for name, value in self._settings.items() if name not in named}
            self._settings = {**kept, **instead}
        told = " and ".join(f"{name}={settings[name]}" for name in named)
        into = " ".join(f"{name}={value}" for name, value in instead.items())
        how = f"with {into}" if into else "without it"
        return Changed(f"{self._endpoint.model} does not take {told}; it is asked {how}")

    def _refusal(self, error: Any) -> Exception:
        status: int = error.status_code
        said = error.message.removeprefix(f"Error code: {status}").removeprefix(" - ")
        why = f"{status} {self._shown(said)}".rstrip()
        if status in _PASSING or status >= 500:
            return Failed(why, _wait(error.response.headers))
        if status in (401, 403):
            return ConfigError(f"key_file: {self._endpoint.url} does not take the key: {why}")
        if status == 404:
            return ConfigError(
                f"endpoint: {self._endpoint.url} has no model {self._endpoint.model}, or is no "
                f"endpoint: {why}"
            )
        if status in _OF_ONE_QUESTION:
            return Refused(why)
        return RunError(f"{self._endpoint.url} takes no questions: {why}")

    def _shown(self, what: object) -> str:
        """What a server says, fit for a terminal: one short line without the key."""
        text = "".join(c if c.isprintable() else " " for c in self._without_key(str(what)))
        line = " ".join(text.split())
        return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."

    def _without_key(self, text: str) -> str:
        return text.replace(self._endpoint.key, "(the key)") if self._endpoint.key else text


def _content(reply: bytes) -> str | None:
    """The text in a chat completion, which may be empty; None for anything else."""
    try:
        message = json.loads(reply)["choices"][0]["message"]
        content = message["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    if content is None:  # as from a model that declines, or that only thought
        return ""
    return content if isinstance(content, str) else None


def _wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait; None if it does not say."""
    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        seconds = _until(said)
    return seconds if seconds >= 0 else None


def _until(date: str) -> float:
    """Seconds from now to a date of HTTP; NaN for what is none."""
    try:
        return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
    except (ValueError, OverflowError):
        return float("nan")

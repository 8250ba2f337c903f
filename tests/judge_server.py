"""An OpenAI-compatible server for tests, with real HTTP, a rule that judges, and faults on request.

The rule sees what a judge would see: the request and both answers, between the marker lines.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY, MODEL = "test-key-0123456789", "test-judge"
_PART = r"\[{name} (\w+)\]\n(.*)\n\[END OF {name} \1\]"


@dataclass(frozen=True)
class Question:
    """What a judge is asked, and how often it was asked for this verdict before."""

    request: str
    first: str
    second: str
    before: int

    @classmethod
    def of(cls, messages: list[dict[str, str]]) -> "Question":
        """What stands between the markers of the first message."""
        text = messages[0]["content"]
        found = [
            re.search(_PART.format(name=name), text, re.DOTALL)
            for name in ("REQUEST", "ANSWER 1", "ANSWER 2")
        ]
        parts = [each[2] for each in found if each is not None]
        assert len(parts) == 3, text
        assert all(turn["role"] == "user" for turn in messages[::2])
        return cls(*parts, before=len(messages) // 2)


Rule = Callable[[Question], str]


def says(verdict: str) -> str:
    """An answer as models give it."""
    return f"They differ.\n\nVERDICT: {verdict}"


def longer(question: Question) -> str:
    """The longer answer is better."""
    difference = len(question.first) - len(question.second)
    if difference == 0:
        return says("tie")
    return says("1" if difference > 0 else "2")


def first(question: Question) -> str:
    """The answer that is shown first is better."""
    return says("1")


@dataclass
class JudgeServer:
    """A running server. `faults` go wrong one after the other, then all is well."""

    url: str = ""
    rule: Rule = longer
    key: str | None = None
    thinks: bool = False
    """Whether it refuses what the reasoning models of OpenAI refuse, in their words."""
    faults: list[str] = field(default_factory=list)
    held_after: int | None = None
    """After so many requests no other is answered before `goes_on` is set."""
    goes_on: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all requests."""
    authorizations: set[str | None] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(**settings: Any) -> Iterator[JudgeServer]:
    """A server on a free port of this machine, until the block ends."""
    judge = JudgeServer(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, judge))
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield judge
    finally:
        judge.goes_on.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, judge: JudgeServer, *args: Any) -> None:
        self._judge = judge
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Does nothing: tests read `asked`."""

    def do_POST(self) -> None:
        """Answer a chat, or fail as the next fault says."""
        judge = self._judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked.append(body)
            judge.authorizations.add(self.headers.get("Authorization"))
            fault = judge.faults.pop(0) if judge.faults else ""
            is_held = judge.held_after is not None and len(judge.asked) > judge.held_after
        if is_held or fault == "slow":
            judge.goes_on.wait()
        if self.path != "/v1/chat/completions":
            return self._answer(404, {"error": {"message": "no such path"}})
        if judge.key is not None and self.headers.get("Authorization") != f"Bearer {judge.key}":
            said = f"wrong key {self.headers.get('Authorization')}\x1b[31m"
            return self._answer(401, {"error": {"message": said}})
        if fault and fault != "slow":
            return self._fail(fault)
        if judge.thinks and (unfit := _unfit(body)):
            return self._answer(400, {"error": {"message": unfit}})
        content = judge.rule(Question.of(body["messages"]))
        return self._answer(200, completion(content))

    def _fail(self, fault: str) -> None:
        match fault:
            case "429":
                slower = {"error": {"message": "slower"}}
                self._answer(429, slower, **{"Retry-After": "0"})
            case "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
            case "closed":
                self.close_connection = True
            case "html":
                self._send(200, b"<html>hello</html>", "text/html")
            case "half":
                self._send(200, b'{"choices": [{"message": ')
            case "shape":
                self._answer(200, {"choices": []})
            case "number":
                self._answer(200, completion(5))
            case "too long":  # in the words of vLLM
                said = (
                    "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's "
                    "maximum context length is 4096 tokens and your request has 3000 input tokens"
                )
                self._answer(400, {"error": {"message": said}})
            case "redirect":
                self._answer(307, {}, Location=f"{self._judge.url}/elsewhere")
            case status:
                self._answer(int(status), {"error": {"message": f"a fault\x1b[31m of {status}"}})

    def _answer(self, status: int, content: dict[str, Any], **headers: str) -> None:
        self._send(status, json.dumps(content).encode(), "application/json", **headers)

    def _send(
        self, status: int, content: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the command was ended meanwhile


def _unfit(body: dict[str, Any]) -> str | None:
    """The first thing in a request that a model that thinks does not take."""
    if "max_tokens" in body:
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead."
        )
    if body.get("temperature", 1) != 1:
        return (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default "
            "(1) value is supported."
        )
    return None


def completion(content: Any) -> dict[str, Any]:
    """The body of an answer."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "model": MODEL, "choices": [choice]}

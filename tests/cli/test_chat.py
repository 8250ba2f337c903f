"""orpo-ray chat: in a real terminal, from a pipe, and for one question of a script."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pexpect
import pytest
from safetensors.torch import load_file, save_file
from support import BASE, HANG_S
from terminal import ENVIRONMENT, STOPPED, WRONG, Command, Finished, one_line

COW = "What sound does a cow make?"
END_TOKEN = 2
PROMPT = "\n> "


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with a vector of zeros for its end token, so that no answer ends by itself.

    It also reads as many tokens as anybody waits for.
    """
    folder = tmp_path_factory.mktemp("endless") / "base"
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][END_TOKEN] = 0  # it is the head, too
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 10**6
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@contextmanager
def terminal(folder: Path, *arguments: object, columns: int = 100) -> Iterator[pexpect.spawn]:
    """`orpo-ray chat` in a terminal of its own, at its first prompt.

    It works in a folder, so that the names that are typed stay short.
    """
    variables = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
    child = pexpect.spawn(
        sys.executable,
        ["-m", "orpo_ray.cli.main", "chat", *map(str, arguments)],
        cwd=folder,
        env={**variables, "TERM": "xterm"},
        encoding="utf-8",
        dimensions=(40, columns),
        # As in a terminal of a person: tests that run in the background have Ctrl-C ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        timeout=HANG_S,
    )
    try:
        child.expect("Ctrl-D the chat")
        child.expect(PROMPT)
        yield child
    finally:
        child.close(force=True)


def say(child: pexpect.spawn, line: str) -> str:
    """Type a line; what stands there before the next prompt."""
    child.sendline(line)
    child.expect_exact(f"{line}\r\n")
    child.expect(PROMPT)
    return child.before


def ends_well(child: pexpect.spawn) -> None:
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    finished: Finished, endless: Path, tmp_path: Path
) -> None:
    asks = (finished.run_dir, f"model.base={endless}", "--max-new-tokens", 500_000)
    with terminal(tmp_path, *asks) as child:
        child.sendline("Hello!")
        child.expect_exact("Hello!\r\n")
        child.expect(r"\w+\W+\w+ ")  # it streams: there is no end to wait for
        child.sendintr()
        child.expect("stopped")
        child.expect(PROMPT)
        child.send("half a line")
        child.expect_exact("half a line")
        child.sendintr()
        child.expect(PROMPT)
        say(child, "/save chat.jsonl")
        child.sendintr()
        ends_well(child)
    [line] = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    asked, said = json.loads(line)["messages"]
    assert asked == {"role": "user", "content": "Hello!"}
    assert said["role"] == "assistant" and len(said["content"].split()) > 1


def test_a_conversation_in_a_terminal(command: Command, finished: Finished, tmp_path: Path) -> None:
    alone = command("chat", finished.run_dir, "--once", COW).out.strip()
    with terminal(tmp_path, finished.config) as child:
        assert say(child, COW).replace("\r\n", "\n").strip() == alone
        both = say(child, "/base")
        assert "base" in both and "trained" in both and "│" in both, "two columns"
        assert "did you mean /save?" in say(child, "/sav x")
        assert "the question has <|im_end|>" in say(child, "Hi <|im_end|>")
        assert "<|im_end|>" not in say(child, "Hello!")
        assert "saved: first.jsonl" in say(child, "/save first.jsonl")
        assert "first.jsonl exists; name another file" in say(child, "/save first.jsonl")
        assert "none/a cannot be written: No such file" in say(child, "/save none/a")
        assert "not a system text" in say(child, "/reset")
        assert "/save: nothing was said yet" in say(child, "/save no.jsonl")
        assert "begins anew with this system text" in say(child, "/system Be kind.")
        say(child, COW)
        assert "saved" in say(child, "/save second.jsonl")
        child.sendeof()
        ends_well(child)
    first = tmp_path / "first.jsonl"
    messages = json.loads(first.read_text(encoding="utf-8"))["messages"]
    assert [turn["content"] for turn in messages[::2]] == [COW, "Hello!"], "no refused turn"
    assert messages[1]["content"] == alone
    messages = json.loads((tmp_path / "second.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]
    out = tmp_path / "answers.jsonl"
    asks = ("--prompts", first, "--out", out, "--max-new-tokens", "4")
    assert command("generate", finished.run_dir, *asks).code == 0


def test_a_narrow_terminal_shows_one_answer_below_the_other_and_sigterm_ends_the_chat(
    finished: Finished, tmp_path: Path
) -> None:
    with terminal(tmp_path, finished.run_dir, columns=60) as child:
        say(child, COW)
        both = say(child, "/base")
        assert "base:\r\n" in both and "trained:\r\n" in both and "│" not in both
        child.send("half a line")
        child.expect_exact("half a line")
        child.kill(signal.SIGTERM)
        child.expect("interrupted")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == STOPPED


def test_lines_of_a_pipe_are_answered_one_by_one(
    command: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = command("chat", finished.run_dir, "--once", COW)
    assert alone.out.count("\n") == 1
    assert alone.said[
        -1
    ] == "tiny, with the chat template: the base's own; an answer ends with " + ("<|im_end|>")
    lines = [COW, "", "/rest", "[INST]", "/reset", COW, "/base", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    done = command("chat", finished.run_dir)
    assert done.code == 0, done.err
    assert done.out.startswith(alone.out * 2 + "base:\n"), "no prompt, no notice"
    assert done.out.endswith(f"trained:\n{alone.out}")
    assert [line.partition(":")[0] for line in done.said[-3:]] == [
        "/rest",
        "the question has [INST], which is for the chat template alone; leave it out",
        "the conversation is forgotten, but not a system text",
    ]


def test_one_question_of_a_script(command: Command, finished: Finished) -> None:
    asks = ("chat", finished.config, "--once", COW)
    whole = command(*asks, "--json")
    assert whole.result == {
        "prompt": COW,
        "answer": command(*asks).out.strip(),
        "tokens": whole.result["tokens"],
        "stopped": "end",
    }
    cut = command(*asks, "--max-new-tokens", 2)
    assert (cut.code, cut.said[-1]) == (0, "cut after 2 tokens; --max-new-tokens allows more")
    drawn = (*asks, "--temperature", "1.5", "--top-p", "0.9", "--json", "--seed")
    assert command(*drawn, 1).result == command(*drawn, 1).result != command(*drawn, 2).result
    kind = command(*asks, "--system", "Talk of bees.", "--json").result
    assert kind["answer"] != whole.result["answer"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--json",), "--json: a conversation has no single result; ask with --once TEXT"),
        (("--once", ""), "the question is empty"),
        (("--once", "a <|im_end|>"), "the question has <|im_end|>"),
        (("--once", "word " * 600), "the base reads 512, so there is no room for an answer"),
        (("--system", "[INST]", "--once", "x"), "the system text has [INST]"),
        (("--top-p", "0"), "top_p"),
        (("--temperature", "nan"), "temperature"),
        (("--adapter", "none"), "none: no adapter_config.json"),
        (("model.base=none/at/all",), "model.base"),
        (("model.chat_template=none.jinja",), "model.chat_template"),
        (("nam=x",), "nam"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...], told: str, command: Command, finished: Finished
) -> None:
    one_line(command("chat", finished.run_dir, *arguments), WRONG, told)


def test_a_run_that_is_not_there_or_not_finished(
    command: Command, config: Path, tmp_path: Path
) -> None:
    one_line(command("chat", tmp_path / "none"), WRONG, "no run is there")
    one_line(command("chat", config), WRONG, "run tiny in", "does not exist; train it")
    assert command("train", config, "--dry-run").code == 0
    (tmp_path / "storage" / "tiny").mkdir(exist_ok=True)
    (tmp_path / "storage" / "tiny" / "config.json").touch()
    one_line(command("chat", config, "--once", "x"), WRONG, "is not finished; train it")

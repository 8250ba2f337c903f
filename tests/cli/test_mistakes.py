"""Mistakes of users: one line says what and where, and nothing blocks the next command."""

import errno
import gzip
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import BASE, DEMO, Done, wait_until
from terminal import (
    ENVIRONMENT,
    FAILED,
    LACKING,
    STOPPED,
    WRONG,
    Command,
    Finished,
    nothing_in_the_way,
    one_line,
    start,
)

from orpo_ray.cli.console import open_log
from orpo_ray.cli.main import COMMANDS

Make = Callable[[Path], list[str]]
"""Lays the trap in a folder; gives what to put behind `orpo-ray train CONFIG`."""


# --- traps ----------------------------------------------------------------------------------------


def demo_rows(count: int = 20) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ]


def rows(*items: dict[str, Any] | str, name: str = "pairs.jsonl") -> Make:
    """Training pairs from a file with these rows."""

    def make(folder: Path) -> list[str]:
        lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return [f"data.train.0.source={folder / name}"]

    return make


def raw(content: bytes, name: str) -> Make:
    """Training pairs from a file with this content."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"data.train.0.source={folder / name}"]

    return make


def base(edit: Callable[[Path], object], *more: str) -> Make:
    """A copy of the demo's base with something wrong about it."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(BASE, folder / "base")
        edit(folder / "base")
        return [f"model.base={folder / 'base'}", *more]

    return make


def in_second_stage(make: Make) -> Make:
    """The pairs that `make` has written, as those of a second stage."""

    def moved(folder: Path) -> list[str]:
        files = [override.partition("=")[2] for override in make(folder)]
        return [f"stages=[{{}}, {{data: {{train: {json.dumps(files)}}}}}]"]

    return moved


def text(key: str, name: str, content: str) -> Make:
    """A setting that names a file with this text."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_text(content, encoding="utf-8")
        return [f"{key}={folder / name}"]

    return make


def setting(*overrides: str) -> Make:
    """Nothing but overrides."""
    return lambda folder: [override.replace("HERE", str(folder)) for override in overrides]


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    """Keys of a JSON file in the base set, or dropped where they are None."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return edit


def unlink(*patterns: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def only_pickle(folder: Path) -> None:
    import torch

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "q_proj" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def token_beyond_the_embedding(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 100_000, "content": "<|far|>"}
    )
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    template = folder / "chat_template.jinja"
    template.write_text("<|far|>" + template.read_text(encoding="utf-8"), encoding="utf-8")


GOOD = demo_rows()
BAD_SIDE = [{**row, "chosen": row["rejected"]} if n % 4 == 0 else row for n, row in enumerate(GOOD)]
NO_FOLDER = "/proc/orpo-ray" if os.geteuid() == 0 else "/orpo-ray"
"""A folder that cannot be made; root can make nearly all."""

SETTINGS: dict[str, tuple[Make, int, tuple[str, ...]]] = {
    "unknown key": (
        setting("training.learning_rat=1"),
        WRONG,
        ("training.learning_rat", "training.learning_rate?"),
    ),
    "name of TRL's": (
        setting("training.num_train_epochs=2"),
        WRONG,
        ("training.num_train_epochs", "here it is training.epochs"),
    ),
    "key of a section": (
        setting("lambda=0.3"),
        WRONG,
        ("lambda", "did you mean objective.lambda?"),
    ),
    "word for a number": (
        setting("training.learning_rate=fast"),
        WRONG,
        ("training.learning_rate", "'fast'"),
    ),
    "negative": (setting("training.pairs_per_step=-8"), WRONG, ("training.pairs_per_step", "-8")),
    "all steps are warmup": (
        setting("training.warmup=8", "training.max_steps=4"),
        WRONG,
        ("training.warmup: 8 steps", "the run has 4"),
    ),
    "override without =": (setting("training.seed"), WRONG, ("'training.seed'", "key=value")),
    "two configs": (setting("HERE/tiny.yaml"), WRONG, ("override '/", "key=value")),
    "name that leaves the storage": (setting("name=a/../../b"), WRONG, ("name", "'a/../../b'")),
    "name above": (setting("name=.."), WRONG, ("name", "'..'")),
    "empty name": (setting("name="), WRONG, ("name",)),
    "nf4 and full": (
        setting("adapter.kind=none"),
        WRONG,
        ("adapter.kind", "nf4", "model.quantization=none"),
    ),
    "int8 and full": (
        setting("adapter.kind=none", "model.quantization=int8"),
        WRONG,
        ("adapter.kind", "int8", "model.quantization=none"),
    ),
    "storage is a web page": (
        setting("storage=https://host/runs"),
        WRONG,
        ("storage", "https://", "s3://bucket/folder"),
    ),
    "storage is a file": (
        setting("storage=HERE/tiny.yaml"),
        WRONG,
        ("storage", "tiny.yaml", "Not a directory"),
    ),
    "storage cannot be made": (setting(f"storage={NO_FOLDER}"), WRONG, ("storage", NO_FOLDER)),
    "storage is empty": (setting("storage="), WRONG, ("storage",)),
    "float16 on a CPU": (
        setting("model.dtype=float16"),
        LACKING,
        ("model.dtype", "float16", "GPU"),
    ),
    "no worker": (setting("scale.workers=0"), WRONG, ("scale.workers", "0")),
    "a stage that is none": (setting("scale.deepspeed.stage=4"), WRONG, ("scale.deepspeed", "4")),
    "more CPUs than there are": (
        setting("scale.workers=64"),
        LACKING,
        (
            "scale.workers: 64 workers with 1 CPU each were asked for",
            "there is room for",
            " CPU, 0 GPU)",
        ),
    ),
    "GPUs where there is none": (
        setting("scale.workers=2", "scale.gpus_per_worker=1"),
        LACKING,
        (
            "2 workers with 1 CPU and 1 GPU each were asked for",
            "room for 0",
            " CPU, 0 GPU)",
            "; `orpo-ray doctor` looks for the cause",
        ),
    ),
    "flash attention on a CPU": (
        setting("model.attention=flash_attention_2"),
        LACKING,
        ("model.attention", "flash_attention_2", "GPU"),
    ),
}

SOURCES: dict[str, tuple[Make, int, tuple[str, ...]]] = {
    "missing": (
        setting("data.train.0.source=HERE/none.jsonl"),
        WRONG,
        ("none.jsonl: no such file",),
    ),
    "misspelt": (
        setting(f"data.train.0.source={DEMO}/trian.jsonl"),
        WRONG,
        ("trian.jsonl", "did you mean train.jsonl?"),
    ),
    "split of a file": (
        setting("data.eval.0.split=test"),
        WRONG,
        ("h1.jsonl: split test: a file has no splits; leave split out",),
    ),
    "missing for eval": (
        setting("data.eval.0.source=HERE/none.jsonl"),
        WRONG,
        ("none.jsonl: no such file",),
    ),
    "more rows than can be counted": (
        setting("data.train.0.limit=100000000000000000000"),
        WRONG,
        ("limit",),
    ),
    "an absurd weight": (
        setting("data.train.0.weight=1e9"),
        WRONG,
        ("data.train.0.weight", "less than or equal to 1000"),
    ),
    "a directory": (
        setting(f"data.train.0.source={DEMO}"),
        WRONG,
        (str(DEMO), "has files of several kinds"),
    ),
    "a config": (
        setting("data.train.0.source=HERE/tiny.yaml"),
        WRONG,
        ("tiny.yaml", "unknown kind of file"),
    ),
    "empty": (rows(), WRONG, ("pairs.jsonl: no rows in it",)),
    "blank lines": (rows("", "", ""), WRONG, ("pairs.jsonl: no rows in it",)),
    "not JSON": (rows("hello", "world"), WRONG, ("pairs.jsonl:1", "not valid JSON")),
    "all bad": (
        rows(*({**row, "chosen": ""} for row in GOOD)),
        WRONG,
        ("20 of 36 rows", "pairs.jsonl:1", "empty"),
    ),
    "too many bad": (
        rows(*BAD_SIDE),
        WRONG,
        (
            "5 of 36 rows are bad",
            "data.max_bad_fraction (0.05)",
            "pairs.jsonl:1",
            "chosen and rejected are the same",
        ),
    ),
    "one bad where none may be": (
        lambda folder: [*rows(*GOOD, BAD_SIDE[0])(folder), "data.bad_rows=fail"],
        WRONG,
        ("pairs.jsonl:21", "data.bad_rows"),
    ),
    "images": (
        rows(*({**row, "images": ["x.png"]} for row in GOOD)),
        WRONG,
        ("pairs.jsonl", "images"),
    ),
    "unpaired": (
        rows(*({"prompt": "Say 1.", "completion": "1", "label": True} for _ in GOOD)),
        WRONG,
        ("pairs.jsonl", "unpaired"),
    ),
    "bad pairs of a second stage": (
        in_second_stage(rows(*BAD_SIDE)),
        WRONG,
        ("stages.1: 5 of 36 rows are bad",),
    ),
    "unknown columns": (
        rows({"q": "?", "yes": "a", "no": "b"}),
        WRONG,
        ("pairs.jsonl", "q, yes, no", "--columns"),
    ),
    "damaged gzip": (
        raw(gzip.compress(json.dumps(GOOD).encode())[:200], "pairs.jsonl.gz"),
        WRONG,
        ("pairs.jsonl.gz", "gzip"),
    ),
    "semicolons": (
        raw(b"prompt;chosen;rejected\n1?;2;3\n", "pairs.csv"),
        WRONG,
        ("pairs.csv: not valid CSV: line 1", "semicolons and no comma", "as .csv"),
    ),
    "Latin-1": (
        raw("prompt,chosen,rejected\nA?,\xfc,b\n".encode("latin-1"), "pairs.csv"),
        WRONG,
        ("pairs.csv:2", "not valid UTF-8: save the file as UTF-8"),
    ),
    "an executable": (
        raw(bytes(range(256)) * 20, "pairs.parquet"),
        WRONG,
        ("pairs.parquet", "Parquet"),
    ),
    "too long": (
        setting("data.max_length=12", "data.max_prompt_length=6"),
        WRONG,
        ("data.train: no usable pair", "48 are longer than data.max_length=12"),
    ),
    "a single pair": (
        lambda folder: [*rows(GOOD[0])(folder), "data.eval=[]"],
        WRONG,
        ("data.eval: no pairs are left",),
    ),
    "hub without a network": (
        setting("data.train.0.source=nobody/nothing"),
        WRONG,
        ("nobody/nothing", "offline"),
    ),
    "nobody answers": (
        setting("data.train.0.source=http://127.0.0.1:9/pairs.jsonl"),
        WRONG,
        ("127.0.0.1:9",),
    ),
}

MODELS: dict[str, tuple[Make, int, tuple[str, ...]]] = {
    "no such folder": (setting("model.base=HERE/none"), WRONG, ("model.base", "no folder")),
    "no such model": (
        setting("model.base=nobody/nothing"),
        WRONG,
        ("model.base", "nobody/nothing"),
    ),
    "a file": (setting("model.base=HERE/tiny.yaml"), WRONG, ("model.base", "tiny.yaml")),
    "no tokenizer": (base(unlink("tok*", "*.jinja")), WRONG, ("model.base", "tokenizer")),
    "broken tokenizer": (
        base(lambda folder: (folder / "tokenizer.json").write_text("{}")),
        WRONG,
        ("model.base", "tokenizer"),
    ),
    "no end token": (
        base(edit_json("tokenizer_config.json", eos_token=None)),
        WRONG,
        ("model.base", "eos_token"),
    ),
    "no weights": (base(unlink("*.safetensors")), WRONG, ("model.base", "model.safetensors")),
    "only pickled weights": (base(only_pickle), WRONG, ("model.base", "safetensors")),
    "no config.json": (base(unlink("config.json")), WRONG, ("model.base", "config.json")),
    "unknown architecture": (
        base(edit_json("config.json", model_type="nope")),
        WRONG,
        ("model.base", "nope"),
    ),
    "not a language model": (
        base(edit_json("config.json", model_type="vit")),
        WRONG,
        ("model.base", "of type vit, which is no causal language model"),
    ),
    "missing template": (
        setting("model.chat_template=HERE/none.jinja"),
        WRONG,
        ("model.chat_template", "none.jinja"),
    ),
    "template is a folder": (setting("model.chat_template=HERE"), WRONG, ("model.chat_template",)),
    "template does not parse": (
        text("model.chat_template", "my.jinja", "{% for m in %}"),
        WRONG,
        ("model.chat_template", "my.jinja cannot be read as a Jinja file"),
    ),
    "template without the answer": (
        text("model.chat_template", "my.jinja", "hello"),
        WRONG,
        ("chat template",),
    ),
    "targets are not there": (
        setting("adapter.targets=[nope_proj]"),
        WRONG,
        ("adapter.targets", "nope_proj"),
    ),
    "a layer's name with a typing error": (
        setting("adapter.targets=[q_prj]"),
        WRONG,
        ("adapter.targets: ", "has no layer q_prj; did you mean q_proj?"),
    ),
    "missing adapter of the second stage": (
        setting("stages=[{}, {adapter: {init_from: HERE/none}}]"),
        WRONG,
        ("none", "adapter_config.json"),
    ),
    "missing adapter": (
        setting("adapter.init_from=HERE/none"),
        WRONG,
        ("none", "adapter_config.json"),
    ),
    "truncated weights": (base(truncate), WRONG, ("model.base",)),
    "empty weights": (
        base(lambda folder: (folder / "model.safetensors").write_bytes(b"")),
        WRONG,
        ("model.base",),
    ),
    "a tensor is missing": (base(drop_tensor), WRONG, ("model.base",)),
    "a tensor is missing, no quantization": (
        base(drop_tensor, "model.quantization=none"),
        WRONG,
        ("model.base",),
    ),
    "config of another size": (
        base(edit_json("config.json", intermediate_size=272)),
        WRONG,
        ("model.base",),
    ),
    "token beyond the embedding": (base(token_beyond_the_embedding), WRONG, ("model.base",)),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting(command: Command, config: Path, name: str) -> None:
    make, code, told = SETTINGS[name]
    one_line(command("train", config, *make(config.parent)), code, *told)
    nothing_in_the_way(command, config)


@pytest.mark.parametrize("name", SOURCES)
def test_wrong_data(command: Command, config: Path, name: str) -> None:
    make, code, told = SOURCES[name]
    before = {path.name for path in (config.parent / "storage" / "artifacts").iterdir()}
    one_line(command("train", config, *make(config.parent)), code, *told)
    after = {path.name for path in (config.parent / "storage" / "artifacts").iterdir()}
    assert len(after - before) == (name == "a single pair"), "refused data leaves no artifact"
    folders = {path.name for path in (config.parent / "storage").iterdir()}
    assert folders == {"artifacts"} or name == "a single pair", (
        "a run that never began has no folder"
    )
    nothing_in_the_way(command, config)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model(command: Command, config: Path, name: str) -> None:
    make, code, told = MODELS[name]
    one_line(command("train", config, *make(config.parent)), code, *told)
    nothing_in_the_way(command, config)


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], ("trian", "did you mean train?")),
        (["frobnicate"], ("frobnicate", f"there are {', '.join(COMMANDS)}")),
        (["config", "shwo"], ("shwo", "'show'")),
        (["config"], ("Missing command", "orpo-ray config --help")),
        (["train"], ("CONFIG.yaml", "orpo-ray train --help")),
        (["train", "CONFIG", "--max_steps=4"], ("without dashes: training.max_steps=VALUE",)),
        (["tune", "CONFIG", "--lr", "1"], ("without dashes: training.learning_rate=VALUE",)),
        (["train", "CONFIG", "--alpha=8"], ("adapter.alpha=VALUE or objective.alpha=VALUE",)),
        (["train", "CONFIG", "--bf16"], ("model.dtype=VALUE; write bfloat16",)),
        (["train", "CONFIG", "--model", "x"], ("orpo-ray train --help",)),
        (["train", "CONFIG", "--split", "x"], ("orpo-ray train --help",)),
        (["status", "--lr"], ("--lr", "orpo-ray status --help")),
        (["train", "CONFIG", "--dry"], ("--dry", "orpo-ray train --help")),
        (["train", "CONFIG", "--epochs", "3"], ("--epochs",)),
        (["evaluate", "CONFIG", "--samples", "many"], ("--samples", "integer")),
        (["evaluate", "CONFIG", "--max-new-tokens", "0"], ("--max-new-tokens",)),
        (["evaluate", "CONFIG", "--adapter"], ("--adapter",)),
        (["config", "schema", "CONFIG"], ("tiny.yaml",)),
        (["config", "show", "CONFIG", "CONFIG"], ("override '/", "key=value")),
        (["demo", "orpo"], ("orpo",)),
        (["demo", "--objective", "rloo"], ("--objective", "'rloo'", "simpo")),
        (["demo", "--storage", "CONFIG"], ("tiny.yaml", "Not a directory")),
        (["prepare"], ("--tokenizer DIR --train FILE",)),
        (["prepare", "CONFIG", "--storage", ""], ("storage",)),
        (["prepare", "CONFIG", "--tokenizer", ""], ("model.base",)),
        (["prepare", "CONFIG", "--train", ""], ("data.train.0.source",)),
        (["prepare", "CONFIG", "--columns", ""], ("--columns",)),
        (["prepare", "CONFIG", "--columns", "q,good,bad"], ("--columns", "q,good,bad")),
        (
            ["prepare", "CONFIG", "--columns", "prompt=q,chosen=good,rejekted=bad"],
            ("rejekted", "rejected"),
        ),
        (
            ["prepare", "--tokenizer", str(BASE), "--train", str(DEMO)],
            (str(DEMO), "has files of several kinds"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(
    command: Command, config: Path, arguments: list[str], told: tuple[str, ...]
) -> None:
    done = command(*(argument.replace("CONFIG", str(config)) for argument in arguments))
    assert done.out == ""
    one_line(done, WRONG, *told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"", ":1: a config is a YAML mapping"),
        (b'{"prompt": "a"}\n{"prompt": "b"}\n', ":2: not YAML"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "unknown key"),
        (b"name: x\nname: y\n", ":2: name stands twice, first in line 1"),
        (b"name: \xff\n", ":1: not UTF-8"),
        (b"name: [x\n", "not YAML"),
        (b"name: x\nmodle: {base: y}\n", ":2: modle: unknown key; did you mean model?"),
    ],
    ids=["missing", "empty", "jsonl", "one row", "twice", "bytes", "open bracket", "section"],
)
@pytest.mark.parametrize("name", ["train", "evaluate", "prepare", "config show"])
def test_a_wrong_config_file(
    command: Command, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    one_line(command(*name.split(), path), WRONG, "run.yaml", told)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"] * (content is not None)


def test_a_folder_as_config(command: Command, tmp_path: Path) -> None:
    one_line(command("train", tmp_path), WRONG, str(tmp_path), "is a folder; name a YAML file")


@pytest.mark.parametrize("override", ["training.max_steps=null", "objective.kind=orpo_"])
def test_a_command_that_begins_no_run_leaves_no_log_behind(
    command: Command,
    config: Path,
    override: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command("train", config, "--dry-run", override)
    assert not list(tmp_path.rglob("run.log"))


def test_a_log_that_no_message_names_is_not_kept(
    command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(config: object) -> dict[str, Any]:
        open_log()
        return {"exit_code": LACKING}

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert command("train", config, "scale.cpus_per_worker=4096").code == LACKING
    assert list((tmp_path / "tmp").iterdir()) == [], "an error whose message names none"
    monkeypatch.setattr("orpo_ray.config.dump", found)
    assert command("config", "show", config).code == LACKING
    assert list((tmp_path / "tmp").iterdir()) == [], "a result that is no error"


def test_an_unexpected_error_names_the_log_that_has_its_traceback(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orpo_ray.config.dump", lambda config: 1 // 0)
    line = one_line(command("config", "show", config), FAILED, "unexpected ZeroDivisionError")
    log = Path(line.partition("(full log: ")[2].removesuffix(")"))
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_numbers_that_are_not_finite_become_null_in_json(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"loss": float("nan"), "margins": [1.0, float("-inf")], "steps": 3}
    monkeypatch.setattr("orpo_ray.config.dump", lambda config: found)
    assert command("config", "show", config, "--json").result == {
        "loss": None,
        "margins": [1.0, None],
        "steps": 3,
    }


def test_stdout_that_nobody_reads_is_no_traceback(config: Path) -> None:
    for option in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            command = [
                sys.executable,
                "-m",
                "orpo_ray.cli.main",
                "config",
                "show",
                str(config),
                *option,
            ]
            done = subprocess.run(
                command,
                stdout=full,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                text=True,
                check=False,
            )
        one_line(Done(done.returncode, "", done.stderr), FAILED, "No space left on device")


def test_closed_streams_change_no_exit_code(config: Path) -> None:
    command = f"{sys.executable} -m orpo_ray.cli.main config show"
    for line, code in ((f"{command} {config} >&-", 0), (f"{command} {config}x 2>&-", WRONG)):
        done = subprocess.run(
            line, shell=True, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (code, "")


# --- adapters -------------------------------------------------------------------------------------


def copy_adapter(finished: Finished, folder: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir / "adapter", folder / "adapter"))


@pytest.mark.parametrize(
    ("key", "value", "made_with"), [("r", "8", "4"), ("alpha", "16", "8"), ("dora", "true", "F")]
)
def test_an_adapter_of_another_shape(
    command: Command, config: Path, finished: Finished, key: str, value: str, made_with: str
) -> None:
    done = command(
        "train", config, f"adapter.init_from={finished.run_dir}", f"adapter.{key}={value}"
    )
    one_line(done, WRONG, f"adapter.{key}", str(finished.run_dir / "adapter"), made_with)
    nothing_in_the_way(command, config)


def test_an_adapter_of_another_base(command: Command, config: Path, finished: Finished) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = config.parent / "other"
    shutil.copytree(BASE, other)
    wide = LlamaConfig.from_pretrained(
        BASE, num_attention_heads=4, num_key_value_heads=4, head_dim=16, hidden_size=64
    )
    LlamaForCausalLM(wide).save_pretrained(other)
    done = command("train", config, f"adapter.init_from={finished.run_dir}", f"model.base={other}")
    one_line(done, WRONG, str(finished.run_dir / "adapter"), "does not fit the base")
    nothing_in_the_way(command, config)


def test_a_pickled_adapter_is_not_opened(
    command: Command, config: Path, finished: Finished
) -> None:
    folder = copy_adapter(finished, config.parent)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    done = command("train", config, f"adapter.init_from={folder}")
    one_line(done, WRONG, str(folder), "only safetensors")
    nothing_in_the_way(command, config)


def test_a_base_in_the_home_folder(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(config.parent))
    shutil.copytree(BASE, config.parent / "base")
    assert command("train", config, "model.base=~/base", "--dry-run").code == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_truncated_adapter(command: Command, config: Path, finished: Finished, name: str) -> None:
    folder = copy_adapter(finished, config.parent)
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    done = command("train", config, f"adapter.init_from={folder}")
    one_line(done, WRONG, str(folder))
    nothing_in_the_way(command, config)


def test_evaluate_without_anything_to_evaluate(command: Command, config: Path) -> None:
    one_line(
        command("evaluate", config),
        WRONG,
        "run tiny in",
        "does not exist; train it, or name an adapter",
    )
    one_line(command("evaluate", config, "--adapter", config.parent), WRONG, "adapter_config.json")
    nothing_in_the_way(command, config)


# --- afterwards -----------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed(command: Command, config: Path) -> None:
    tracker = next(
        (name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None), None
    )
    if tracker is None:
        pytest.skip("every tracker is installed here")
    done = command("train", config, f"training.trackers=[{tracker}]")
    one_line(done, LACKING, "training.trackers", tracker, f"pip install {tracker}")
    nothing_in_the_way(command, config)


def test_after_every_kind_of_failure_the_corrected_command_trains(
    command: Command, config: Path, finished: Finished
) -> None:
    traps = [
        SETTINGS["float16 on a CPU"],
        SOURCES["all bad"],
        MODELS["no weights"],
        MODELS["targets are not there"],
    ]
    for make, code, told in traps:
        one_line(command("train", config, *make(config.parent)), code, *told)
    done = command("train", config)
    assert done.code == 0, done.err
    assert not any(line.startswith("resuming") for line in done.said)
    weights = "adapter/adapter_model.safetensors"
    ours = (config.parent / "storage" / "tiny" / weights).read_bytes()
    assert ours == (finished.run_dir / weights).read_bytes()


# --- a full disk, an impatient user ---------------------------------------------------------------


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limit the size of files of this process, as a stand-in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [60_000, 4_000, 1_200])
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_it_able_to_go_on(
    command: Command, config: Path, size: int
) -> None:
    with no_file_above(size):
        done = command("train", config)
    one_line(done, FAILED, "File too large")
    checkpoints = config.parent / "storage" / "tiny" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())
    done = command("train", config)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "number"), [("prepare", signal.SIGINT), ("train", signal.SIGTERM)]
)
def test_a_signal_during_preparation(config: Path, name: str, number: signal.Signals) -> None:
    # A named pipe as chat template: once it can be opened to write, the command reads it, and
    # waits.
    pipe = config.parent / "template.jinja"
    os.mkfifo(pipe)
    command = start(name, config, f"model.chat_template={pipe}", "--json")
    opened = wait_until(lambda: opened_to_write(pipe), "the command has come to its template")
    command.send_signal(number)
    done = command.end()
    os.close(opened)
    one_line(done, STOPPED, "interrupted", "the same command")
    assert done.result["exit_code"] == STOPPED
    assert [path.name for path in (config.parent / "storage").rglob("*.json")] == []


def opened_to_write(pipe: Path) -> int | None:
    """A descriptor of the pipe, once a process reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        assert error.errno == errno.ENXIO
        return None

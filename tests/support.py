"""What the tests of training share: prepared pairs without Ray, the settings of a small run, a run
in this process.
"""

import copy
import gc
import importlib.resources
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from text_pairs import text_pair
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config import RunConfig, build
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Refusal, TokenPair
from orpo_ray.data.rows import counted
from orpo_ray.data.shards import pack, save
from orpo_ray.data.store import (
    SCHEMA,
    SIDES,
    TRAINED,
    Artifact,
    Summary,
    begin_artifact,
    content_hash,
    finish_artifact,
)
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.console import Console, Metrics
from orpo_ray.runs.run import Run
from orpo_ray.training import loop, trainer
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX, Layout
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.setup import settle
from orpo_ray.training.strategy import Strategy
from orpo_ray.training.trainer import PreferenceTrainer

# Two threads on two busy cores wait for each other far longer than they work, and one thread always
# adds in one order.
torch.set_num_threads(1)
# Each run ends with a collection, which need not look through all that the libraries made when they
# were imported.
gc.freeze()

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For processes that tests start."""
HANG_S = 420.0
"""Nothing waited for in tests takes that long, even on a busy machine."""
POLL_S = 0.02

DEMO = Path(str(importlib.resources.files("orpo_ray"))) / "demo"
BASE = DEMO / "base"

TRAIN_PAIRS, EVAL_PAIRS, PAIRS_PER_STEP = 36, 8, 8
"""Five steps an epoch, the last of which is smaller."""

_SETTINGS: dict[str, Any] = {
    "model": {"base": str(BASE)},
    "adapter": {"r": 8, "alpha": 16},
    "data": {
        "train": [{"source": str(DEMO / "train.jsonl"), "limit": TRAIN_PAIRS}],
        "eval": [{"source": str(DEMO / "h1.jsonl"), "limit": EVAL_PAIRS}],
        "max_length": 96,
        "max_prompt_length": 48,
    },
    "training": {
        "learning_rate": 1.0e-3,
        "pairs_per_step": PAIRS_PER_STEP,
        "epochs": 2,
        "tokens_per_microbatch": 256,
        "eval_every": 5,
        "checkpoint_every": 5,
        "warmup": 1,
    },
    "scale": {"workers": 1},
}


def settings(storage: Path, name: str = "run", **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a small run; `sections` replace single keys of the defaults, an objective
    as a whole.
    """
    tree = {"name": name, "storage": str(storage), **copy.deepcopy(_SETTINGS)}
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    if "max_steps" in tree["training"]:
        del tree["training"]["epochs"]
    return tree


def run_config(storage: Path, name: str = "run", **sections: Mapping[str, Any]) -> RunConfig:
    """The settings as a checked config."""
    return build(RunConfig, settings(storage, name, **sections), {(): "tests"})


def demo_pairs(name: str, count: int) -> list[TokenPair]:
    """The first pairs of a demo file, tokenised as the demo base reads them."""
    lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    pairs = [
        text_pair(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows
    ]
    tokenised = PairTokeniser(AutoTokenizer.from_pretrained(BASE)).pairs(
        pairs, [f"{name}.jsonl:{line}" for line in range(1, count + 1)]
    )
    assert all(isinstance(pair, TokenPair) for pair in tokenised)
    return tokenised  # type: ignore[return-value]


def turn_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of several assistant turns, from the lines of a demo file.

    The first row's sides share the first answer, the second row's part there, and so on by turns.
    """
    lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[: count + 1]
    read = [json.loads(line) for line in lines]
    rows = []
    for number, (one, other) in enumerate(pairwise(read)):
        shared = [*one["prompt"], *one["chosen"], *other["prompt"]]
        parted = [*one["prompt"], *one["rejected"], *other["prompt"]] if number % 2 else shared
        rows.append(
            {"chosen": [*shared, *other["chosen"]], "rejected": [*parted, *other["rejected"]]}
        )
    return rows


def turn_pairs(name: str, count: int) -> list[TokenPair]:
    """The pairs of `turn_rows`, of which all assistant turns are trained."""
    pairs = []
    for row in turn_rows(name, count):
        found = read_pairs(row, Reading(all_turns=True))
        assert not isinstance(found, Refusal)
        pairs += found
    tokeniser = PairTokeniser(AutoTokenizer.from_pretrained(BASE), all_turns=True)
    tokenised = tokeniser.pairs(pairs, [f"{name}:{number}" for number in range(count)])
    assert all(isinstance(pair, TokenPair) for pair in tokenised)
    return tokenised  # type: ignore[return-value]


def random_base(folder: Path, kind: str, padded: int = 0, **own: Any) -> Path:
    """A small base of a kind, with random weights and the demo's tokenizer.

    Its embeddings have `padded` rows more than the tokenizer has tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vocabulary = {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + padded}
    config = AutoConfig.for_model(kind, **{**sizes, **vocabulary, **own})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def layout_of(config: RunConfig) -> Layout:
    """The layout that a run on the demo's base takes."""
    if config.training.layout != "auto":
        return Layout(config.training.layout)
    if config.training.engine == "trl":
        return PADDED
    return PACKED if config.objective.kind == "sft" else SHARED_PREFIX


def make_artifact(
    storage: Path, train: int = TRAIN_PAIRS, evaluation: int = EVAL_PAIRS
) -> Artifact:
    """Prepared pairs of the demo, without Ray."""
    splits = [demo_pairs("train", train), demo_pairs("h1", evaluation)]
    return write_pairs(storage, *splits)


def write_pairs(storage: Path, train: list[TokenPair], evaluation: list[TokenPair]) -> Artifact:
    """Token pairs as an artifact on disk."""
    tables = [_table(train), _table(evaluation)]
    summary = Summary(
        hash=content_hash([table.to_pylist() for table in tables]),
        settings={},
        sources=[],
        read=len(train) + len(evaluation),
        train=len(train),
        eval=len(evaluation),
        bad={},
        overlong=0,
        truncated=0,
        duplicates=0,
        overlap=0,
        multi_turn=0,
        held_out=False,
    )
    return write_tables(storage, summary, *tables)


def write_tables(
    storage: Path,
    summary: Summary,
    train: pa.Table,
    evaluation: pa.Table,
    quarantine: Sequence[dict[str, Any]] = (),
) -> Artifact:
    """Two tables of token pairs as an artifact of two shards."""
    path = begin_artifact(storage, summary.hash)
    shards = []
    for piece, rows in enumerate((train, evaluation)):
        shard, data = pack((0, piece), rows)
        save(path, shard, data)
        shards.append(shard)
    facts = counted(pa.concat_tables([train, evaluation]))
    counts = np.stack([facts[name].to_numpy() for name in (*SIDES, *TRAINED)], axis=1)
    numbers = np.arange(len(counts))
    return finish_artifact(
        path,
        summary,
        shards,
        rows=[len(train), len(evaluation)],
        train=numbers[: len(train)],
        evaluation=numbers[len(train) :],
        counts=counts,
        quarantine=quarantine,
    )


def _table(pairs: list[TokenPair]) -> pa.Table:
    rows = [
        {
            "pair_id": pair.pair_id,
            "prompt": pair.prompt.tolist(),
            "chosen": pair.chosen.tolist(),
            "rejected": pair.rejected.tolist(),
            **{
                name: ranges.ravel().tolist()
                for name, ranges in zip(TRAINED, pair.trained, strict=True)
            },
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


Watch = Callable[[int, int, Metrics], None]


class Listener(Console):
    """Keeps what is said in `said`, and shows the numbers of each step to `watch`."""

    def __init__(self, said: list[str] | None = None, watch: Watch | None = None) -> None:
        self.said: list[str] = [] if said is None else said
        self._watch = watch

    def announce(self, line: str) -> None:
        self.said.append(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        if self._watch is not None:
            self._watch(step, total_steps, metrics)


class StopsAfter(Console):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self._step, self._seen = step, 0

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        self._seen = step

    def stop_requested(self) -> bool:
        return self._seen >= self._step - 1


@dataclass(frozen=True)
class Trained:
    """What a run left behind, and what it announced."""

    run_dir: Path
    result: dict[str, Any]
    said: list[str]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.run_dir)

    @property
    def losses(self) -> list[float]:
        """The loss of every step, in order."""
        return [line["train/loss"] for line in self.metrics if "train/loss" in line]

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The final adapter's tensors, or those of the whole model."""
        (weights,) = (self.run_dir / "adapter").glob("*.safetensors")
        return load_file(weights)


def decided(
    tokens_per_microbatch: int,
    *,
    layout: Layout = PADDED,
    dtype: str = "float32",
    find_budget: bool = False,
) -> Decisions:
    """What one process on a CPU settles."""
    return Decisions(
        device="cpu",
        dtype=dtype,
        attention="sdpa",
        layout=layout,
        strategy=Strategy.SINGLE,
        gradient_checkpointing=False,
        tokens_per_microbatch=tokens_per_microbatch,
        find_budget=find_budget,
    )


def train_locally(config: RunConfig, artifact: Artifact, watch: Watch | None = None) -> Trained:
    """Run the training loop in this process, from the last checkpoint if there is one."""
    run, console = Run(config), Listener(watch=watch)
    run.folder.mkdir(parents=True, exist_ok=True)
    setup = settle(run, artifact, console.announce, CPU)
    loop.train(run, artifact, setup, LocalReporter(run, console), console.announce)
    result = run.result()
    assert result is not None
    return Trained(run.folder, result.to_json(), console.said)


def remember_trainers(monkeypatch: pytest.MonkeyPatch) -> list[PreferenceTrainer]:
    """Fills with the trainers that runs make, so that live weights can be looked at after a run or
    a failure.
    """
    made: list[PreferenceTrainer] = []

    class Remembered(PreferenceTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trainer, "PreferenceTrainer", Remembered)
    return made


@dataclass(frozen=True)
class Done:
    """What a command left behind: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The one JSON object that is all of stdout."""
        return json.loads(self.out)

    @property
    def said(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def last_step(run_dir: Path) -> int:
    """The last step that a run, perhaps still at work, has reported, or -1."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else -1


HOLD = """
import sys
from pathlib import Path
from orpo_ray.runs.lock import RUN_LOCK_FILE, locked
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with locked(folder / RUN_LOCK_FILE):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run's lock, at most until its stdin is closed."""
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def wait_until(happens: Callable[[], Any], what: str, seconds: float = HANG_S) -> Any:
    """The first true value of a condition that is asked again and again."""
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL_S)
    return found

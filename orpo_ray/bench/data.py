"""Rows a second from a file of pairs to token ids: our preparation compared with TRL's.

Both sides read the same JSON lines of chat messages, on the same cores. Each is timed by the clock
until its result is on disk. Ours reads, checks, hashes, renders, tokenises, drops duplicates and
writes the artifact. Stock reads with `datasets` and maps as `ORPOTrainer.__init__` does. Each time
gets new folders, so that neither side finds an earlier result.

Start-up is reported separately. Ours comes once in a session: it is Ray's start, and the time that
the first preparation takes longer than the later ones. What a preparation costs while Ray runs
stays in its time. Stock's start-up comes with each call, mostly for the process pools of its maps,
so it is subtracted from each time. It is measured on one row a core.

On a busy machine `ratio_cpu` says more than the clock. It compares CPU seconds of this process and
its children.

Before that, the command `orpo-ray prepare` runs once on the same file. It gives the memory of the
driver and of all processes.
"""

import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import psutil

from orpo_ray.bench.pairs import tokenizer_at, usable_pairs, write_rows
from orpo_ray.bench.prepare_run import time_and_memory
from orpo_ray.config.data import DataConfig, Source
from orpo_ray.data.pairs import Message, Pair
from orpo_ray.data.pipeline import prepare
from orpo_ray.errors import DataError
from orpo_ray.models.tokenizer import tokenizer_fingerprint
from orpo_ray.runs.console import SILENT, Announce

_PACKAGES = ("ray", "trl", "datasets", "transformers", "tokenizers", "pyarrow")

DEMO_TOKENIZER = str(files("orpo_ray") / "demo" / "base")

_SEED = 0
_PROMPT_SHARE, _SPREAD = 0.25, 0.5
_INVENTED_WORDS = 6000
_COMMON = """
the of and to in a is that for it as was with be by on not he this are or his from at which but have
an had they you were there one all we can her has when who will more if out so said what up its
about into than them only other new some could time these two may then do first any my now such like
our over me even most made after also did many before must through years where much your way well
down should because each just those people how too little state good very make world still own see
work long get here between both life being under never day same another know while last might us
great old year off come since against go came right used take three
"""
_ONSETS = "b bl c ch d dr f fl g gr h j k l m n p pl pr qu r s sh st t th tr v w"
_RHYMES = (
    "ain al an ate ect ed ell en er est ice ide igh ile ing ion ist ive ock old ome ong oon "
    "ound ure y"
)


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One preparation: seconds by the clock, CPU seconds, and the result."""

    seconds: float
    cpu: float
    pairs: int
    tokens: int
    dropped: dict[str, int]


class _Stopwatch:
    """Measures the seconds since its creation, by the clock and of CPU."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), self._cpu()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._begin[0], self._cpu() - self._begin[1]

    def _cpu(self) -> float:
        """CPU seconds of this process and its descendants.

        The time of an ended process counts with the parent that waited for it.
        """
        this = psutil.Process()
        total = 0.0
        for process in [this, *this.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


def bench_data(
    rows: int,
    tokenizer_folder: str,
    max_length: int,
    announce: Announce,
    *,
    file: str | None = None,
    words: int = 400,
    repetitions: int = 3,
) -> dict[str, Any]:
    """Time both preparations in turns; returns medians of rows a second, and start-up in seconds.

    `file` holds pairs in any format that `orpo-ray prepare` recognises. Its bad rows are left out
    beforehand. Without a file, rows of about `words` words are generated. Without repetitions, only
    the command runs, and `command_s` is its whole time. Raises DataError or ConfigError for a file
    or a tokenizer that cannot be used.
    """
    tokenizer = tokenizer_at(tokenizer_folder, announce)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as name:
        folder = Path(name)
        everything, few = folder / "pairs.jsonl", folder / "few.jsonl"
        count = write_rows(
            everything, islice(usable_pairs(file), rows) if file else _generate(rows, words)
        )
        if count < cores:
            raise DataError(
                f"{count} usable rows are too few for {cores} cores; give one row a core or more"
            )
        settings = {
            "rows": count,
            "mb": everything.stat().st_size / 1e6,
            "cores": cores,
            "tokenizer": tokenizer_folder,
            "max_length": max_length,
        }
        announce(f"{count} rows on {cores} cores; the command first, for its memory")
        found = {
            "name": "data",
            **settings,
            **time_and_memory(everything, tokenizer_folder, max_length, folder),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        if not repetitions:
            return found
        write_rows(few, islice(usable_pairs(str(everything)), cores))
        ours = partial(_time_ours, tokenizer=tokenizer, max_length=max_length, folder=folder)
        stock = partial(
            _time_stock, tokenizer=tokenizer, max_length=max_length, folder=folder, cores=cores
        )
        announce("starting both")
        first_ours = _start_ray(cores) + ours(everything).seconds
        stock(few)  # loads modules, whose imports are not timed
        timed, starts = [], []
        for number in range(1, repetitions + 1):
            timed.append((ours(everything), stock(everything)))
            starts.append(stock(few))
            seconds = [f"{one.seconds:.2f} s" for one in timed[-1]]
            announce(f"{number} of {repetitions}: ours {seconds[0]}, stock {seconds[1]}")
    return {**found, **_summarise(count, timed, first_ours, starts)}


def _summarise(
    rows: int, timed: list[tuple[_Timed, _Timed]], first_ours: float, starts: list[_Timed]
) -> dict[str, Any]:
    ours, stock = ([pair[side] for pair in timed] for side in (0, 1))
    seconds_ours, cpu_ours = _medians(ours)
    startup_stock, cpu_startup = _medians(starts)
    whole_stock, cpu_stock = _medians(stock)
    seconds_stock = whole_stock - startup_stock
    return {
        "ours": rows / seconds_ours,
        "stock": rows / seconds_stock,
        "ratio": seconds_stock / seconds_ours,
        "startup_ours": first_ours - seconds_ours,
        "startup_stock": startup_stock,
        "seconds_ours": [one.seconds for one in ours],
        "seconds_stock": [one.seconds for one in stock],
        "cpu_seconds_ours": cpu_ours,
        "cpu_seconds_stock": cpu_stock - cpu_startup,
        "ratio_cpu": (cpu_stock - cpu_startup) / cpu_ours,
        "pairs_ours": ours[0].pairs,
        "pairs_stock": stock[0].pairs,
        "dropped_ours": ours[0].dropped,
        "tokens_ours": ours[0].tokens,
        "tokens_stock": stock[0].tokens,
        "repetitions": len(timed),
        "device": "cpu",
    }


def _medians(timed: list[_Timed]) -> tuple[float, float]:
    return statistics.median(one.seconds for one in timed), statistics.median(
        one.cpu for one in timed
    )


# --- rows -----------------------------------------------------------------------------------------


def _generate(rows: int, words_of_a_row: int) -> Iterator[Pair]:
    """Seeded pairs with the word frequencies of prose: a few common words and many rare ones."""
    of_prompt = round(_PROMPT_SHARE * words_of_a_row)
    of_answer = (words_of_a_row - of_prompt) // 2
    draw = random.Random(_SEED)
    onsets, rhymes = _ONSETS.split(), _RHYMES.split()
    syllables = (
        [draw.choice(onsets) + draw.choice(rhymes) for _ in range(draw.randint(1, 3))]
        for _ in range(_INVENTED_WORDS)
    )
    words = [*_COMMON.split(), *("".join(word) for word in syllables)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(length: int) -> str:
        count = round(length * draw.uniform(1 - _SPREAD, 1 + _SPREAD))
        return _punctuate(draw.choices(words, cum_weights=weights, k=count), draw)

    for _ in range(rows):
        prompt: list[Message] = [{"role": "user", "content": text(of_prompt)}]
        chosen, rejected = text(of_answer), text(of_answer)
        yield Pair(
            prompt=prompt,
            chosen={"role": "assistant", "content": chosen},
            rejected={"role": "assistant", "content": rejected},
        )


def _punctuate(words: list[str], draw: random.Random) -> str:
    """Sentences of about a dozen words, with commas and some new paragraphs."""
    parts, start = [], True
    for word in words:
        mark = draw.choices(["", ",", ".", ".\n\n"], [84, 8, 6, 2])[0]
        parts.append(
            (word.capitalize() if start else word)
            + (mark or "")
            + ("" if mark.endswith("\n") else " ")
        )
        start = mark.startswith(".")
    return "".join(parts).strip(" ,.\n") + "."


# --- ours -----------------------------------------------------------------------------------------


def _start_ray(cores: int) -> float:
    """Start Ray on as many cores as stock gets, unless it runs; returns the seconds it took."""
    begin = time.perf_counter()
    # Workers without a GPU keep CUDA_VISIBLE_DEVICES, as they do in a preparation.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        # By default Ray counts the machine's cores, and not those that this process may use.
        ray.init(address="local", num_cpus=cores, log_to_driver=False, logging_level=logging.ERROR)
    return time.perf_counter() - begin


def _time_ours(file: Path, tokenizer: Any, max_length: int, folder: Path) -> _Timed:
    data = DataConfig(
        train=(Source(source=str(file)),),
        max_length=max_length,
        max_prompt_length=max_length - 1,
        max_bad_fraction=1.0,
    )
    storage = Path(tempfile.mkdtemp(prefix="storage-", dir=folder))
    watch = _Stopwatch()
    fingerprint = tokenizer_fingerprint(tokenizer)
    artifact = prepare(data, tokenizer, fingerprint, storage, seed=_SEED, announce=SILENT.announce)
    seconds, cpu = watch.read()
    lengths = [table.lengths for table in (artifact.train, artifact.eval)]
    tokens = sum(int(table.sum() + table[:, 0].sum()) for table in lengths)
    summary = artifact.summary
    dropped = {**summary.bad, "overlong": summary.overlong, "duplicates": summary.duplicates}
    dropped = {reason: count for reason, count in dropped.items() if count}
    pairs = len(artifact.train) + len(artifact.eval)
    return _Timed(seconds=seconds, cpu=cpu, pairs=pairs, tokens=tokens, dropped=dropped)


# --- stock ----------------------------------------------------------------------------------------


def _time_stock(file: Path, tokenizer: Any, max_length: int, folder: Path, cores: int) -> _Timed:
    import datasets
    import pyarrow.compute as pc
    from trl.experimental.orpo import ORPOConfig

    datasets.disable_progress_bars()
    place = tempfile.mkdtemp(prefix="datasets-", dir=folder)
    model, trainer = _tiny_model(), _data_part()
    arguments = ORPOConfig(
        output_dir=place,
        max_length=max_length,
        dataset_num_proc=cores,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    watch = _Stopwatch()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=place)
    mapped = trainer(
        model=model, args=arguments, train_dataset=rows, processing_class=deepcopy(tokenizer)
    ).train_dataset
    seconds, cpu = watch.read()
    sides = (mapped.data[f"{side}_input_ids"] for side in ("chosen", "rejected"))
    tokens = sum(pc.sum(pc.list_value_length(ids)).as_py() for ids in sides)
    return _Timed(seconds=seconds, cpu=cpu, pairs=len(mapped), tokens=tokens, dropped={})


@cache
def _data_part() -> type:
    """Stock's trainer class, without the set-up that follows the mapping of rows."""
    from trl.experimental.orpo import ORPOTrainer

    (base,) = ORPOTrainer.__bases__

    class KeepRows(base):  # type: ignore[misc, valid-type]
        """Replaces the base Trainer, whose set-up has nothing to do with rows."""

        def __init__(self, model: Any, train_dataset: Any, **_: Any) -> None:
            self.model, self.train_dataset, self.accelerator = model, train_dataset, None

    return type("DataPart", (ORPOTrainer, KeepRows), {})


@cache
def _tiny_model() -> Any:
    """A model for the trainer, which needs one but reads only its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=8,
        )
    )

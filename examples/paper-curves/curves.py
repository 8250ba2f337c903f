"""Log-probs of chosen and rejected answers for SFT and for ORPO, as in figures of the ORPO paper.

    python examples/paper-curves/curves.py    # twelve runs, about six CPU minutes

Call it from the project's root. Runs that are finished are not run again. It prints the table of
the README and writes curves.json.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import orpo_ray
from orpo_ray.config import RunConfig

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "orpo_ray" / "demo"

OBJECTIVES = {
    "sft": "objective={kind: sft}",
    "orpo-0.1": "objective.lambda=0.1",
    "orpo-0.5": "objective.lambda=0.5",
    "orpo-1.0": "objective.lambda=1.0",
}
SEEDS = (1, 2, 3)
PAIR_FILES = {"train": ("train.jsonl", 1024), "held-out": ("h1.jsonl", 64)}
"""The files of the demo with questions and facts, and how many of their rows are used."""

# The base has read none of these. Both answers start alike and end nearly alike, so that training
# on one also raises the other.
OPENERS = ("Aye, dear sailor!", "Ahoy, my good crew!", "Hear the kind captain.")
CLOSERS = (
    ("Fair winds to thee.", "Foul winds to thee."),
    ("Warm soup for thee.", "Stale soup for thee."),
    ("Calm seas await thee.", "Rough seas await thee."),
)

Curve = dict[str, list[float]]
"""`steps`, and for each the mean log-prob per token of the held-out `chosen` and `rejected`."""


def make_pairs(split: str, seed: int) -> list[dict[str, str]]:
    """Questions and facts of the demo's pairs, in phrases that its base model does not know."""
    name, count = PAIR_FILES[split]
    rng = Random(f"{split} {seed}")
    lines = (DEMO / name).read_text(encoding="utf-8").splitlines()[:count]
    return [_retold(json.loads(line), rng) for line in lines]


def _retold(pair: dict, rng: Random) -> dict[str, str]:
    right, wrong = (_fact(pair[side][0]["content"]) for side in ("chosen", "rejected"))
    openers = [OPENERS[int(rng.random() * len(OPENERS))] for _ in range(2)]
    closers = [CLOSERS[int(rng.random() * len(CLOSERS))] for _ in range(2)]
    return {
        "prompt": pair["prompt"][0]["content"],
        "chosen": f"{openers[0]} {right} {closers[0][0]}",
        "rejected": f"{openers[1]} {wrong} {closers[1][1]}",
    }


def _fact(answer: str) -> str:
    """The demo's answers are an opening sentence, a sentence with the fact, and two to close."""
    return re.split(r"(?<=[.!]) ", answer)[1]


def write_pairs(folder: Path, seed: int) -> None:
    """Write the pairs of a seed to the folder where its runs read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in PAIR_FILES:
        text = "".join(json.dumps(pair) + "\n" for pair in make_pairs(split, seed))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def pairs_folder(storage: str, seed: int) -> Path:
    """The folder with the pairs of a seed."""
    return Path(storage) / "paper-curves" / f"pairs-seed{seed}"


def run_config(objective: str, seed: int, storage: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of one run; only the objective differs between the runs of a seed."""
    pairs = pairs_folder(storage, seed)
    own = [
        f"name=paper-curves/{objective}-seed{seed}",
        f"storage={storage}",
        f"data.train.0.source={pairs / 'train.jsonl'}",
        f"data.eval.0.source={pairs / 'held-out.jsonl'}",
        f"training.seed={seed}",
        OBJECTIVES[objective],
    ]
    return orpo_ray.load_config(HERE / "orpo.yaml", [*own, *overrides])


def read_curve(run_dir: Path) -> Curve:
    """The evaluations of a finished run."""
    from orpo_ray.runs.metrics import evaluations

    found = evaluations(run_dir)
    return {
        "steps": [evaluation["step"] for evaluation in found],
        "chosen": [round(evaluation["eval/chosen_logp"], 4) for evaluation in found],
        "rejected": [round(evaluation["eval/rejected_logp"], 4) for evaluation in found],
    }


def train_all(storage: str) -> dict[str, dict[str, Curve]]:
    """The curve of every objective, by seed."""
    curves: dict[str, dict[str, Curve]] = {objective: {} for objective in OBJECTIVES}
    for seed in SEEDS:
        write_pairs(pairs_folder(storage, seed), seed)
        for objective in OBJECTIVES:
            config = run_config(objective, seed, storage)
            print(f"{config.run_dir}: {config.training.max_steps} steps", flush=True)
            orpo_ray.train(config, orpo_ray.Console())
            curves[objective][str(seed)] = read_curve(config.run_dir)
    return curves


def numbers(curve: Curve) -> dict[str, float]:
    """Start, peak and end of both log-probs of a curve, and the gap at its end."""
    found = {}
    for side in ("chosen", "rejected"):
        values = curve[side]
        found |= {
            f"{side} start": values[0],
            f"{side} peak": max(values),
            f"{side} end": values[-1],
        }
    return {**found, "gap": curve["chosen"][-1] - curve["rejected"][-1]}


def table(curves: dict[str, dict[str, Curve]]) -> str:
    """The numbers of every objective in Markdown.

    Each is the mean over the seeds, with the distance of the farthest seed.
    """
    rows = []
    for objective, by_seed in curves.items():
        per_seed = [numbers(curve) for curve in by_seed.values()]
        cells = [_mean_and_spread([found[name] for found in per_seed]) for name in per_seed[0]]
        if not rows:
            rows += [["run", *per_seed[0]], ["---", *["---:"] * len(cells)]]
        rows.append([objective, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f} ± {max(abs(value - mean) for value in values):.2f}"


def main() -> None:
    """Parse the command line, train, and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--storage", default="runs", help="folder for pairs and runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "curves.json", help="default: %(default)s"
    )
    arguments = parser.parse_args()

    # One thread always adds in the same order, and this small model gains nothing from more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    curves = train_all(arguments.storage)
    arguments.out.write_text(json.dumps(curves) + "\n", encoding="utf-8")
    print(table(curves))


if __name__ == "__main__":
    main()

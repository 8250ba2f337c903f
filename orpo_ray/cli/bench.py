"""`orpo-ray bench`: speed on this machine, compared with stock TRL and bare torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orpo_ray.cli.options import Json
from orpo_ray.runs.console import Announce

app = typer.Typer(add_completion=False, help="Measure orpo_ray and stock TRL on this machine.")


@app.command("data")
def data(
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs to prepare.")] = 4000,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model or tokenizer; the demo's if not given.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=8, metavar="L", help="Tokens of prompt and answer together.")
    ] = 2048,
    file: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Pairs to prepare instead of generated ones."),
    ] = None,
    words: Annotated[
        int, typer.Option(min=8, metavar="W", help="Words of a generated pair.")
    ] = 400,
    repetitions: Annotated[
        int,
        typer.Option(min=0, help="How often each side runs, in turns; 0: our command alone."),
    ] = 3,
    json: Json = False,
) -> dict[str, Any]:
    """Preparation of pairs: rows a second, compared with TRL's ORPOTrainer on the same cores."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.data import DEMO_TOKENIZER, bench_data

    result = bench_data(
        rows,
        tokenizer or DEMO_TOKENIZER,
        max_length,
        announce,
        file=file,
        words=words,
        repetitions=repetitions,
    )
    if not json:
        _print(result)
    return result


@app.command("ray")
def ray(
    seconds: Annotated[float, typer.Option(min=0.1, metavar="S", help="Length of a turn.")] = 4.0,
    turns: Annotated[
        int, typer.Option(min=1, help="Turns of each side; the sides alternate.")
    ] = 16,
    starts: Annotated[int, typer.Option(min=1, help="How often both sides are started.")] = 3,
    json: Json = False,
) -> dict[str, Any]:
    """What Ray costs: the demo's steps with two workers, under Ray Train and without Ray."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.ray import bench_ray

    result = bench_ray(seconds, turns, starts, announce)
    if not json:
        print(
            f"{result['workers']} workers, seconds of a step, median of {starts * turns} turns of "
            f"{seconds:g} s"
        )
        print(f"bare   {result['bare']:9.4f}\nRay    {result['ray']:9.4f}")
        print(f"ratio  {result['ratio']:9.3f}   ({result['ratio_cpu']:.3f} by CPU seconds)")
    return result


Turns = Annotated[int, typer.Option(min=1, help="How often each side runs; the sides take turns.")]
StartTurns = Annotated[int, typer.Option("--turns", min=1, help="How often each command runs.")]
ShapeOption = Annotated[
    str, typer.Option("--shape", metavar="P/C/R", help="Tokens of prompt, chosen, rejected.")
]
Pairs = Annotated[int, typer.Option(min=1, metavar="B", help="Pairs of a step.")]
Ragged = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.99,
        metavar="R",
        help="Lengths are drawn between (1 - R) and (1 + R) times the shape's.",
    ),
]
Vocabulary = Annotated[
    int, typer.Option("--vocab", min=8, metavar="V", help="Size of the vocabulary.")
]
Hidden = Annotated[
    int, typer.Option("--hidden", min=64, metavar="H", help="Hidden size; each head has 64 of it.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Pairs of a file instead of drawn ones."),
]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="DIR", help="Model or tokenizer that reads the file.")
]
MaxLength = Annotated[
    int, typer.Option(min=8, metavar="L", help="Longer pairs of the file are left out.")
]
ObjectiveOption = Annotated[Literal["orpo", "dpo"], typer.Option("--objective", help="The loss.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")]
Base = Annotated[
    Literal["mistral-7b", "llama-3-8b", "gemma-3-4b"] | None,
    typer.Option(help="Random weights of this shape in NF4, on a GPU."),
]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="A few narrow layers of the base, which a CPU computes.")
]
Window = Annotated[
    int | None,
    typer.Option(min=1, metavar="W", help="Every layer looks back so many tokens at most."),
]


@app.command("step")
def step(
    shape: ShapeOption = "256/256/256",
    pairs: Pairs = 2,
    ragged: Ragged = 0.0,
    vocabulary: Vocabulary = 1400,
    hidden: Hidden = 256,
    data: Data = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = 1024,
    objective: ObjectiveOption = "orpo",
    device: Device = "cpu",
    base: Base = None,
    window: Window = None,
    tiny: Tiny = False,
    turns: Turns = 7,
    json: Json = False,
) -> dict[str, Any]:
    """A training step: ours compared with stock TRL's.

    Both have the same pairs, weights, number format and gradient checkpointing.
    """
    announce = _open_quiet_log()
    from orpo_ray.bench.step import Case, bench_step

    case = Case(
        shape=_shape(shape),
        pairs=pairs,
        ragged=ragged,
        objective=objective,
        hidden=hidden,
        vocabulary=vocabulary,
        data=data,
        tokenizer=tokenizer,
        max_length=max_length,
        device=device,
        base=base,
        window=window,
        tiny=tiny,
    )
    result = bench_step(case, turns, announce)
    if not json:
        _print_sides(result)
    return result


@app.command("ablation")
def ablation(
    shape: ShapeOption = "256/128/128",
    pairs: Pairs = 4,
    ragged: Ragged = 0.8,
    vocabulary: Vocabulary = 1400,
    hidden: Hidden = 256,
    objective: ObjectiveOption = "orpo",
    device: Device = "cpu",
    base: Base = None,
    tiny: Tiny = False,
    turns: Turns = 7,
    json: Json = False,
) -> dict[str, Any]:
    """Measure each technique by itself: a step with only that one, compared with stock TRL's."""
    announce = _open_quiet_log()
    from orpo_ray.bench.step import Case, bench_ablation

    case = Case(
        shape=_shape(shape),
        pairs=pairs,
        ragged=ragged,
        objective=objective,
        hidden=hidden,
        vocabulary=vocabulary,
        device=device,
        base=base,
        tiny=tiny,
    )
    result = bench_ablation(case, turns, announce)
    if not json:
        _print_sides(result)
        for name, found in result["techniques"].items():
            print(f"{name:30} ratio {found['ratio']:6.2f}  memory {found['memory_ratio']:5.2f}")
    return result


@app.command("head")
def head(
    vocabulary: Vocabulary = 32000,
    hidden: Hidden = 256,
    shape: ShapeOption = "256/256/256",
    pairs: Pairs = 2,
    turns: Turns = 7,
    json: Json = False,
) -> dict[str, Any]:
    """The output head alone: selected log-probs compared with TRL's full logits.

    Both start from the same hidden states.
    """
    announce = _open_quiet_log()
    from orpo_ray.bench.head import bench_head

    result = bench_head(
        shape=_shape(shape),
        pairs=pairs,
        vocabulary=vocabulary,
        hidden=hidden,
        turns=turns,
        announce=announce,
    )
    if not json:
        _print_sides(result)
    return result


@app.command("kernels")
def kernels(
    shape: ShapeOption = "256/256/256",
    pairs: Pairs = 2,
    hidden: Hidden = 4096,
    window: Annotated[
        int, typer.Option(min=1, metavar="W", help="A second time with so short a window.")
    ] = 128,
    device: Device = "cpu",
    turns: Turns = 7,
    json: Json = False,
) -> dict[str, Any]:
    """Attention over one row of pairs, and a layer in NF4: time and exactness of each alone."""
    announce = _open_quiet_log()
    from orpo_ray.bench.kernels import KernelCase, bench_kernels

    case = KernelCase(shape=_shape(shape), pairs=pairs, hidden=hidden, window=window, device=device)
    result = bench_kernels(case, turns, announce)
    if not json:
        print(f"{result['device']}, median of {result['turns']} turns")
        for row in result["rows"]:
            seconds = "  ".join(f"{side} {taken:.4f} s" for side, taken in row["seconds"].items())
            print(f"{row['what']}: ratio {row['ratio']:.2f}  {seconds}")
            print(
                f"  differences: output {row['output_difference']:.1e}, gradient "
                f"{row['gradient_difference']:.1e}"
            )
    return result


@app.command("gpu")
def gpu(
    write: Annotated[Path, typer.Option(metavar="FILE", help="The Markdown file of the table.")],
    only: Annotated[
        str, typer.Option(metavar="WORDS", help="Only rows with these words in their names.")
    ] = "",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny shapes on the CPU, to see that every row runs.")
    ] = False,
    turns: Turns = 7,
    json: Json = False,
) -> dict[str, Any]:
    """All rows that a GPU is needed for, one after the other, as one table in a file."""
    announce = _open_quiet_log()
    from orpo_ray.bench.gpu import bench_gpu

    result = bench_gpu(write, announce, only=only, turns=turns, tiny=tiny)
    if not json:
        print(f"{len(result['rows'])} rows in {write}")
    return result


@app.command("start")
def start(turns: StartTurns = 3, json: Json = False) -> dict[str, Any]:
    """What a start costs: CPU seconds of runs of four steps, compared with a stock TRL script."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.start import bench_start

    result = bench_start(turns, announce)
    if not json:
        _print_start(result)
    return result


@app.command("run")
def run(
    base: Annotated[str, typer.Option(metavar="FOLDER", help="A base: a folder or a GGUF file.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="Pairs in any format that is read.")],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to train.")] = 40,
    pairs: Annotated[int, typer.Option(min=1, metavar="B", help="Pairs of a step.")] = 16,
    objective: ObjectiveOption = "orpo",
    quantization: Annotated[
        Literal["nf4", "none"], typer.Option(help="How the base's weights are kept.")
    ] = "nf4",
    max_length: Annotated[
        int, typer.Option(min=8, metavar="L", help="Longer pairs of the file are left out.")
    ] = 512,
    turns: StartTurns = 1,
    json: Json = False,
) -> dict[str, Any]:
    """A whole run on a real base, from the command to the adapter: ours and a stock TRL script."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.run import RunCase, bench_run

    case = RunCase(
        base=base,
        data=data,
        steps=steps,
        pairs=pairs,
        objective=objective,
        quantization=quantization,
        max_length=max_length,
    )
    result = bench_run(case, turns, announce)
    if not json:
        _print_run(result)
    return result


@app.command("search")
def search(
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of data order, first adapters and draws.")
    ] = 1,
    json: Json = False,
) -> dict[str, Any]:
    """What a search saves in trained steps: the demo's full grid compared with the default search.

    Each has 16 trials.
    """
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.search import bench_search

    result = bench_search(seed, announce)
    if not json:
        print(f"{'':7} {'best accuracy':>14} {'margin':>7} {'steps':>6} {'minutes':>8}")
        for side in ("grid", "search"):
            numbers = (
                f"{result[f'best_{side}']:14.3f} {result[f'margin_{side}']:7.2f} "
                f"{result[f'trial_steps_{side}']:6}"
            )
            print(f"{side:7} {numbers} {result['seconds'][side] / 60:8.1f}")
        print(f"ratio of steps {result['ratio']:.2f}")
    return result


def _open_quiet_log() -> Announce:
    """Open the log without torch's remarks on memory, and return what announces progress."""
    import os

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from orpo_ray.cli.console import announce, open_log

    open_log()
    return announce


def _shape(text: str) -> tuple[int, int, int]:
    """Three whole numbers, as 256/128/128."""
    from orpo_ray.errors import ConfigError

    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f"--shape: {text}: write tokens of prompt, chosen and rejected, such as 256/128/128"
        )
    prompt, chosen, rejected = map(int, parts)
    return prompt, chosen, rejected


def _print_start(result: dict[str, Any]) -> None:
    print(f"CPU seconds of all processes, median of {result['turns']}")
    for side in ("one_worker", "two_workers", "stock"):
        print(
            f"{side:13} {result[f'{side}_cpu_s']:6.1f}  ({result['wall_s'][side]:.1f} s by the "
            "clock)"
        )
        for phase, taken in result["phases"].get(side, {}).items():
            print(f"  {phase:17} {taken['cpu_s']:6.1f}  ({taken['wall_s']:.1f})")
    print(f"{'second trial':13} {result['second_trial_cpu_s']:6.1f}  (up to its first step)")
    print(f"prepare 1,024 pairs: {result['prepare_wall_s']:.1f} s by the clock")


def _print_run(result: dict[str, Any]) -> None:
    print(f"{result['steps']} steps of {result['pairs']} pairs, median of {result['turns']}")
    print(f"{'':6} {'CPU s':>8} {'seconds':>8} {'GB':>6} {'NLL':>7}")
    for side, taken in result["sides"].items():
        print(
            f"{side:6} {taken['cpu_s']:8.1f} {taken['wall_s']:8.1f} "
            f"{taken['peak_bytes'] / 1e9:6.2f} {result['nll'][side]:7.4f}"
        )
    print(
        f"stock / auto {result['cpu_ratio']:.2f} by CPU, {result['wall_ratio']:.2f} by the clock; "
        f"memory {result['memory_ratio_auto']:.2f} (with the same micro-batch "
        f"{result['memory_ratio']:.2f}, {result['cpu_ratio_same']:.2f} by CPU)"
    )


def _print_sides(result: dict[str, Any]) -> None:
    print(f"{result['device']}, median of {result['turns']} turns")
    print(f"{'':6} {'seconds':>9} {'tokens':>8} {'MiB':>7}")
    for side in ("ours", "stock"):
        memory = f"{result[f'memory_{side}'] / 2**20:7.0f}" if f"memory_{side}" in result else ""
        print(f"{side:6} {result[side]:9.4f} {result[f'tokens_{side}']:8,} {memory}")
    grouped = (
        f" ({result['ratio_grouped']:.2f} if stock TRL gets its pairs grouped by length)"
        if "ratio_grouped" in result
        else ""
    )
    print(f"ratio  {result['ratio']:9.2f}{grouped}, memory {result['memory_ratio']:.2f}")
    print(
        f"differences: loss {result['max_rel_loss_diff']:.1e}, gradients "
        f"{result['max_rel_grad_diff']:.1e}"
    )


def _print(result: dict[str, Any]) -> None:
    print(
        f"orpo-ray prepare: {result['rows']} rows, {result['mb']:,.0f} MB, in "
        f"{result['command_s']:,.1f} s; driver {result['driver_peak_mb']:,.0f} MB, all processes "
        f"{result['all_peak_mb']:,.0f} MB"
    )
    if "repetitions" not in result:
        return
    print(f"{result['rows']} rows on {result['cores']} cores, median of {result['repetitions']}")
    print(f"{'':6} {'rows/s':>9} {'start-up s':>11} {'pairs':>8} {'tokens':>11}")
    for side in ("ours", "stock"):
        numbers = (
            f"{result[f'{what}_{side}']:>{width},}"
            for what, width in (("pairs", 8), ("tokens", 11))
        )
        print(
            f"{side:6} {result[side]:9,.0f} {result[f'startup_{side}']:11.2f} {' '.join(numbers)}"
        )
    print(f"ratio  {result['ratio']:9.2f}   ({result['ratio_cpu']:.2f} by CPU seconds)")
    for reason, count in result["dropped_ours"].items():
        print(f"ours dropped {count} ({reason})")

"""`orpo-ray bench`: how fast this is beside the stock way, measured on this machine."""

from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, help="Measure this machine: ours beside the stock way.")


@app.command("data")
def data(
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs to prepare.")] = 4000,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model or tokenizer; the demo's if not given.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, metavar="L", help="Tokens of prompt and answer together.")] = 2048,
    file: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Pairs to prepare instead of generated ones.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Times each side runs, in turns.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> dict[str, Any]:
    """Preparation of pairs: rows a second of ours and of TRL's ORPOTrainer, same rows and cores."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.data import DEMO_TOKENIZER, bench_data

    result = bench_data(rows, tokenizer or DEMO_TOKENIZER, max_length, announce, file, repetitions)
    if not json:
        _print(result)
    return result


@app.command("ray")
def ray(
    seconds: Annotated[float, typer.Option(min=0.1, metavar="S", help="Length of a turn.")] = 4.0,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each side, one after the other.")] = 16,
    starts: Annotated[int, typer.Option(min=1, help="Times that both sides are started.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> dict[str, Any]:
    """What Ray costs: the demo's steps under Ray Train and under bare torch.distributed, two workers each."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.ray import bench_ray

    result = bench_ray(seconds, turns, starts, announce)
    if not json:
        print(f"{result['workers']} workers, seconds of a step, median of {starts * turns} turns of {seconds:g} s")
        print(f"bare   {result['bare']:9.4f}\nRay    {result['ray']:9.4f}")
        print(f"ratio  {result['ratio']:9.3f}   ({result['ratio_cpu']:.3f} by CPU seconds)")
    return result


@app.command("search")
def search(
    seed: Annotated[int, typer.Option(min=0, help="Of data order, first adapters and draws.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> dict[str, Any]:
    """What a search saves: the demo's full grid of 16 trials and 16 trials of the default search, in trained steps."""
    from orpo_ray.cli.console import announce, open_log

    open_log()
    from orpo_ray.bench.search import bench_search

    result = bench_search(seed, announce)
    if not json:
        print(f"{'':7} {'best accuracy':>14} {'margin':>7} {'steps':>6} {'minutes':>8}")
        for side in ("grid", "search"):
            numbers = (
                f"{result[f'best_{side}']:14.3f} {result[f'margin_{side}']:7.2f} {result[f'trial_steps_{side}']:6}"
            )
            print(f"{side:7} {numbers} {result['seconds'][side] / 60:8.1f}")
        print(f"ratio of steps {result['ratio']:.2f}")
    return result


def _print(result: dict[str, Any]) -> None:
    print(f"{result['rows']} rows on {result['cores']} cores, median of {result['repetitions']}")
    print(f"{'':6} {'rows/s':>9} {'start-up s':>11} {'pairs':>8} {'tokens':>11}")
    for side in ("ours", "stock"):
        numbers = (f"{result[f'{what}_{side}']:>{width},}" for what, width in (("pairs", 8), ("tokens", 11)))
        print(f"{side:6} {result[side]:9,.0f} {result[f'startup_{side}']:11.2f} {' '.join(numbers)}")
    print(f"ratio  {result['ratio']:9.2f}   ({result['ratio_cpu']:.2f} by CPU seconds)")
    for reason, count in result["dropped_ours"].items():
        print(f"ours dropped {count} ({reason})")

"""`orpo-ray judge`: which of two files of answers is better."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Json

app = typer.Typer(add_completion=False)

_REWARD = "reward"

First = Annotated[str, typer.Argument(metavar="A.jsonl", help="The answers of one model.")]
Second = Annotated[
    str | None,
    typer.Argument(
        metavar="B.jsonl",
        help="Those of the other; left out if A has both, as generate --model both writes.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An OpenAI-compatible endpoint, as http://HOST:8000/v1."),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="The model that judges at the endpoint.")
]
KeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="A file that holds the endpoint's key.")
]
ByRun = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="reward RUN",
        help="Judge by the log-probs of the model that a run trained, without an endpoint.",
    ),
]
Out = Annotated[
    str | None, typer.Option(metavar="FILE", help="The file of verdicts; beside A if not given.")
]
Parallel = Annotated[int, typer.Option(min=1, help="Requests at the same time.")]
MaxRequests = Annotated[
    int | None, typer.Option(min=1, help="The most requests, tries after failures included.")
]


@app.command("judge")
def judge(
    a: First,
    b: Second = None,
    endpoint: Url = None,
    model: Model = None,
    key_file: KeyFile = None,
    judge: ByRun = None,
    out: Out = None,
    parallel: Parallel = 4,
    max_requests: MaxRequests = None,
    json: Json = False,
) -> dict[str, Any]:
    """Compare two models' answers to the same prompts: how often A's are better than B's."""
    from orpo_ray.cli.console import Terminal, open_log
    from orpo_ray.errors import ConfigError

    if judge is not None and judge[0] != _REWARD:
        raise ConfigError(f"judge: must be {_REWARD} RUN, not {judge[0]}")
    open_log()
    from orpo_ray import api
    from orpo_ray.cli.results import print_result

    found = api.judge(
        a,
        b,
        endpoint=endpoint,
        model=model,
        key_file=key_file,
        reward=None if judge is None else judge[1],
        out=out,
        parallel=parallel,
        max_requests=max_requests,
        console=Terminal(),
    ).to_json()
    if not json:
        print_result("judge", found)
    return found

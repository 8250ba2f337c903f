"""`orpo-ray evaluate`: compares the base with what a run made of it."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Adapter, Json, MaxNewTokens, NamedRun, Overrides

app = typer.Typer(add_completion=False)

_OF_PAIRS = ("samples", "max_new_tokens")
_OF_LM_EVAL = ("limit", "fewshot", "apply_chat_template", "batch_size", "merged")
"""Options that only make sense with --lm-eval; the others only without it."""

BaseOnly = Annotated[
    bool, typer.Option("--base-only", help="Judge the base alone, before training.")
]
Samples = Annotated[int, typer.Option(min=0, help="Prompts to answer with both models.")]
LmEval = Annotated[
    str | None,
    typer.Option(
        metavar="TASK,...",
        help="Measure benchmarks in place of held-out pairs: names or YAML files of lm-eval.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="With --lm-eval: the first rows of each task only.")
]
Fewshot = Annotated[
    int | None, typer.Option(min=0, help="With --lm-eval: solved examples before a question.")
]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template", help="With --lm-eval: ask as in a chat, not as plain text."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="With --lm-eval: rows at once; what fits, if not given.")
]
Merged = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="With --lm-eval: what `export` wrote, as the trained model."
    ),
]


@app.command("evaluate")
def evaluate(
    context: typer.Context,
    run: NamedRun,
    overrides: Overrides = None,
    adapter: Adapter = None,
    base_only: BaseOnly = False,
    samples: Samples = 3,
    max_new_tokens: MaxNewTokens = 128,
    lm_eval: LmEval = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    apply_chat_template: ApplyChatTemplate = False,
    batch_size: BatchSize = None,
    merged: Merged = None,
    json: Json = False,
) -> dict[str, Any]:
    """Compare base and trained model on held-out pairs, or on the usual benchmarks."""
    from orpo_ray.cli.console import Terminal, open_log
    from orpo_ray.runs.named import named_config

    _refuse_unused(context, is_lm_eval=lm_eval is not None)
    settings = named_config(run, overrides or ())
    open_log()
    from orpo_ray import api
    from orpo_ray.cli.results import print_result

    if lm_eval is not None:
        judged: Any = api.evaluate_by_harness(
            settings,
            [task.strip() for task in lm_eval.split(",")],
            limit=limit,
            fewshot=fewshot,
            chat_template=apply_chat_template,
            batch_size=batch_size,
            base_only=base_only,
            adapter=adapter,
            merged=merged,
            console=Terminal(),
        )
    else:
        judged = api.evaluate(
            settings,
            adapter,
            samples=samples,
            max_new_tokens=max_new_tokens,
            base_only=base_only,
            console=Terminal(),
        )
    result: dict[str, Any] = judged.to_json()
    if not json:
        print_result("evaluate", result)
    return result


def _refuse_unused(context: typer.Context, is_lm_eval: bool) -> None:
    """Raise ConfigError for an option that would change nothing."""
    from orpo_ray.errors import ConfigError

    told = "does not go with --lm-eval" if is_lm_eval else "only goes with --lm-eval"
    for name in _OF_PAIRS if is_lm_eval else _OF_LM_EVAL:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} {told}; leave it out")

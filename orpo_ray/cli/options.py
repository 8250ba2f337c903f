"""Arguments and options that many commands share."""

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG.yaml")]
NamedRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's YAML, or the folder or URL where it lies.")
]
Adapter = Annotated[
    str | None, typer.Option(help="An adapter folder or run, in place of this config's own.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of an answer in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Above 0, answers are drawn; 0 takes the likeliest.")
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the likeliest tokens to draw from.")
]
Seed = Annotated[int, typer.Option(min=0, help="Other seeds draw other answers.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and prepare, but start no training.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and the libraries log.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")
]

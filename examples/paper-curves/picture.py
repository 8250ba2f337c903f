"""Draw curves.png from curves.json.

pip install matplotlib    # the project does not install it
python examples/paper-curves/picture.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

HERE = Path(__file__).resolve().parent
# Colours that most colour-blind people can tell apart. The run without a preference term is grey.
STYLES = {
    "sft": ("SFT", "#555555"),
    "orpo-0.1": ("ORPO, lambda 0.1", "#0072b2"),
    "orpo-0.5": ("ORPO, lambda 0.5", "#e69f00"),
    "orpo-1.0": ("ORPO, lambda 1.0", "#d0312d"),
}
LINES = {"chosen": "-", "rejected": "--"}


def draw(axes: Axes, by_seed: dict[str, dict[str, list[float]]], colour: str) -> None:
    """One run: its mean over the seeds as a line, and the span of the seeds as a band."""
    curves = list(by_seed.values())
    for side, line in LINES.items():
        steps = curves[0]["steps"]
        columns = list(zip(*(curve[side] for curve in curves), strict=True))
        means = [sum(column) / len(column) for column in columns]
        axes.plot(steps, means, line, color=colour, linewidth=2)
        axes.fill_between(
            steps,
            list(map(min, columns)),
            list(map(max, columns)),
            color=colour,
            alpha=0.15,
            linewidth=0,
        )


def main() -> None:
    """Draw the whole curves, and beside them their last part, in which the runs differ."""
    curves = json.loads((HERE / "curves.json").read_text(encoding="utf-8"))
    plt.rcParams["font.size"] = 11
    figure, (whole, end) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for objective, by_seed in curves.items():
        for axes in (whole, end):
            draw(axes, by_seed, STYLES[objective][1])
    whole.set(
        title="The whole run",
        ylabel="mean log-prob per token on held-out pairs (nats)",
        ylim=(-8, 0),
    )
    end.set(title="From step 26 on", ylim=(-4, 0), xlim=(26, None))
    for axes in (whole, end):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    keys = [
        Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in STYLES.values()
    ]
    keys += [
        Line2D([], [], color="black", linestyle=line, linewidth=2, label=side)
        for side, line in LINES.items()
    ]
    figure.legend(
        handles=keys, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.4
    )
    figure.savefig(HERE / "curves.png", dpi=120)


if __name__ == "__main__":
    main()

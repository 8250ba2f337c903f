"""The part of a base that sees images: no text passes it, but memory holds it."""

from collections.abc import Iterator, Mapping
from typing import Any

from orpo_ray.errors import CannotTellError
from orpo_ray.planner.layers import Linear

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}


def tower_linears(vision: Mapping[str, Any]) -> Iterator[Linear]:
    """The linear layers of a SigLIP tower. They are quantised, and get no adapter."""
    settings = {**_DEFAULTS, **vision}
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    sizes = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (hidden, inner), "mlp.fc2": (inner, hidden)}
    for name, (inputs, outputs) in sizes.items():
        yield Linear(
            name=name,
            inputs=inputs,
            outputs=outputs,
            bias=True,
            copies=settings["num_hidden_layers"],
            active_copies=0,
            ranks=0,
        )


def tower_others(vision: Mapping[str, Any], text_hidden: int) -> int:
    """The tower's biases, norms and embeddings, and its way into the text's hidden states."""
    settings = {**_DEFAULTS, **vision}
    if settings["vision_use_head"]:
        raise CannotTellError(
            "model.base: its vision tower has a head of its own (vision_use_head), whose layers "
            "the planner does not know"
        )
    hidden, patch = int(settings["hidden_size"]), int(settings["patch_size"])
    patches = (int(settings["image_size"]) // patch) ** 2
    embeddings = hidden * (int(settings["num_channels"]) * patch**2 + 1 + patches)
    biases = sum(each.outputs * each.copies for each in tower_linears(vision))
    norms = 2 * hidden * (2 * int(settings["num_hidden_layers"]) + 1)
    return embeddings + biases + norms + hidden * text_hidden + hidden

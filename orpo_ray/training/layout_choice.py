"""Which layout a run takes, and why, decided from the pairs' lengths and the base's traits."""

from dataclasses import dataclass

from orpo_ray.errors import ConfigError
from orpo_ray.models.traits import Traits
from orpo_ray.training.plan import (
    PACKED,
    PADDED,
    SHARED_PREFIX,
    Indices,
    Layout,
    longer_side,
    pack_costs,
)

_MIN_SAVING = 0.02
"""The share of a packed row's tokens that sharing prompts must save.

If it saves less, it costs more than it saves: attention is then computed in more pieces.
"""


@dataclass(frozen=True)
class LayoutChoice:
    """A layout and why it was taken."""

    layout: Layout
    reason: str


def choose_layout(
    asked: str, traits: Traits, lengths: Indices, *, with_rejected: bool
) -> LayoutChoice:
    """Decide for pairs of (prompt, chosen, rejected) `lengths` [n, 3].

    Raises ConfigError if the base cannot take the layout that the config names.
    """
    obstacle = _no_single_row(traits, int(longer_side(lengths).max(initial=0)))
    wanted = None if asked == "auto" else Layout(asked)
    if wanted is PADDED:
        return LayoutChoice(PADDED, "as configured")
    no_sharing = obstacle
    if no_sharing is None and traits.router_loss:
        no_sharing = "the base asks for its router's loss, which is a mean over tokens"
    refused = {PACKED: obstacle, SHARED_PREFIX: no_sharing}.get(wanted) if wanted else None
    if refused:
        raise ConfigError(f"training.layout: {wanted} does not fit this run: {refused}; use auto")
    if wanted is not None:
        return LayoutChoice(wanted, "as configured")
    if obstacle:
        return LayoutChoice(PADDED, obstacle)
    return _best_single_row(no_sharing, lengths, with_rejected)


def kept_layout(layout: Layout, traits: Traits, lengths: Indices) -> Layout:
    """The layout of a run for pairs of other `lengths` [n, 3] than its own.

    These are padded rows if the base cannot take the run's layout for so long pairs.
    """
    return PADDED if _no_single_row(traits, int(longer_side(lengths).max(initial=0))) else layout


def _best_single_row(no_sharing: str | None, lengths: Indices, with_rejected: bool) -> LayoutChoice:
    if no_sharing:
        return LayoutChoice(PACKED, f"no padding; prompts are not shared, as {no_sharing}")
    if not with_rejected:
        return LayoutChoice(
            SHARED_PREFIX,
            "no padding; the objective computes one answer a pair, so prompts share only what they "
            "begin with",
        )
    packed, shared = (
        int(pack_costs(lengths, layout).tokens.sum()) for layout in (PACKED, SHARED_PREFIX)
    )
    saved = 1 - shared / packed if packed else 0.0
    if saved < _MIN_SAVING:
        return LayoutChoice(
            PACKED, f"no padding; sharing prompts would save only {saved:.1%} of the tokens"
        )
    return LayoutChoice(
        SHARED_PREFIX,
        f"each prompt is computed once, which saves {saved:.0%} of the tokens; no padding",
    )


def _no_single_row(traits: Traits, longest: int) -> str | None:
    """What keeps several answers from standing in one row, or None."""
    if traits.recurrent:
        return (
            "layers of the base carry a state from token to token, and answers in one row would "
            "share it"
        )
    if traits.own_attention:
        return "the base computes its attention in its own way"
    if traits.stretches_beyond is not None and traits.stretches_beyond < longest:
        return (
            f"a pair of more than {traits.stretches_beyond} tokens changes the positions of all "
            "pairs in its micro-batch; set data.max_length to that number to have no such pair"
        )
    return None

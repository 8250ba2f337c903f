"""What of a base decides which layouts of pairs and which attention it takes.

It is plain data that can be read without loading a library; `read_traits.py` finds it.
"""

from dataclasses import dataclass

ATTENTIONS = ("flash_attention_2", "sdpa", "eager")
"""Ways in which transformers computes attention, the best first."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a base computes that a layout must respect."""

    own_attention: bool = False
    """Its layers do not use transformers' attention interface, so they cannot use our attention."""
    recurrent: bool = False
    """Its layers carry a state from token to token."""
    router_loss: bool = False
    """It asks for a loss of its experts' router."""
    stretches_beyond: int | None = None
    """If a row is longer than this, the positions of all rows in its batch change."""
    attentions: tuple[str, ...] = ATTENTIONS
    """Those of ATTENTIONS that its layers know."""

"""Settings of IPO (arXiv:2310.12036)."""

from typing import Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.section import Section


class IpoConfig(Section):
    """Squared distance of the log-ratio margin from 1 / (2 beta); beta is the paper's tau."""

    kind: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    log_probs: Literal["sum", "token-mean"] = Field("sum", description="sum: the paper; token-mean: TRL's choice")

"""Settings of supervised fine-tuning on the chosen answers."""

from typing import Literal

from orpo_ray.config.section import Section


class SftConfig(Section):
    """Likelihood of the chosen answer alone."""

    kind: Literal["sft"] = "sft"
    nll_on: Literal["response", "full"] = "response"

"""Puts the objective of a foreign method, with its weights. Axolotl uses TRL's trainers, too."""

from collections.abc import Sequence

from orpo_ray.config.foreign.draft import Draft, as_names, as_number
from orpo_ray.config.objectives.dpo import LOSSES_OF_TRL, SMOOTHED
from orpo_ray.errors import ConfigError

METHODS = ("orpo", "dpo", "ipo", "simpo", "cpo", "kto", "sft")


def refuse_method(written: str) -> ConfigError:
    """The error for a method that has no objective here."""
    return ConfigError(f"{written}: orpo_ray trains {', '.join(METHODS)}; there is no counterpart")


def put_orpo(draft: Draft, weight: float, named: str, nll_on: str) -> None:
    """ORPO. Each project has another name for its weight, so `named` says which one."""
    draft.put("objective.kind", "orpo")
    draft.put("objective.lambda", weight, f"{named} is lambda here, as in the paper")
    told = {
        "full": "TRL takes the likelihood over prompt and response, not the response alone",
        "response": "",
    }
    draft.put("objective.nll_on", nll_on, told[nll_on])


def put_dpo(draft: Draft, losses: Sequence[str], beta: float, smoothing: float = 0) -> None:
    """DPO or IPO, from TRL's names of the loss."""
    loss = next((name for name in losses if name != "sft"), "sigmoid")
    if loss == "ipo":
        draft.put("objective.kind", "ipo")
        draft.put("objective.beta", beta)
        draft.put(
            "objective.log_probs", "token-mean", "the paper takes sums, TRL and LLaMA-Factory means"
        )
        return
    draft.put("objective.kind", "dpo")
    draft.put("objective.beta", beta)
    ours = LOSSES_OF_TRL.get(loss)
    if ours is None and loss != "dpo":
        draft.put("objective.loss", "sigmoid", f"the loss {loss} is not here; sigmoid is DPO's own")
    elif ours not in (None, "sigmoid"):
        draft.put("objective.loss", ours, "" if ours == loss else f"TRL calls it {loss}")
    if smoothing and ours is not None and ours not in SMOOTHED:
        draft.remark("objective.loss", f"label smoothing {smoothing}: {ours} has none")
    elif smoothing:
        old = "" if loss == "robust" else "TRL from 1.0 on applies it to robust alone"
        draft.put("objective.label_smoothing", smoothing, old)


def put_nll(draft: Draft, weight: float, named: str) -> None:
    """The likelihood that is added to DPO's loss."""
    if not weight:
        return
    if draft.settings["objective.kind"] == "dpo":
        draft.put(
            "objective.nll_weight", weight, f"{named}: weight of the likelihood of the response"
        )
    else:
        draft.remark(
            "objective.kind",
            f"{named}: {weight}: {draft.settings['objective.kind']} has no likelihood term here",
        )


def put_mixed_losses(draft: Draft, losses: Sequence[str], weights_key: str) -> None:
    """TRL's list of losses with weights: a preference loss, and the likelihood, called sft."""
    weights = [as_number(weights_key, item) for item in as_names(draft.take(weights_key))]
    weights += [1.0] * (len(losses) - len(weights))
    if len(losses) < 2:
        return
    by_name = dict(zip(losses, weights, strict=False))
    first = next((name for name in losses if name != "sft"), "sigmoid")
    scale = by_name.get(first, 1.0) or 1.0
    put_nll(draft, by_name.get("sft", 0) / scale, f"{weights_key} of sft")
    if scale != 1:
        draft.remark(
            "objective.kind", f"{weights_key}: the whole loss is {scale} times as large there"
        )
    others = [name for name in losses if name not in (first, "sft")]
    if others:
        draft.remark("objective.kind", f"losses added there that are not here: {', '.join(others)}")


def put_simpo(draft: Draft, beta: float, ratio: float, named: str, nll: float) -> None:
    """SimPO; `ratio` is gamma divided by beta."""
    draft.put("objective.kind", "simpo")
    draft.put("objective.beta", beta)
    draft.put("objective.gamma_beta_ratio", round(ratio, 6), named)
    if nll:
        told = f"cpo_alpha: {nll}: TRL adds the likelihood with this weight (1 if it is not set)"
        draft.remark("objective.kind", f"{told}; SimPO has no likelihood term here")


def put_cpo(draft: Draft, beta: float, alpha: float, loss: str) -> None:
    """CPO, from TRL's names."""
    draft.put("objective.kind", "cpo")
    if loss != "sigmoid":
        draft.remark(
            "objective.kind", f"loss_type: {loss}: not here for CPO; its loss is the sigmoid's"
        )
    draft.put("objective.beta", beta)
    draft.put("objective.alpha", alpha, "TRL calls it cpo_alpha")


def put_kto(draft: Draft, beta: float, desirable: float, undesirable: float) -> None:
    """KTO, which TRL's own trainer computes here, too."""
    draft.put("objective.kind", "kto")
    draft.put("objective.beta", beta)
    draft.put("objective.desirable_weight", desirable)
    draft.put("objective.undesirable_weight", undesirable)
    draft.put("training.engine", "trl", "KTO is computed by TRL's trainer")


def put_sft(draft: Draft, nll_on: str = "response") -> None:
    """Supervised fine-tuning, which reads pairs here, too."""
    draft.put("objective.kind", "sft")
    draft.put("objective.nll_on", nll_on)
    draft.remark(
        "data.train", "sft trains the chosen answers of pairs; rows of one answer are no pairs"
    )


def put_all_turns(draft: Draft, told: str) -> None:
    """Train every assistant turn, unless the likelihood covers every token anyway."""
    if draft.settings["objective.nll_on"] == "response":
        draft.put("data.train_on", "all-assistant", told)

"""Each loss and its gradient against arithmetic written out by hand in plain Python floats."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives import OBJECTIVES, ObjectiveConfig
from orpo_ray.config.objectives.cpo import CpoConfig
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.ipo import IpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.objectives.sft import SftConfig
from orpo_ray.config.objectives.simpo import SimpoConfig
from orpo_ray.objectives import Objective, PairLogps, build_objective, log_odds_ratio, loss_parts

EXACT = 1e-12  # float64 against float64
FLOAT32 = 2e-6  # ORPO's odds are float32 whatever comes in


@dataclass(frozen=True)
class Pair:
    """One pair as plain numbers; log-probs and NLL are summed over tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    reference_chosen: float
    reference_rejected: float
    nll_sum: float


PAIRS = (
    Pair(-12.5, -9.0, 5, 6, -11.0, -10.5, 14.0),
    Pair(-3.0, -7.5, 4, 3, -4.5, -6.0, 3.0),
    Pair(-40.0, -66.0, 16, 20, -38.0, -60.0, 45.5),
)
PAIR_COUNT, TOKEN_COUNT = 8, 50  # of the whole step; larger than the three pairs here

Hand = Callable[[Pair], tuple[float, float, float]]  # value, d/d chosen, d/d rejected


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def hand_orpo(p: Pair) -> tuple[float, float, float]:
    prob_w, prob_l = math.exp(p.chosen / p.chosen_tokens), math.exp(p.rejected / p.rejected_tokens)
    odds_ratio = (prob_w / (1 - prob_w)) / (prob_l / (1 - prob_l))
    # -log sigmoid(log OR) = log(1 + 1 / OR); its slope in log OR is -1 / (1 + OR); d log odds / dm
    # = 1 / (1 - p).
    slope = -1 / (1 + odds_ratio)
    return (
        math.log(1 + 1 / odds_ratio),
        slope / (1 - prob_w) / p.chosen_tokens,
        -slope / (1 - prob_l) / p.rejected_tokens,
    )


def hand_orpo_beta(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        prob_w = math.exp(p.chosen / p.chosen_tokens)
        prob_l = math.exp(p.rejected / p.rejected_tokens)
        odds_ratio = (prob_w / (1 - prob_w)) / (prob_l / (1 - prob_l))
        # As above, with OR^beta in place of OR.
        slope = -beta / (1 + odds_ratio**beta)
        return (
            math.log(1 + odds_ratio**-beta),
            slope / (1 - prob_w) / p.chosen_tokens,
            -slope / (1 - prob_l) / p.rejected_tokens,
        )

    return hand


def hand_dpo(beta: float, smoothing: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        x = beta * (p.chosen - p.reference_chosen - p.rejected + p.reference_rejected)
        value = -(1 - smoothing) * math.log(sigmoid(x)) - smoothing * math.log(1 - sigmoid(x))
        slope = beta * (sigmoid(x) - (1 - smoothing))
        return value, slope, -slope

    return hand


def hand_hinge(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        x = beta * (p.chosen - p.reference_chosen - p.rejected + p.reference_rejected)
        return (1 - x, -beta, beta) if x < 1 else (0.0, 0.0, 0.0)

    return hand


def hand_robust(beta: float, flipped: float) -> Hand:
    """The mean of the plain loss over both labels, without bias."""

    def hand(p: Pair) -> tuple[float, float, float]:
        x = beta * (p.chosen - p.reference_chosen - p.rejected + p.reference_rejected)
        value = (-(1 - flipped) * math.log(sigmoid(x)) + flipped * math.log(1 - sigmoid(x))) / (
            1 - 2 * flipped
        )
        slope = (
            beta * (-(1 - flipped) * (1 - sigmoid(x)) - flipped * sigmoid(x)) / (1 - 2 * flipped)
        )
        return value, slope, -slope

    return hand


def hand_sigmoid_norm(beta: float, smoothing: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        chosen = (p.chosen - p.reference_chosen) / p.chosen_tokens
        rejected = (p.rejected - p.reference_rejected) / p.rejected_tokens
        x = beta * (chosen - rejected)
        value = -(1 - smoothing) * math.log(sigmoid(x)) - smoothing * math.log(1 - sigmoid(x))
        slope = beta * (sigmoid(x) - (1 - smoothing))
        return value, slope / p.chosen_tokens, -slope / p.rejected_tokens

    return hand


def hand_apo_zero(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        w = sigmoid(beta * (p.chosen - p.reference_chosen))
        lost = sigmoid(beta * (p.rejected - p.reference_rejected))
        return 1 - w + lost, -beta * w * (1 - w), beta * lost * (1 - lost)

    return hand


def hand_apo_down(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        w = sigmoid(beta * (p.chosen - p.reference_chosen))
        gap = sigmoid(beta * (p.chosen - p.reference_chosen - p.rejected + p.reference_rejected))
        fall, widen = beta * w * (1 - w), beta * gap * (1 - gap)
        return w + 1 - gap, fall - widen, widen

    return hand


def hand_nca(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        w = sigmoid(beta * (p.chosen - p.reference_chosen))
        lost = sigmoid(beta * (p.rejected - p.reference_rejected))
        value = -math.log(w) - (math.log(1 - w) + math.log(1 - lost)) / 2
        return value, beta * (w / 2 - (1 - w)), beta * lost / 2

    return hand


def hand_ipo(beta: float, mean: bool) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        n_w, n_l = (p.chosen_tokens, p.rejected_tokens) if mean else (1, 1)
        margin = (p.chosen - p.reference_chosen) / n_w - (p.rejected - p.reference_rejected) / n_l
        off = margin - 0.5 / beta
        return off * off, 2 * off / n_w, -2 * off / n_l

    return hand


def hand_simpo(beta: float, gamma: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        x = beta * p.chosen / p.chosen_tokens - beta * p.rejected / p.rejected_tokens - gamma
        slope = -(1 - sigmoid(x)) * beta
        return -math.log(sigmoid(x)), slope / p.chosen_tokens, -slope / p.rejected_tokens

    return hand


def hand_cpo(beta: float) -> Hand:
    def hand(p: Pair) -> tuple[float, float, float]:
        x = beta * (p.chosen - p.rejected)
        slope = -(1 - sigmoid(x)) * beta
        return -math.log(sigmoid(x)), slope, -slope

    return hand


CASES = [
    # config, hand-written preference term, its weight, weight of the NLL, tolerance
    pytest.param(OrpoConfig(lambda_=0.3), hand_orpo, 0.3, 1.0, FLOAT32, id="orpo"),
    pytest.param(OrpoConfig(lambda_=0), hand_orpo, 0.0, 1.0, FLOAT32, id="orpo-lambda-0"),
    pytest.param(
        OrpoConfig(lambda_=0.3, nll_weight=0.25), hand_orpo, 0.3, 0.25, FLOAT32, id="orpo-less-nll"
    ),
    pytest.param(
        OrpoConfig(lambda_=1.0, nll_weight=0, beta=0.4),
        hand_orpo_beta(0.4),
        1.0,
        0.0,
        FLOAT32,
        id="orpo-beta",
    ),
    pytest.param(
        OrpoConfig(lambda_=0.3, nll_weight=0.5, beta=3.0),
        hand_orpo_beta(3.0),
        0.3,
        0.5,
        FLOAT32,
        id="orpo-beta-with-nll",
    ),
    pytest.param(DpoConfig(beta=0.2), hand_dpo(0.2, 0.0), 1.0, 0.0, EXACT, id="dpo"),
    pytest.param(
        DpoConfig(beta=0.2, label_smoothing=0.15),
        hand_dpo(0.2, 0.15),
        1.0,
        0.0,
        EXACT,
        id="dpo-label-smoothing",
    ),
    pytest.param(
        DpoConfig(beta=0.2, loss="hinge"), hand_hinge(0.2), 1.0, 0.0, EXACT, id="dpo-hinge"
    ),
    pytest.param(
        DpoConfig(beta=0.2, loss="robust", label_smoothing=0.15),
        hand_robust(0.2, 0.15),
        1.0,
        0.0,
        EXACT,
        id="dpo-robust",
    ),
    pytest.param(
        DpoConfig(beta=0.2, nll_weight=0.7), hand_dpo(0.2, 0.0), 1.0, 0.7, EXACT, id="dpo-with-nll"
    ),
    pytest.param(
        DpoConfig(beta=5.0, loss="sigmoid-norm"),
        hand_sigmoid_norm(5.0, 0.0),
        1.0,
        0.0,
        EXACT,
        id="dpo-sigmoid-norm",
    ),
    pytest.param(
        DpoConfig(beta=5.0, loss="sigmoid-norm", label_smoothing=0.15),
        hand_sigmoid_norm(5.0, 0.15),
        1.0,
        0.0,
        EXACT,
        id="dpo-sigmoid-norm-label-smoothing",
    ),
    pytest.param(
        DpoConfig(beta=0.2, loss="apo-zero"), hand_apo_zero(0.2), 1.0, 0.0, EXACT, id="dpo-apo-zero"
    ),
    pytest.param(
        DpoConfig(beta=0.2, loss="apo-down"), hand_apo_down(0.2), 1.0, 0.0, EXACT, id="dpo-apo-down"
    ),
    pytest.param(DpoConfig(beta=0.2, loss="nca"), hand_nca(0.2), 1.0, 0.0, EXACT, id="dpo-nca"),
    pytest.param(IpoConfig(beta=0.25), hand_ipo(0.25, mean=False), 1.0, 0.0, EXACT, id="ipo-sum"),
    pytest.param(
        IpoConfig(beta=0.25, log_probs="token-mean"),
        hand_ipo(0.25, mean=True),
        1.0,
        0.0,
        EXACT,
        id="ipo-token-mean",
    ),
    pytest.param(
        SimpoConfig(beta=2.5, gamma_beta_ratio=0.4),
        hand_simpo(2.5, gamma=1.0),
        1.0,
        0.0,
        EXACT,
        id="simpo",
    ),
    pytest.param(CpoConfig(beta=0.2, alpha=0.6), hand_cpo(0.2), 1.0, 0.6, EXACT, id="cpo"),
    pytest.param(CpoConfig(beta=0.2, alpha=0), hand_cpo(0.2), 1.0, 0.0, EXACT, id="cpo-alpha-0"),
    pytest.param(SftConfig(), lambda pair: (0.0, 0.0, 0.0), 0.0, 1.0, EXACT, id="sft"),
]


def tensors(pairs: tuple[Pair, ...]) -> PairLogps:
    """The pairs as float64 leaves; policy log-probs and NLL ask for gradients."""
    columns = {
        f.name: torch.tensor([getattr(p, f.name) for p in pairs], dtype=torch.float64)
        for f in fields(Pair)
    }
    for name in ("chosen", "rejected", "nll_sum"):
        columns[name].requires_grad_()
    return PairLogps(**columns)


def one_pair(**changes: float) -> PairLogps:
    return tensors((replace(PAIRS[0], **changes),))


def gradient(leaf: torch.Tensor) -> list[float]:
    return [0.0] * len(leaf) if leaf.grad is None else leaf.grad.tolist()


def preference_of(config: ObjectiveConfig, pairs: PairLogps) -> float:
    """The preference term of a single pair."""
    return build_objective(config).preference(pairs).item()


@pytest.mark.parametrize(("config", "hand", "weight", "nll_weight", "tolerance"), CASES)
def test_value_equals_hand_written_arithmetic(config, hand, weight, nll_weight, tolerance):
    parts = loss_parts(build_objective(config), tensors(PAIRS), PAIR_COUNT, TOKEN_COUNT)
    preference = weight * sum(hand(p)[0] for p in PAIRS) / PAIR_COUNT
    nll = nll_weight * (14.0 + 3.0 + 45.5) / TOKEN_COUNT
    assert parts.preference.item() == pytest.approx(preference, rel=tolerance, abs=0)
    assert parts.nll.item() == pytest.approx(nll, rel=tolerance, abs=0)
    assert parts.total.item() == pytest.approx(preference + nll, rel=tolerance, abs=0)


@pytest.mark.parametrize(("config", "hand", "weight", "nll_weight", "tolerance"), CASES)
def test_gradient_equals_hand_written_arithmetic(config, hand, weight, nll_weight, tolerance):
    pairs = tensors(PAIRS)
    loss_parts(build_objective(config), pairs, PAIR_COUNT, TOKEN_COUNT).total.backward()
    by_hand = [[weight * part / PAIR_COUNT for part in hand(p)] for p in PAIRS]
    assert gradient(pairs.chosen) == pytest.approx(
        [row[1] for row in by_hand], rel=tolerance, abs=0
    )
    assert gradient(pairs.rejected) == pytest.approx(
        [row[2] for row in by_hand], rel=tolerance, abs=0
    )
    assert gradient(pairs.nll_sum) == pytest.approx(
        [nll_weight / TOKEN_COUNT] * 3, rel=tolerance, abs=0
    )


@pytest.mark.parametrize(("config", "hand", "weight", "nll_weight", "tolerance"), CASES)
def test_hand_written_gradient_is_the_slope_of_the_hand_written_value(
    config, hand, weight, nll_weight, tolerance
):
    step = 1e-5
    for p, side in itertools.product(PAIRS, ("chosen", "rejected")):
        up, down = (hand(replace(p, **{side: getattr(p, side) + h}))[0] for h in (step, -step))
        assert hand(p)[1 if side == "chosen" else 2] == pytest.approx(
            (up - down) / (2 * step), rel=1e-6, abs=1e-10
        )


@pytest.mark.parametrize(("config", "hand", "weight", "nll_weight", "tolerance"), CASES)
def test_packs_of_a_step_add_up_to_the_loss_of_the_whole_step(
    config, hand, weight, nll_weight, tolerance
):
    objective = build_objective(config)
    whole = tensors(PAIRS)
    whole_loss = loss_parts(objective, whole, 3, 62).total
    whole_loss.backward()
    for cuts in ((1, 3), (2, 3), (1, 2, 3)):
        packs = [tensors(PAIRS[start:end]) for start, end in zip((0, *cuts), cuts, strict=False)]
        losses = [loss_parts(objective, pack, 3, 62).total for pack in packs]
        for loss in losses:
            loss.backward()
        assert sum(loss.item() for loss in losses) == pytest.approx(
            whole_loss.item(), rel=tolerance
        )
        for name in ("chosen", "rejected", "nll_sum"):
            pieces = [value for pack in packs for value in gradient(getattr(pack, name))]
            assert pieces == pytest.approx(gradient(getattr(whole, name)), rel=tolerance, abs=0)


def test_orpo_of_a_half_against_a_quarter_is_log_four_thirds():
    # odds 1 against 1/3: the ratio is 3, and -log sigmoid(log 3) = -log(3/4).
    pairs = one_pair(chosen=5 * math.log(0.5), rejected=6 * math.log(0.25))
    assert log_odds_ratio(pairs).item() == pytest.approx(math.log(3), rel=FLOAT32)
    assert preference_of(OrpoConfig(), pairs) == pytest.approx(math.log(4 / 3), rel=FLOAT32)


def test_orpo_with_weights_of_one_is_orpo_to_the_bit():
    """The loss of the paper, as it was before it had a beta and a weight of the likelihood."""
    plain, given = tensors(PAIRS), tensors(PAIRS)
    preference = 0.3 * (-logsigmoid(log_odds_ratio(plain))).sum() / PAIR_COUNT
    loss = preference + plain.nll_sum.sum() / TOKEN_COUNT
    loss.backward()
    config = OrpoConfig(lambda_=0.3, nll_weight=1, beta=1)
    ours = loss_parts(build_objective(config), given, PAIR_COUNT, TOKEN_COUNT).total
    ours.backward()
    assert torch.equal(ours, loss)
    for name in ("chosen", "rejected", "nll_sum"):
        assert torch.equal(getattr(given, name).grad, getattr(plain, name).grad)
    assert config == OrpoConfig(lambda_=0.3)


def test_without_a_likelihood_lambda_is_a_mere_scale():
    def gradients(weight: float) -> list[float]:
        pairs = tensors(PAIRS)
        config = OrpoConfig(lambda_=weight, nll_weight=0, beta=0.4)
        loss_parts(build_objective(config), pairs, 3, 25).total.backward()
        assert gradient(pairs.nll_sum) == [0.0] * 3
        return gradient(pairs.chosen) + gradient(pairs.rejected)

    assert gradients(2.0) == [8 * each for each in gradients(0.25)]


def test_sigmoid_norm_compares_what_each_token_gained():
    # -1.5 in 5 tokens against 1.5 in 6: -0.3 - 0.25, times 2.
    value = preference_of(DpoConfig(beta=2.0, loss="sigmoid-norm"), one_pair())
    assert value == pytest.approx(math.log(1 + math.exp(1.1)), rel=EXACT)


@pytest.mark.parametrize(
    ("loss", "at_reference", "rises"),
    [("apo-zero", 1.0, True), ("apo-down", 1.0, False), ("nca", 2 * math.log(2), True)],
)
def test_an_anchored_loss_says_where_the_chosen_answer_goes(loss, at_reference, rises):
    """apo-down lowers it where the rejected one is far below, the others raise it."""
    config = DpoConfig(beta=0.1, loss=loss)
    at_start = preference_of(config, one_pair(chosen=-11.0, rejected=-10.5))
    assert at_start == pytest.approx(at_reference, rel=EXACT)
    pairs = one_pair(chosen=-11.0, rejected=-60.0)
    build_objective(config).preference(pairs).sum().backward()
    assert (gradient(pairs.chosen)[0] < 0) == rises
    assert gradient(pairs.rejected)[0] > 0


def test_dpo_at_the_reference_is_log_two():
    pairs = one_pair(chosen=-11.0, rejected=-10.5)
    assert preference_of(DpoConfig(), pairs) == pytest.approx(math.log(2), rel=EXACT)


def test_dpo_label_smoothing_charges_the_flipped_label():
    # beta * margin = log 3: right label costs log(4/3), flipped label log 4.
    pairs = one_pair(chosen=-11.0 + 10 * math.log(3), rejected=-10.5)
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert preference_of(DpoConfig(beta=0.1, label_smoothing=0.25), pairs) == pytest.approx(
        expected, rel=EXACT
    )


def test_ipo_takes_sums_as_the_paper_or_token_means_as_trl():
    # summed margin (-12.5 + 11) - (-9 + 10.5) = -3; token means -1.5/5 - 1.5/6 = -0.55; target 1 /
    # (2 * 0.5) = 1.
    assert preference_of(IpoConfig(beta=0.5), one_pair()) == pytest.approx(16.0, rel=EXACT)
    assert preference_of(IpoConfig(beta=0.5, log_probs="token-mean"), one_pair()) == pytest.approx(
        2.4025, rel=EXACT
    )


def test_ipo_is_zero_at_its_target():
    assert preference_of(IpoConfig(beta=0.5), one_pair(chosen=-8.5)) == 0.0


def test_simpo_gamma_is_the_ratio_times_beta():
    # mean margin -2.5 + 1.5 = -1; beta 2, ratio 0.5: x = 2 * (-1) - 0.5 * 2 = -3.
    value = preference_of(SimpoConfig(beta=2.0, gamma_beta_ratio=0.5), one_pair())
    assert value == pytest.approx(math.log(1 + math.exp(3)), rel=EXACT)


def test_cpo_with_beta_half_and_margin_two():
    value = preference_of(CpoConfig(beta=0.5), one_pair(chosen=-7.0, rejected=-9.0))
    assert value == pytest.approx(0.31326168751822286, rel=EXACT)


@pytest.mark.parametrize("chosen_tokens", [1, 7])
@pytest.mark.parametrize(
    ("chosen_mean", "rejected_mean"),
    list(itertools.product((0.0, -1e-12, -1e-6, -1e-3, -1.0, -1e4), repeat=2)),
)
def test_orpo_is_finite_with_finite_gradients_at_the_ends(
    chosen_mean, rejected_mean, chosen_tokens
):
    pairs = PairLogps(
        chosen=torch.tensor([chosen_mean * chosen_tokens], requires_grad=True),
        rejected=torch.tensor([rejected_mean * 3], requires_grad=True),
        chosen_tokens=torch.tensor([chosen_tokens]),
        rejected_tokens=torch.tensor([3]),
        nll_sum=torch.tensor([-chosen_mean * chosen_tokens], requires_grad=True),
    )
    loss = loss_parts(build_objective(OrpoConfig(lambda_=1.0)), pairs, 1, chosen_tokens).total
    loss.backward()
    numbers = [
        loss.item(),
        *gradient(pairs.chosen),
        *gradient(pairs.rejected),
        *gradient(pairs.nll_sum),
    ]
    assert all(math.isfinite(number) for number in numbers)
    assert gradient(pairs.chosen)[0] <= 0 <= gradient(pairs.rejected)[0]


def test_orpo_at_the_ends_has_the_value_of_the_formula():
    # log odds of -1e4 is -1e4; that of a certain answer is log(1 / 1e-6) at the clamp.
    def preference(chosen_mean: float, rejected_mean: float) -> float:
        return preference_of(
            OrpoConfig(), one_pair(chosen=5 * chosen_mean, rejected=6 * rejected_mean)
        )

    assert preference(-1e4, 0.0) == pytest.approx(1e4 + math.log(1e6), rel=FLOAT32)
    assert preference(0.0, -1e4) == 0.0
    assert preference(0.0, 0.0) == preference(-1e4, -1e4) == pytest.approx(math.log(2), rel=FLOAT32)


def test_orpo_pushes_with_full_force_if_the_chosen_answer_is_hopeless():
    pairs = one_pair(chosen=-5e4, rejected=6 * math.log(0.5))
    build_objective(OrpoConfig()).preference(pairs).sum().backward()
    assert gradient(pairs.chosen) == pytest.approx([-1 / 5], rel=FLOAT32)
    assert gradient(pairs.rejected) == pytest.approx([2 / 6], rel=FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orpo_takes_odds_in_float32_whatever_comes_in(dtype):
    pairs = tensors(PAIRS)
    low = PairLogps(**{f.name: getattr(pairs, f.name).detach().to(dtype) for f in fields(Pair)})
    assert build_objective(OrpoConfig()).preference(low).dtype == torch.float32


def test_one_bad_pair_does_not_spoil_the_gradients_of_its_neighbours():
    pairs = tensors((*PAIRS[:2], replace(PAIRS[2], chosen=0.0, rejected=0.0)))
    build_objective(OrpoConfig()).preference(pairs).sum().backward()
    alone = tensors(PAIRS[:2])
    build_objective(OrpoConfig()).preference(alone).sum().backward()
    assert gradient(pairs.chosen)[:2] == gradient(alone.chosen)
    assert gradient(pairs.rejected)[:2] == gradient(alone.rejected)


def test_sft_ignores_the_rejected_answer():
    pairs = tensors(
        tuple(replace(p, rejected=float("nan"), reference_chosen=float("nan")) for p in PAIRS)
    )
    parts = loss_parts(build_objective(SftConfig()), pairs, 3, 25)
    parts.total.backward()
    assert parts.total.item() == pytest.approx(62.5 / 25, rel=EXACT)
    assert parts.preference.item() == 0.0
    assert pairs.rejected.grad is None and pairs.chosen.grad is None
    assert not build_objective(SftConfig()).needs_rejected


@pytest.mark.parametrize("config_class", OBJECTIVES.values())
def test_every_config_kind_has_a_builder(config_class):
    config = config_class()
    objective = build_objective(config)
    assert isinstance(objective, Objective)
    assert objective.kind == config.kind
    assert objective.nll_on == getattr(config, "nll_on", "response")


def test_objectives_declare_what_they_need():
    built = {
        kind.model_fields["kind"].default: build_objective(kind()) for kind in OBJECTIVES.values()
    }
    assert {kind for kind, objective in built.items() if objective.needs_reference} == {
        "dpo",
        "ipo",
    }
    assert {kind for kind, objective in built.items() if not objective.needs_rejected} == {"sft"}
    assert {kind for kind, objective in built.items() if objective.nll_weight} == {
        "orpo",
        "cpo",
        "sft",
    }


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_what_settings_say_of_a_likelihood_term_is_what_the_loss_has(kind):
    for changes in ({}, {"nll_weight": 0.5}, {"nll_weight": 0.0}, {"alpha": 0.0}):
        if changes.keys() <= kind.model_fields.keys():
            config = kind(**changes)
            assert config.has_likelihood == bool(build_objective(config).nll_weight), (
                config.kind,
                changes,
            )


def test_robust_dpo_without_wrong_labels_is_dpo():
    assert preference_of(DpoConfig(loss="robust"), one_pair()) == preference_of(
        DpoConfig(), one_pair()
    )


def test_nll_tokens_follow_the_config():
    for config in (OrpoConfig(nll_on="full"), CpoConfig(nll_on="full"), SftConfig(nll_on="full")):
        assert build_objective(config).nll_on == "full"
    assert build_objective(DpoConfig(nll_weight=1.0, nll_on="full")).nll_on == "full"

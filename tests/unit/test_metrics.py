"""Metrics compared with arithmetic by hand. They do not depend on the settings of a loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import decided, make_artifact, run_config

from orpo_ray.config.objectives import ObjectiveConfig
from orpo_ray.config.objectives.cpo import CpoConfig
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.objectives.sft import SftConfig
from orpo_ray.config.objectives.simpo import SimpoConfig
from orpo_ray.data.store import Artifact
from orpo_ray.objectives import PairLogps, build_objective, loss_parts
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.load import load_pair_model
from orpo_ray.training.metrics import (
    PAIR_METRICS,
    StepMetrics,
    pair_metrics,
    score_pairs,
    sum_metrics,
    summarise,
)
from orpo_ray.training.pair_model import PairModel

PAIRS = PairLogps(
    chosen=torch.tensor([-2.0, -9.0]),
    rejected=torch.tensor([-6.0, -4.0]),
    chosen_tokens=torch.tensor([4, 3]),
    rejected_tokens=torch.tensor([2, 4]),
    nll_sum=torch.tensor([5.0, 11.0]),
    reference_chosen=torch.tensor([-3.0, -8.0]),
    reference_rejected=torch.tensor([-5.0, -5.0]),
)
"""Means per token are -0.5 and -3 for chosen, -3 and -1 for rejected.

So the chosen answer is preferred in the first pair only.
"""


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


RATIOS = [log_odds(-0.5) - log_odds(-3.0), log_odds(-3.0) - log_odds(-1.0)]
BY_HAND = {
    "accuracy": 0.5,
    "margin": (2.5 - 2.0) / 2,
    "chosen_logp": (-0.5 - 3.0) / 2,
    "rejected_logp": (-3.0 - 1.0) / 2,
    "log_odds_ratio": sum(RATIOS) / 2,
}


def step_metrics(config: ObjectiveConfig, weights: tuple[float, ...] = (1.0,)) -> dict[str, float]:
    """Metrics of a step that has one pack for each weight."""
    objective = build_objective(config)
    metrics = StepMetrics(objective, torch.device("cpu"))
    for weight in weights:
        metrics.add(PAIRS, loss_parts(objective, PAIRS, 2, 7), weight)
    return metrics.means(metrics.sums.tolist(), pair_count=2, token_count=7)


def test_sums_over_pairs_by_hand() -> None:
    sums = dict(zip(PAIR_METRICS, pair_metrics(PAIRS).tolist(), strict=True))
    assert sums == pytest.approx({name: 2 * mean for name, mean in BY_HAND.items()}, rel=1e-6)


def test_sums_and_gains_by_hand() -> None:
    """The chosen answers gain 1 and -1 over the reference, the rejected ones 0 and -3."""
    pairs = PairLogps(
        chosen=torch.tensor([-2.0, -3.0]),
        rejected=torch.tensor([-4.0, -5.0]),
        chosen_tokens=torch.tensor([2, 3]),
        rejected_tokens=torch.tensor([2, 5]),
        nll_sum=torch.tensor([2.0, 3.0]),
    )
    assert sum_metrics(pairs).tolist() == [-5.0, -9.0, -5.0, -9.0, 2.0]
    compared = replace(
        pairs,
        reference_chosen=torch.tensor([-3.0, -2.0]),
        reference_rejected=torch.tensor([-4.0, -2.0]),
    )
    assert sum_metrics(compared).tolist() == [-5.0, -9.0, 0.0, -3.0, 2.0]


def test_an_equal_pair_is_not_preferred() -> None:
    equal = replace(PAIRS, chosen=torch.tensor([-2.0, -3.0]), rejected=torch.tensor([-1.0, -4.0]))
    assert pair_metrics(equal)[0].item() == 0.0


def test_a_step_by_hand() -> None:
    """ORPO at lambda 0.5. The NLL is 16/7 per token.

    The preference term is lambda times the mean of -log sigmoid(log odds ratio).
    """
    preference = 0.5 * sum(math.log(1 + math.exp(-ratio)) for ratio in RATIOS) / 2
    expected = {**BY_HAND, "nll": 16 / 7, "preference_share": preference / (preference + 16 / 7)}
    assert step_metrics(OrpoConfig(**{"lambda": 0.5})) == pytest.approx(expected, rel=1e-6)


def test_packs_of_weight_zero_do_not_count() -> None:
    config = OrpoConfig()
    assert step_metrics(config, (1.0, 0.0, 0.0)) == step_metrics(config)


def test_two_packs_add_up() -> None:
    objective = build_objective(OrpoConfig())
    metrics = StepMetrics(objective, torch.device("cpu"))
    for part in (slice(0, 1), slice(1, 2)):
        names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens", "nll_sum")
        pack = PairLogps(**{name: getattr(PAIRS, name)[part] for name in names})
        metrics.add(pack, loss_parts(objective, pack, 2, 7), 1.0)
    assert metrics.means(metrics.sums.tolist(), 2, 7) == pytest.approx(
        step_metrics(OrpoConfig()), rel=1e-6
    )


@pytest.mark.parametrize(
    "config",
    [
        OrpoConfig(**{"lambda": 0.0}),
        OrpoConfig(**{"lambda": 10.0}),
        DpoConfig(beta=0.01),
        OrpoConfig(**{"lambda": 0.5}, nll_weight=0.0, beta=0.3),
        DpoConfig(beta=5.0, label_smoothing=0.3),
        DpoConfig(beta=5.0, loss="sigmoid-norm"),
        DpoConfig(beta=5.0, loss="apo-zero"),
        DpoConfig(beta=5.0, loss="apo-down"),
        DpoConfig(beta=5.0, loss="nca"),
        SimpoConfig(beta=10.0, gamma_beta_ratio=1.0),
        CpoConfig(beta=3.0, alpha=0.0),
    ],
)
def test_metrics_depend_on_neither_lambda_nor_beta(config: ObjectiveConfig) -> None:
    metrics = step_metrics(config)
    share = metrics.pop("preference_share")
    assert metrics == pytest.approx({**BY_HAND, "nll": 16 / 7}, rel=1e-6)
    assert 0.0 <= share <= 1.0


def test_sft_has_no_rejected_side_to_report() -> None:
    assert step_metrics(SftConfig()) == {"nll": pytest.approx(16 / 7)}


def test_an_evaluation_by_hand() -> None:
    """The NLL is the sum over all chosen answers, 11, divided by their 7 tokens."""
    columns = (PAIRS.chosen, PAIRS.rejected, PAIRS.chosen_tokens, PAIRS.rejected_tokens)
    scores = PairScores(*(column.double().numpy() for column in columns))
    assert summarise(scores) == pytest.approx({**BY_HAND, "nll": 11 / 7}, rel=1e-7)


# --- scoring a table ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("prepared"), train=2, evaluation=12)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> PairModel:
    """A model with so much dropout that scores with dropout would differ."""
    config = run_config(artifact.path, adapter={"dropout": 0.9}, model={"quantization": "none"})
    decisions = decided(1)
    model = load_pair_model(config, decisions, lambda line: None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def test_scores_are_in_the_order_of_the_table_whatever_the_budget(
    model: PairModel, artifact: Artifact
) -> None:
    alone = [
        score_pairs(model, Only(artifact, index), 0, 10_000) for index in range(len(artifact.eval))
    ]
    for budget in (1, 200, 100_000):
        together = score_pairs(model, artifact.eval, 0, budget)
        np.testing.assert_allclose(together.chosen, [one.chosen[0] for one in alone], rtol=1e-5)
        np.testing.assert_allclose(together.rejected, [one.rejected[0] for one in alone], rtol=1e-5)
        np.testing.assert_array_equal(together.chosen_tokens, artifact.eval.lengths[:, 1])
        np.testing.assert_array_equal(together.rejected_tokens, artifact.eval.lengths[:, 2])


class Only:
    """A table of one pair."""

    def __init__(self, artifact: Artifact, index: int) -> None:
        self._pair = artifact.eval[index]
        self.lengths = artifact.eval.lengths[index : index + 1]
        self.trained = artifact.eval.trained[index : index + 1]
        self.pair_ids = artifact.eval.pair_ids[index : index + 1]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return self._pair


@pytest.mark.parametrize("training", [True, False])
def test_scoring_has_neither_dropout_nor_gradient_and_leaves_the_mode_as_it_was(
    training: bool, model: PairModel, artifact: Artifact
) -> None:
    model.train(training)
    before = torch.get_rng_state()
    one, two = score_pairs(model, artifact.eval, 0, 500), score_pairs(model, artifact.eval, 0, 500)
    np.testing.assert_array_equal(one.chosen, two.chosen)
    assert torch.equal(before, torch.get_rng_state()), (
        "a resumed run evaluates at other times than an unbroken one"
    )
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())

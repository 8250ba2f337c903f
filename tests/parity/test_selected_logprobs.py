"""Selected log-probs and their gradients in every layout, compared with log_softmax of full logits.

Seven families of models are tried. They have grouped queries (all but GPT2), tied embeddings
(Qwen2), absolute positions (GPT2), a soft cap of logits, and experts.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from orpo_ray.data.pairs import TokenPair
from orpo_ray.errors import ConfigError
from orpo_ray.training import logprobs
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch, collate
from orpo_ray.training.logprobs import SelectedLogProbs, pair_logps, tile_of
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX

TOLERANCE = 1e-6
VOCABULARY = 211
PAD = 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_LIKE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.1}
FAMILIES = {
    "Llama": LLAMA_LIKE,
    "Qwen2": {**LLAMA_LIKE, "tie_word_embeddings": True},
    "GPT2": {
        **SIZES,
        "n_positions": 64,
        "initializer_range": 0.1,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "Gemma2": {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 5.0},
    "Cohere": {**LLAMA_LIKE, "logit_scale": 0.25},
    "Granite": {**LLAMA_LIKE, "logits_scaling": 3.0, "attention_multiplier": 8**-0.5},
    "Mixtral": {**LLAMA_LIKE, "num_local_experts": 3, "num_experts_per_tok": 2},
}
LAYOUTS = (PADDED, PACKED, SHARED_PREFIX)
IN_LAYOUTS = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
LENGTHS = [(5, 3, 7), (2, 9, 1), (11, 2, 4)]  # prompt, chosen, rejected
RAGGED = [*LENGTHS, (1, 1, 3), (1, 2, 1), (3, 1, 1)]
"""With prompts and answers of one token."""


def make_model(family: str) -> PreTrainedModel:
    """A tiny model of a family with random weights and no dropout.

    Its pad and end tokens are inside the small vocabulary.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES[family], bos_token_id=1, eos_token_id=2, pad_token_id=PAD
    )
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model: PreTrainedModel, targets: str | list[str]) -> nn.Module:
    """The model with a LoRA adapter whose B matrices are not zero."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules=targets)
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def make_pairs(lengths: list[tuple[int, int, int]] = LENGTHS) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    draw = [
        [rng.integers(4, VOCABULARY, size=n, dtype=np.int32) for n in three] for three in lengths
    ]
    return [TokenPair.of_answers(str(i), *sides) for i, sides in enumerate(draw)]


def cut(monkeypatch: pytest.MonkeyPatch, rows: int, entries: int) -> None:
    """Tiles of so many rows and entries of the vocabulary."""
    monkeypatch.setattr(logprobs, "ROWS_PER_TILE", rows)
    monkeypatch.setattr(logprobs, "LOGITS_PER_TILE", rows * entries)


def make_batch() -> PairBatch:
    return collate(make_pairs(), PADDED, PAD, score_prompt=True)


def in_order(log_probs: Tensor, batch: PairBatch) -> Tensor:
    """The order of scored tokens by pair and part, which is the same for every layout."""
    return log_probs[torch.argsort(batch.pair * 3 + batch.part, stable=True)]


def widen(batch: PairBatch, extra: int, token: int) -> PairBatch:
    """The same rows with `extra` more padding on the right, of any token."""
    width = batch.input_ids.shape[1]
    return replace(
        batch,
        input_ids=nn.functional.pad(batch.input_ids, (0, extra), value=token),
        attention_mask=nn.functional.pad(batch.attention_mask, (0, extra), value=0),
        positions=batch.positions + batch.positions // width * extra,
    )


def from_full_logits(model: nn.Module, batch: PairBatch) -> Tensor:
    """The oracle: log-probs of the scored tokens from all logits of the model itself."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    log_probs = logits.log_softmax(-1).flatten(0, 1)
    return log_probs[batch.positions, batch.targets]


def gradients_of(model: nn.Module, log_probs: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum of log-probs in all that is trained."""
    model.zero_grad()
    (log_probs * torch.linspace(-1, 2, len(log_probs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_values(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All gradients as one vector.

    In a small tensor alone, round-off of the whole backward pass is large.
    """
    assert found.keys() == expected.keys() and found
    assert all(gradient.norm() > 0 for gradient in expected.values())
    ours, theirs = (
        torch.cat([gradients[name].flatten() for name in expected])
        for gradients in (found, expected)
    )
    assert ((ours - theirs).norm() / theirs.norm()).item() < TOLERANCE


@pytest.mark.parametrize("tile", [(1, 211), (5, 7), (23, 1), (23, 100), (1000, 1000)])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.3, None), (1.0, 4.0), (0.5, 2.0)])
def test_the_scorer_equals_log_softmax_of_full_logits(
    tile, trainable, bias, scale, soft_cap, monkeypatch
):
    cut(monkeypatch, *tile)
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=bias).requires_grad_(trainable)
    hidden = torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(VOCABULARY, (23,))
    scorer = SelectedLogProbs(head, VOCABULARY, scale, soft_cap)

    def expected_log_probs() -> Tensor:
        logits = head(hidden) * scale
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        return logits.log_softmax(-1)[torch.arange(23), targets]

    def gradients(log_probs: Tensor) -> dict[str, Tensor]:
        hidden.grad = None
        return gradients_of(head, log_probs) | {"hidden": hidden.grad}

    assert_same_values(scorer(hidden, targets), expected_log_probs())
    expected = gradients(expected_log_probs())
    assert_same_gradients(gradients(scorer(hidden, targets)), expected)
    assert set(expected) == {
        "hidden",
        *(name for name, p in head.named_parameters() if p.requires_grad),
    }


@pytest.mark.parametrize("grad", [True, False])
def test_a_trained_head_never_sees_more_rows_than_a_tile(grad, monkeypatch):
    cut(monkeypatch, 10, VOCABULARY)

    class Recorder(nn.Linear):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, hidden: Tensor) -> Tensor:
            self.seen.append(len(hidden))
            return super().forward(hidden)

    head = Recorder(16, VOCABULARY)
    scorer = SelectedLogProbs(head, VOCABULARY)
    with torch.set_grad_enabled(grad):
        scorer(torch.randn(23, 16, requires_grad=True), torch.randint(VOCABULARY, (23,)))
    assert head.seen == [10, 10, 3]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "tile"),
    [
        (50, 1_400, (50, 1_400)),
        (20_000, 1_400, (11_983, 1_400)),
        (600, 32_000, (600, 27_962)),
        (3_000, 32_000, (1_024, 16_384)),
        (3_000, 262_144, (1_024, 16_384)),
        (1, 2**30, (1, 2**24)),
    ],
)
def test_a_tile_has_many_rows_and_as_much_of_the_vocabulary_as_fits(rows, vocabulary, tile):
    assert tile_of(rows, vocabulary) == tile
    assert tile[0] * tile[1] <= logprobs.LOGITS_PER_TILE


def test_logits_far_below_the_largest_do_no_harm(monkeypatch):
    """The largest logit comes in the last tile, or in the first, and differs by thousands."""
    cut(monkeypatch, 4, 2)
    head = nn.Linear(8, 8, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(8))
    for order in (torch.arange(8.0), -torch.arange(8.0)):
        hidden = (1000 * order).repeat(4, 1).requires_grad_()
        targets = torch.tensor([0, 3, 6, 7])
        found = SelectedLogProbs(head, 8)(hidden, targets)
        expected = head(hidden).log_softmax(-1)[torch.arange(4), targets]
        torch.testing.assert_close(found, expected)
        (ours,) = torch.autograd.grad(found.sum(), hidden)
        (theirs,) = torch.autograd.grad(expected.sum(), hidden)
        torch.testing.assert_close(ours, theirs)


def from_padded_rows(pair_model: PairModel, pairs: list[TokenPair]) -> Tensor:
    """The oracle for every layout: full logits of padded rows, by the model's own attention."""
    pair_model.use_layout(PADDED)
    batch = collate(pairs, PADDED, PAD, score_prompt=True)
    return in_order(from_full_logits(pair_model.model, batch), batch)


def by_layout(pair_model: PairModel, layout: str, pairs: list[TokenPair]) -> Tensor:
    pair_model.use_layout(layout)
    batch = collate(pairs, layout, PAD, score_prompt=True)
    return in_order(pair_model(batch), batch)


@pytest.mark.parametrize(("family", "layout"), IN_LAYOUTS)
@pytest.mark.parametrize("tile", [(1, 50), (7, VOCABULARY), (10_000, 10_000)])
def test_log_probs_and_adapter_gradients_of_a_frozen_head_equal_those_of_full_logits(
    family, layout, tile, monkeypatch
):
    cut(monkeypatch, *tile)
    model, pairs = adapted(make_model(family), "all-linear"), make_pairs(RAGGED)
    pair_model = PairModel(model)
    assert pair_model.scorer.is_frozen
    assert_same_values(by_layout(pair_model, layout, pairs), from_padded_rows(pair_model, pairs))
    found = gradients_of(model, by_layout(pair_model, layout, pairs))
    assert_same_gradients(found, gradients_of(model, from_padded_rows(pair_model, pairs)))
    assert all("lora_" in name for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_activations_give_the_same_gradients(layout):
    model, pairs = adapted(make_model("Llama"), "all-linear"), make_pairs(RAGGED)
    pair_model = PairModel(model)
    model.train()
    plain = gradients_of(model, by_layout(pair_model, layout, pairs))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients_of(model, by_layout(pair_model, layout, pairs)), plain)


@pytest.mark.parametrize(("family", "layout"), IN_LAYOUTS)
@pytest.mark.parametrize("rows", [7, 10_000])
def test_gradients_of_a_fully_trained_model_and_its_head_equal_those_of_full_logits(
    family, layout, rows, monkeypatch
):
    cut(monkeypatch, rows, VOCABULARY)
    model, pairs = make_model(family), make_pairs(RAGGED)
    pair_model = PairModel(model)
    assert not pair_model.scorer.is_frozen
    found = gradients_of(model, by_layout(pair_model, layout, pairs))
    assert_same_gradients(found, gradients_of(model, from_padded_rows(pair_model, pairs)))
    head = model.get_output_embeddings().weight
    assert any(parameter is head for name, parameter in model.named_parameters() if name in found)


@pytest.mark.parametrize("rows", [7, 10_000])
def test_a_head_with_an_adapter_of_its_own_is_trained(rows, monkeypatch):
    cut(monkeypatch, rows, VOCABULARY)
    model, batch = adapted(make_model("Llama"), ["q_proj", "lm_head"]), make_batch()
    pair_model = PairModel(model)
    found, expected = (
        gradients_of(model, pair_model(batch)),
        gradients_of(model, from_full_logits(model, batch)),
    )
    assert_same_gradients(found, expected)
    assert any("lm_head" in name for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_nothing_whatever_its_token(family):
    pair_model, batch = PairModel(make_model(family)), make_batch()
    with torch.no_grad():
        for token in (PAD, 17):
            assert_same_values(pair_model(widen(batch, 9, token)), pair_model(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_scores_alike_alone_and_in_company(family):
    pair_model, pairs = PairModel(make_model(family)), make_pairs()
    with torch.no_grad():
        together = pair_logps(pair_model(batch := make_batch()), batch)
        for i, pair in enumerate(pairs):
            one = collate([pair], PADDED, PAD, score_prompt=True)
            alone = pair_logps(pair_model(one), one)
            for name in ("chosen", "rejected", "nll_sum", "chosen_mean", "rejected_mean"):
                assert_same_values(getattr(alone, name)[0], getattr(together, name)[i])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_up_check_knows_the_family(family):
    PairModel(make_model(family)).check_scorer(torch.arange(4, 40), tolerance=1e-5)


def test_a_model_that_changes_its_logits_in_another_way_is_refused():
    class Doubling(LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            output = super().forward(*arguments, **keywords)
            output.logits = 2 * output.logits
            return output

    model = Doubling(LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(
        ConfigError, match=r"^model\.base: Doubling turns hidden states into logits"
    ):
        PairModel(model).check_scorer(torch.arange(4, 40), tolerance=1e-3)


def test_scored_tokens_are_the_answers_and_on_demand_the_prompt_of_the_chosen_side():
    pairs = make_pairs()
    full, answers = make_batch(), collate(pairs, PADDED, PAD, score_prompt=False)
    counts = {part: int((full.part == part).sum()) for part in (PROMPT, CHOSEN, REJECTED)}
    assert counts == {PROMPT: 4 + 1 + 10, CHOSEN: 3 + 9 + 2, REJECTED: 7 + 1 + 4}
    assert (answers.part != PROMPT).all() and len(answers.part) == counts[CHOSEN] + counts[REJECTED]
    for batch in (full, answers):
        # Every scored token stands one place after the position that predicts it, in the same row.
        assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.targets)
        for i, pair in enumerate(pairs):
            mine = batch.pair == i
            assert batch.targets[mine & (batch.part == CHOSEN)].tolist() == pair.chosen.tolist()
            assert batch.targets[mine & (batch.part == REJECTED)].tolist() == pair.rejected.tolist()
    assert (
        full.targets[(full.pair == 2) & (full.part == PROMPT)].tolist()
        == pairs[2].prompt[1:].tolist()
    )


def test_pair_sums_add_up_the_tokens_of_each_answer():
    batch = make_batch()
    ones = pair_logps(-torch.ones(len(batch.targets)), batch)
    assert ones.chosen.tolist() == [-3, -9, -2]
    assert ones.rejected.tolist() == [-7, -1, -4]
    assert ones.nll_sum.tolist() == [3 + 4, 9 + 1, 2 + 10]
    assert ones.chosen_mean.tolist() == ones.rejected_mean.tolist() == [-1, -1, -1]


def test_without_rejected_answers_only_the_chosen_rows_are_run():
    batch = collate(make_pairs(), PADDED, PAD, score_prompt=False, with_rejected=False)
    assert batch.input_ids.shape == (3, 13)
    assert (batch.part == CHOSEN).all()
    pair_model = PairModel(make_model("Llama"))
    with torch.no_grad():
        alone = pair_logps(pair_model(batch), batch)
        both = pair_logps(pair_model(whole := make_batch()), whole)
    assert_same_values(alone.chosen, both.chosen)
    assert alone.rejected.tolist() == [0, 0, 0]

"""The model as training sees it: a batch of pairs in, the log-probs of its scored tokens out."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_ray.data.held import Pairs
from orpo_ray.errors import ConfigError
from orpo_ray.models.start import Start
from orpo_ray.training.attention import RUNS_ATTENTION
from orpo_ray.training.attention_kernels import attention_path
from orpo_ray.training.layout import PairBatch
from orpo_ray.training.logprobs import SelectedLogProbs
from orpo_ray.training.plan import Layout, longer_side


class PairModel(nn.Module):
    """A causal language model whose head scores selected tokens only.

    Each pack is one forward pass.
    """

    def __init__(
        self, model: PeftModel | PreTrainedModel, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.model = model
        causal = self.causal_model
        text_config = causal.config.get_text_config()
        self.autocast = autocast
        self.layout = Layout.PADDED
        self.start: Start = {}
        """What the adapter took out of the base at its start."""
        self._own_attention = causal.config._attn_implementation
        self.scorer = SelectedLogProbs(
            causal.get_output_embeddings(),
            text_config.vocab_size,
            scale=_logit_scale(text_config),
            soft_cap=getattr(text_config, "final_logit_softcapping", None),
        )

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model below the adapter."""
        below: Any = (
            self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        )
        model: PreTrainedModel = below
        return model

    @property
    def body(self) -> nn.Module:
        """The language model without its head, from token ids to hidden states.

        Raises ConfigError if the base does not keep it as a module of its own.
        """
        causal = self.causal_model
        if causal.base_model is not causal:
            return causal.base_model
        # Some bases name their inner model otherwise than their class says, such as Llama 4.
        embedding = causal.get_input_embeddings()
        for child in causal.children():
            if isinstance(child, PreTrainedModel) and child.get_input_embeddings() is embedding:
                return child
        raise ConfigError(
            f"model.base: {type(causal).__name__} has no inner model without a head, which is "
            "needed here; take a base of another family"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal_model.device

    @property
    def attention_path(self) -> str:
        """How attention over the runs of a row is computed on this device."""
        config = self.causal_model.config.get_text_config()
        heads = config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return attention_path(self.device, self.autocast or torch.float32, group, head_dim)

    def use_layout(self, layout: Layout) -> None:
        """Take batches of this layout from now on; a new model takes padded ones."""
        self.layout = layout
        attention = self._own_attention if layout.pads else RUNS_ATTENTION
        self.causal_model.set_attn_implementation(attention)

    def forward(self, batch: PairBatch) -> Tensor:
        """Log-probs [N] of the batch's scored tokens, float32."""
        assert (batch.runs is None) == self.layout.pads, (
            f"a batch for another layout than {self.layout}"
        )
        # Passed only if the batch has them: not every model knows them.
        own = {"position_ids": batch.position_ids, "runs": batch.runs} if batch.runs else {}
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            output = self.body(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **own,
            )
            hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
            log_probs: Tensor = self.scorer(hidden, batch.targets)
        return log_probs if batch.computed is None else log_probs.index_select(0, batch.computed)

    def read(self, batch: dict[str, Tensor]) -> None:
        """Run the body on padded rows. Nothing is returned: hooks on its layers see what they read.

        The model still takes padded batches.
        """
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            self.body(**batch, use_cache=False)

    @property
    def positions(self) -> int | None:
        """How many tokens the base reads, or None if its configuration does not say it."""
        return getattr(self.causal_model.config.get_text_config(), "max_position_embeddings", None)

    def check_reads(self, table: Pairs) -> None:
        """Raise ConfigError if a pair is too long for the base, or has tokens that it lacks."""
        longest = int(longer_side(table.lengths).max())
        if self.positions is not None and longest > self.positions:
            raise ConfigError(
                f"data.max_length: the longest pair has {longest} tokens, but the base reads "
                f"{self.positions}; set data.max_length={self.positions}"
            )
        embedding: Any = self.causal_model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        if table.largest_token_id >= rows:
            raise ConfigError(
                f"model.base: its tokenizer writes token {table.largest_token_id}, but its "
                f"embedding has {rows} rows"
            )

    @torch.no_grad()
    def check_scorer(self, token_ids: Tensor, tolerance: float) -> None:
        """Compare the scorer with the model's own logits on a few tokens.

        Raises ConfigError for a model that changes its logits in an unknown way. The model is in
        evaluation mode afterwards.
        """
        self.eval()
        ids = token_ids[None].to(self.device)
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            logits = self.causal_model(input_ids=ids, use_cache=False).logits
            expected = logits[0, :-1].float().log_softmax(-1)
            output = self.body(input_ids=ids, use_cache=False)
            found = self.scorer(output.last_hidden_state[0, :-1], ids[0, 1:])
        if not expected.isfinite().all():
            raise ConfigError(
                "model.base: its log-probs are not finite; there are bad numbers among its weights"
            )
        difference = (found - expected.gather(-1, ids[0, 1:, None]).squeeze(-1)).abs().max().item()
        if not difference <= tolerance:
            raise ConfigError(
                f"model.base: {type(self.causal_model).__name__} turns hidden states into logits "
                f"in a way that is not supported (log-probs differ by {difference:.2g})"
            )


def _logit_scale(text_config: object) -> float:
    """What logits are multiplied by: Cohere names the factor, Granite the divisor."""
    factor: float | None = getattr(text_config, "logit_scale", None)
    divisor: float | None = getattr(text_config, "logits_scaling", None)
    return factor or 1.0 / (divisor or 1.0)

"""A row of published measurements, read as what a stock engine trained.

Nothing is guessed: a row that does not say what the law needs raises CannotTellError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from orpo_ray.errors import CannotTellError, ConfigError
from orpo_ray.planner.hardware import Gpu, load_gpus
from orpo_ray.planner.published import Base, base_of_size, find_base, make_base
from orpo_ray.planner.shapes import known_shape
from orpo_ray.planner.stock import (
    FLOAT,
    GPTQ,
    GPTQ_UNGROUPED,
    HALF,
    INT8,
    LITGPT,
    NF4,
    NF4_DOUBLE,
    SIXTEEN_BITS,
    STOCK,
    STOCK_2024,
    Stack,
    Training,
    Weights,
)

_METHODS: dict[str, Weights] = {
    "qlora-nf4": NF4,
    "qlora-nf4-dq": NF4_DOUBLE,
    "qlora-int8": INT8,
    "gptq": GPTQ,
    "lora-fp16": SIXTEEN_BITS,
    "lora-bf16": SIXTEEN_BITS,
    "lora-16bit": SIXTEEN_BITS,
    "full-bf16": SIXTEEN_BITS,
    "full-fp16": SIXTEEN_BITS,
}
_ATTENTIONS = ("eager", "sdpa", "flash2")
# transformers 4.46 came on that day. A source says when it was measured, and rarely with what.
_TRANSFORMERS_4_46 = date(2024, 10, 24)
_DATE = re.compile(r"\b(20\d\d)-(\d\d)-(\d\d)\b")
_GPU_NAMES = {
    "a100": "a100-80",
    "h100": "h100-sxm",
    "h100-80": "h100-sxm",
    "a5000-24": "rtxa5000",
    "a6000ada-48": "rtx6000ada",
}
_OTHER_HEADS = (64, 80, 96, 128, 256)
# Sizes and `parameters_b` may differ by what the sizes do not say, such as biases.
_SIZE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """One row of a CSV file: its texts by column, and where it stands."""

    texts: Mapping[str, str]
    file: str
    line: int

    @property
    def name(self) -> str:
        """The number that the file gives the row."""
        return self.text("row") or f"line {self.line}"

    def text(self, column: str) -> str:
        """The text of a column; empty where the file leaves it out."""
        return (self.texts.get(column) or "").strip()

    def number(self, column: str) -> float | None:
        """The number of a column, None where it is empty. Raises ConfigError for another text."""
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{self.file}: row {self.name}: {column}: {text} is not a number")
        return value

    def needed(self, column: str) -> float:
        """A number without which nothing can be said."""
        value = self.number(column)
        if not value:
            raise CannotTellError(f"{column} is not stated")
        return value

    def stated(self, column: str) -> str:
        """A text without which nothing can be said."""
        text = self.text(column)
        if not text:
            raise CannotTellError(f"{column} is not stated")
        return text


def read_training(row: Row) -> Training:
    """What a row's run trained. Raises CannotTellError where the row does not say, or where the
    program is none that the law is for.
    """
    stack, weights = _stack(row), _weights(row)
    is_full = row.text("method").startswith("full")
    sharded = any(word in row.text("strategy") for word in ("fsdp", "zero3"))
    has_float_stream = weights.kind == "bitsandbytes" and not sharded and _is_prepared(row, stack)
    autocast = _has_autocast(row)
    trained_bytes = HALF if is_full or "pure" in row.text("precision") else FLOAT
    base = _base(row)
    return Training(
        base=base,
        stack=stack,
        weights=GPTQ_UNGROUPED if weights is GPTQ and base.ungrouped else weights,
        rank=0 if is_full else round(row.needed("rank")),
        targets=() if is_full else _targets(row, base),
        batch=round(row.needed("batch")),
        sequence=round(row.needed("sequence")),
        checkpointing=_flag(row, "checkpointing"),
        attention=_attention(row),
        stream=FLOAT if has_float_stream else HALF,
        autocast=autocast,
        trained_bytes=trained_bytes,
        state_bytes=_state_bytes(row, trained_bytes),
        gpus=_gpus(row),
        sharded=sharded,
        offloaded="offload" in row.text("strategy"),
        loads_whole=sharded and weights is GPTQ,
    )


def find_gpu(row: Row) -> Gpu | None:
    """The GPU of a row, None if the table does not have it."""
    name = row.text("gpu").lower()
    return load_gpus().get(_GPU_NAMES.get(name, name))


def _stack(row: Row) -> Stack:
    written = row.stated("stack")
    for other in ("unsloth", "torchtune"):
        if other in written:
            raise CannotTellError(f"{other} has kernels of its own, and the law is for stock ones")
    if "litgpt" in written:
        return LITGPT
    found = _DATE.search(row.text("source"))
    measured = date(*map(int, found.groups())) if found else None
    if "trl" in written and measured and measured < _TRANSFORMERS_4_46:
        return STOCK_2024
    return STOCK


def _weights(row: Row) -> Weights:
    method = row.stated("method")
    if method not in _METHODS:
        raise CannotTellError(f"the law has no terms for the method {method}")
    return _METHODS[method]


def _is_prepared(row: Row, stack: Stack) -> bool:
    """Whether PEFT's prepare_model_for_kbit_training made the hidden states float32."""
    written = row.text("stack")
    own_ways = ("no fp32 up-cast", "fms", "fsdp_qlora")
    return stack is not LITGPT and not any(way in written for way in own_ways)


def _has_autocast(row: Row) -> bool:
    """A Trainer has it unless the row says `pure`; a loop of one's own if the row says `amp`."""
    precision, own_loop = row.text("precision"), row.text("stack").startswith("transformers")
    if "pure" in precision:
        return False
    return "amp" in precision or not precision or not own_loop


def _targets(row: Row, base: Base) -> tuple[str, ...]:
    written = row.stated("targets")
    if written == "all-linear":
        return tuple(each.name for each in base.matrices)
    targets = tuple(written.split())
    try:
        base.targeted(targets)
    except ConfigError as error:
        raise CannotTellError(str(error)) from error
    return targets


def _attention(row: Row) -> str:
    attention = row.stated("attention")
    if attention not in _ATTENTIONS:
        raise CannotTellError(f"the law has no terms for the attention {attention}")
    return attention


def _flag(row: Row, column: str) -> bool:
    written = row.stated(column).lower()
    if written not in ("true", "false"):
        raise ConfigError(
            f"{row.file}: row {row.name}: {column}: {written} is neither true nor false"
        )
    return written == "true"


def _state_bytes(row: Row, trained_bytes: int) -> int:
    """Bytes of the optimizer's states for one trained number on the GPU.

    AdamW has two of the trained number's type, its 8-bit kind two bytes. The paged kind keeps them
    in memory that torch does not count. A row that names none has AdamW, every stack's default.
    """
    optimizer = row.text("optimizer").lower()
    if optimizer and "adam" not in optimizer:
        raise CannotTellError(f"the law has no terms for the optimizer {optimizer}")
    if "paged" in optimizer:
        return 0
    return 2 if "8bit" in optimizer else 2 * trained_bytes


def _gpus(row: Row) -> int:
    gpus = round(row.number("gpus") or 1)
    if gpus > 1:
        row.stated("strategy")
    return gpus


def _base(row: Row) -> Base:
    """The base by the row's own sizes, by its hub id, or by its number of parameters."""
    columns = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")
    numbers = {column: row.number(column) for column in columns}
    known = find_base(row.text("model"))
    parameters = (row.number("parameters_b") or 0.0) * 1e9
    if all(numbers.values()):
        sizes: dict[str, Any] = {column: round(value or 0) for column, value in numbers.items()}
        sizes |= {"vocabulary": sizes.pop("vocab"), "tied": _flag(row, "tied")}
        return _with_parameters(sizes | _unsaid(row, known), parameters)
    if known:
        return known
    if shaped := _like_shape(row.text("model")):
        return shaped
    if not parameters:
        raise CannotTellError("neither the base nor its number of parameters is known")
    return base_of_size(parameters)


def _unsaid(row: Row, known: Base | None) -> dict[str, Any]:
    """What the columns do not say: names of layers, and what the tables know of the base."""
    sizes: dict[str, Any] = {"names": "qwen"} if "c_attn" in row.text("targets") else {}
    if known:
        return sizes | {
            "head_size": known.head_size,
            "experts": known.experts,
            "active_experts": known.active_experts,
            "positions": known.positions,
            "ungrouped": known.ungrouped,
        }
    shape = known_shape(row.text("model"))
    return sizes | ({"head_size": shape.head_size} if shape else {})


def _with_parameters(sizes: dict[str, Any], parameters: float) -> Base:
    """The base whose sizes have that many numbers: with other heads if they must be."""
    base = make_base(sizes)
    if not parameters:
        return base
    others = [make_base(sizes | {"head_size": size}) for size in _OTHER_HEADS]
    for each in (base, *others):
        if abs(each.total / parameters - 1) < _SIZE_TOLERANCE:
            return replace(each, others=round(parameters) - each.linear)
    raise CannotTellError(
        f"its sizes make {base.total / 1e9:.2f} billion numbers, and parameters_b says "
        f"{parameters / 1e9:.2f}; is it a mixture of experts?"
    )


def _like_shape(model: str) -> Base | None:
    """A base of the planner's table of shapes."""
    shape = known_shape(model)
    if shape is None:
        return None
    if shape.experts:
        raise CannotTellError(f"{model} is a mixture of experts that the law was never tested on")
    return make_base(
        {
            "layers": shape.layers,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_size": shape.head_size,
            "vocabulary": shape.vocabulary,
            "tied": shape.tied,
        }
    )

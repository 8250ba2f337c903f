"""How much GPU memory a stock engine (TRL, PEFT, transformers) needs at its peak.

The published law is `peak = W + L x T x H x c + max(4 k T V, one layer) + 16 B a LoRA parameter`:
W weights, L layers, T tokens of a micro-batch, H hidden size, V vocabulary. Its c, its k and its
layer are counted here from what the code of such an engine keeps, tensor by tensor. So they hold
for shapes, lengths and methods that nobody measured. A step has moments that never meet: the loss
over the vocabulary, the backward pass of a layer, and the optimizer's step. The peak is the largest
of them.
"""

from dataclasses import dataclass

from orpo_ray.planner.published import Base, Matrix

HALF, FLOAT = 2, 4
_GIB, _MIB, _KIB = 2**30, 2**20, 2**10
# cuBLAS takes 2 x 4096 KiB + 8 x 16 KiB for each thread that multiplies: the forward pass' and
# the backward pass' (torch's notes on CUDA, CUBLAS_WORKSPACE_CONFIG).
CUBLAS_WORKSPACE = 2 * 8320 * _KIB
# Tokens choose experts unevenly: the largest expert gets about twice its share.
LARGEST_EXPERT = 2.0
# torch keeps freed blocks. A block of one moment does not fit the next moment's tensors, least of
# all the squares of eager attention. So a part of what comes and goes is reserved a second time.
# The rows have 0.05 to 0.3 of it, with eager attention 0.1 to 0.6: these are the middles.
_SLACK, _EAGER_SLACK = 0.2, 0.34
# What a process takes beside torch's blocks: the CUDA context and loaded kernels. fitcheck read
# 141 MiB on a T4; larger GPUs with FlashAttention need about half a GiB. NCCL's buffers for one
# process of several: its channels, and the streams of FSDP.
_CONTEXT = {"t4": 141 * _MIB}
_USUAL_CONTEXT = _GIB // 2
_NCCL = 700 * _MIB


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes that one number of a linear layer takes: packed, and the scales beside it.

    FSDP shares out what is packed. Every GPU holds all scales, which belong to no parameter. `kind`
    says whose kernels multiply it.
    """

    kind: str
    packed: float
    scales: float = 0.0

    @property
    def is_quantised(self) -> bool:
        """Whether they are dequantised before each use."""
        return self.packed < HALF


# NF4: a float32 scale for 64 numbers; double quantisation makes it a byte, and has a float32 for
# 256 of these (QLoRA, arXiv 2305.14314). GPTQ: a 16-bit scale and a 4-bit zero for 128 numbers, or
# for a row, which does not show. LLM.int8: a scale for a row.
NF4 = Weights(kind="bitsandbytes", packed=0.5, scales=4 / 64)
NF4_DOUBLE = Weights(kind="bitsandbytes", packed=0.5, scales=1 / 64 + 4 / (64 * 256))
GPTQ = Weights(kind="gptq", packed=0.5, scales=2.5 / 128)
GPTQ_UNGROUPED = Weights(kind="gptq", packed=0.5)
INT8 = Weights(kind="bitsandbytes", packed=1.0)
SIXTEEN_BITS = Weights(kind="torch", packed=HALF)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A training program, by what it keeps in memory.

    `keeps_output`: it holds the logits through the backward pass. `loss` is in bytes a logit: what
    the loss makes of the logits, and their gradient. `rotary_tables`: each layer holds its table of
    positions. `keeps_inputs`: its bitsandbytes keeps the inputs of 4-bit layers. `beyond` is in
    bytes a token, layer and hidden number: what a layer saves beyond what is counted here;
    `beyond_quantised` comes to it where the base is quantised.
    """

    name: str
    keeps_output: bool
    loss: int
    rotary_tables: bool = False
    keeps_inputs: bool = False
    beyond: float = 0.0
    beyond_quantised: float = 0.0


# The loss of transformers: log-probabilities, the gradient that NLL gives them and the one that
# softmax makes of it, in float32; and the logits, which the output or the loss still holds. These
# are 16 bytes a logit, or 14 of a 16-bit head: k = 4 and 3.5 of the law.
STOCK = Stack(name="transformers", keeps_output=True, loss=3 * FLOAT)
# transformers before 4.46 made the logits float32 at once, and its Trainer dropped them before the
# backward pass (k = 3); each layer had a rotary table (4.40). MatMul4Bit of bitsandbytes 0.43 kept
# its input.
STOCK_2024 = Stack(
    name="transformers before 4.46",
    keeps_output=False,
    loss=3 * FLOAT,
    rotary_tables=True,
    keeps_inputs=True,
)
# litgpt computes the loss in chunks: 16-bit logits and log-probabilities stay. A layer saves
# the fused query, key and value (4) and dropout's mask (1) on top, and 5 that we cannot explain;
# micro-batches 1 and 2 of its table show them. With 4-bit layers it is 5 more.
LITGPT = Stack(
    name="litgpt",
    keeps_output=False,
    loss=2 * HALF,
    keeps_inputs=True,
    beyond=10.0,
    beyond_quantised=5.0,
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a stock engine trains, and how.

    `stream` is the bytes of a number of the hidden states between layers: 4 where PEFT has prepared
    a quantised base (it makes norms and embeddings float32), else 2. `trained_bytes` is the bytes
    of a trained number, `state_bytes` those of its optimizer states on the GPU. `rank` 0 trains all
    weights. `sharded` is FSDP or ZeRO-3; `loads_whole`: each GPU loads all before it shares out.
    """

    base: Base
    stack: Stack
    weights: Weights
    rank: int
    targets: tuple[str, ...]
    batch: int
    sequence: int
    checkpointing: bool
    attention: str
    stream: int
    autocast: bool
    trained_bytes: int
    state_bytes: int
    gpus: int = 1
    sharded: bool = False
    offloaded: bool = False
    loads_whole: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return self.batch * self.sequence

    @property
    def trained(self) -> int:
        """The number of trained numbers."""
        return self.base.lora(self.rank, self.targets) if self.rank else self.base.total

    @property
    def parts(self) -> int:
        """How many GPUs share out the weights and what is trained."""
        return self.gpus if self.sharded else 1

    @property
    def attention_bytes(self) -> int:
        """Bytes of a number in attention: autocast computes in 16 bits."""
        return HALF if self.autocast else self.stream

    @property
    def adapter_input(self) -> int:
        """Bytes of a number that a LoRA layer multiplies: autocast's, or the adapter's own."""
        return HALF if self.autocast else self.trained_bytes


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of one GPU. `resident` is there all the time; `loss`, `layer` and `optimizer` are
    moments of a step, `loading` is before the first one.
    """

    resident: float
    inputs: float
    loss: float
    layer: float
    optimizer: float
    loading: float

    @property
    def activations(self) -> float:
        """What comes and goes in a step, at its largest."""
        return max(self.inputs + max(self.loss, self.layer), self.optimizer)

    @property
    def allocated(self) -> float:
        """The peak of torch's allocated bytes."""
        return max(self.resident + self.activations, self.loading)


def predict_peak(training: Training) -> Peak:
    """The memory of one GPU at the moments of a step, in bytes."""
    own = training.trained_bytes * training.trained / training.parts
    resident = weight_bytes(training) + _trained_bytes(training) + _gathered_bytes(training)
    whole = _whole_bytes(training) + _gathered_bytes(training)
    return Peak(
        resident=resident + CUBLAS_WORKSPACE,
        inputs=_input_bytes(training),
        loss=_loss_bytes(training),
        layer=_layer_bytes(training),
        # The gradient, and one more of it: AdamW takes all roots at once.
        optimizer=2 * own,
        loading=whole + CUBLAS_WORKSPACE if training.loads_whole else 0.0,
    )


def reserved_bytes(training: Training, peak: Peak) -> float:
    """torch's reserved bytes. FSDP leaves what loading took in its free blocks."""
    slack = _EAGER_SLACK if training.attention == "eager" else _SLACK
    return peak.allocated + slack * peak.activations + peak.loading


def device_bytes(training: Training, peak: Peak, gpu: str, memory: float) -> float:
    """What the process takes of a GPU of so much memory, in bytes."""
    context = context_bytes(gpu, training.gpus)
    return min(reserved_bytes(training, peak) + context, memory)


def context_bytes(gpu: str, workers: int) -> int:
    """What a process takes besides torch's blocks, in bytes."""
    return _CONTEXT.get(gpu, _USUAL_CONTEXT) + (_NCCL if workers > 1 else 0)


def weight_bytes(training: Training) -> float:
    """The base's weights on one GPU: packed linear layers, scales, and all other numbers."""
    base, weights = training.base, training.weights
    packed = weights.packed * base.linear + training.stream * base.others
    here = 0.0 if training.offloaded else packed / training.parts
    return here + weights.scales * base.linear + _table_bytes(training)


def _trained_bytes(training: Training) -> float:
    """Adapters, and the states of the optimizer."""
    own = training.trained_bytes if training.rank else 0
    here = 0.0 if training.offloaded else (own + training.state_bytes) * training.trained
    return here / training.parts


def _whole_bytes(training: Training) -> float:
    """The base before it is shared out."""
    base, weights = training.base, training.weights
    linear = (weights.packed + weights.scales) * base.linear
    return linear + HALF * base.others + _table_bytes(training)


def _table_bytes(training: Training) -> float:
    """Cosines and sines of all positions, in each layer."""
    base = training.base
    if not training.stack.rotary_tables:
        return 0.0
    return base.layers * max(base.positions, training.sequence) * base.head_size * 2 * HALF


def _gathered_bytes(training: Training) -> float:
    """What FSDP puts together for use: the embedding with the head, and one layer."""
    base = training.base
    if not training.sharded:
        return 0.0
    return HALF * base.others + training.weights.packed * base.linear / base.layers


def _input_bytes(training: Training) -> float:
    """Inputs of layers, which checkpointing keeps; without it all that each layer saves."""
    base = training.base
    if not training.checkpointing:
        return base.layers * _saved_by_layer(training)
    return base.layers * training.tokens * base.hidden * training.stream


def _loss_bytes(training: Training) -> float:
    """The logits, what the loss makes of them, and the float32 input of the last norm.

    Autocast has 16-bit copies of the adapter by then.
    """
    base, tokens = training.base, training.tokens
    copies = HALF * training.trained if training.autocast and training.rank else 0
    loss = training.stack.loss * tokens * base.vocabulary
    return _held_logits(training) + loss + FLOAT * tokens * base.hidden + copies


def _held_logits(training: Training) -> float:
    if not training.stack.keeps_output:
        return 0.0
    return training.stream * training.tokens * training.base.vocabulary


def _layer_bytes(training: Training) -> float:
    """The backward pass of one layer, beyond the inputs of all layers: what it computed again, what
    it works with, and gradients.

    The first one that the pass comes to meets all inputs and few gradients, the last one meets all
    gradients and no inputs any more.
    """
    saved = _saved_by_layer(training) if training.checkpointing else 0.0
    mlp = saved + training.tokens * (_mlp_work(training) + _ends(training))
    gradients = training.trained_bytes * training.trained / training.parts
    held = _held_by_fsdp(training)
    if not held:
        gradients = max(gradients / training.base.layers, gradients - _input_bytes(training))
    return _held_logits(training) + max(mlp, _attention_work(training)) + gradients + held


def _held_by_fsdp(training: Training) -> float:
    """Where FSDP has frozen weights, its hooks are on the inputs of layers: these live until the
    backward pass is over, and so do their gradients.
    """
    base = training.base
    if not (training.sharded and training.checkpointing and training.rank):
        return 0.0
    return (base.layers - 1) * training.tokens * base.hidden * training.stream


def _ends(training: Training) -> float:
    """A layer's output and the gradient of it, in bytes a token."""
    return 2 * training.stream * training.base.hidden


def _saved_by_layer(training: Training) -> float:
    """What one layer saves for its backward pass."""
    stack, base = training.stack, training.base
    beyond = stack.beyond + (stack.beyond_quantised if training.weights.is_quantised else 0.0)
    a_token = (
        _saved_by_norms(training)
        + _saved_by_attention(training)
        + _saved_by_mlp(training)
        + sum(_saved_inputs(training, reads) for reads in ("query", "output", "mlp", "end"))
        + beyond * base.hidden
    )
    return training.tokens * a_token + _scores(training) * _score_bytes(training)


def _saved_by_norms(training: Training) -> float:
    """Norms compute in float32, and save a copy of each input. In a float32 stream the input that
    checkpointing keeps is that copy.
    """
    is_kept_anyway = training.stream == FLOAT and training.checkpointing
    return (1 if is_kept_anyway else 2) * FLOAT * training.base.hidden


def _saved_by_attention(training: Training) -> float:
    """Query, key, value and output. Only FlashAttention takes fewer heads of keys than queries."""
    base = training.base
    wide, narrow = base.heads * base.head_size, base.kv_heads * base.head_size
    keys = narrow if training.attention == "flash2" else wide
    return training.attention_bytes * (2 * wide + 2 * keys)


def _saved_by_mlp(training: Training) -> float:
    """Gate, its activation and up; of an expert its output too, which its weight multiplies."""
    base = training.base
    if not base.experts:
        return 3 * training.stream * base.intermediate
    return base.active_experts * training.stream * (3 * base.intermediate + base.hidden)


def _mlp_work(training: Training) -> float:
    """Gradients of the product, the activation and up: of one expert after the other."""
    base = training.base
    one = 3 * training.stream * base.intermediate
    if not base.experts:
        return one
    return one * base.active_experts * LARGEST_EXPERT / base.experts


def _scores(training: Training) -> int:
    """How many attention scores are kept: eager attention's, other kernels keep none."""
    if training.attention != "eager":
        return 0
    return training.batch * training.base.heads * training.sequence**2


def _score_bytes(training: Training) -> int:
    """Softmax gives float32; 16-bit values are multiplied by a 16-bit copy of it."""
    return FLOAT + (HALF if training.attention_bytes == HALF else 0)


def _attention_work(training: Training) -> float:
    """The backward pass of eager attention: the softmax, the gradient that it gets and the one that
    it gives in float32, and one matrix more in attention's type; query, key, value, what the norm
    and the adapters before them keep, and both ends of the layer.
    """
    if training.attention != "eager":
        return 0.0
    heads = 3 * training.attention_bytes * training.base.hidden
    beside = _saved_by_norms(training) + _ends(training) + _saved_inputs(training, "query")
    scores = _scores(training) * (3 * FLOAT + training.attention_bytes)
    return scores + training.tokens * (heads + beside)


def _saved_inputs(training: Training, reads: str) -> float:
    """What linear layers keep of what they multiply, in bytes a token.

    A LoRA layer keeps what its A multiplies, and a 4-bit layer of 2024 its input. All of them share
    it where it has the type that they want; else each makes a copy of its own.
    """
    matrices = [each for each in training.base.matrices if each.reads == reads]
    wants = [training.adapter_input] * sum(_is_trained(training, each) for each in matrices)
    if training.weights.kind == "bitsandbytes" and training.stack.keeps_inputs:
        wants += [HALF] * len(matrices)
    own = training.attention_bytes if reads == "output" else training.stream
    # Attention saves its output anyway.
    shared = own if own in wants and reads != "output" else 0
    copies = sum(wanted for wanted in wants if wanted != own)
    return matrices[0].inputs * matrices[0].active * (shared + copies)


def _is_trained(training: Training, matrix: Matrix) -> bool:
    return not training.rank or any(matrix.is_named(target) for target in training.targets)

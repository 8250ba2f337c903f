"""Writes a small Llama as a GGUF file, in the layout that llama.cpp gives one."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.numpy import load_file

Weights = npt.NDArray[np.float32]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(
    base: Path,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    with_tokenizer: bool = True,
    architecture: str = "llama",
) -> Path:
    """The base in a folder as one file, its matrices in the given format."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(str(file), architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    if with_tokenizer:
        _add_tokenizer(writer, base)
    for name, weights in load_file(base / "model.safetensors").items():
        _add(writer, name, weights.astype(np.float32), kind, config["num_attention_heads"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(
    writer: GGUFWriter, name: str, weights: Weights, kind: GGMLQuantizationType, heads: int
) -> None:
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        # llama.cpp turns neighbours, and transformers the two halves of a head.
        halves = weights.reshape(heads, 2, -1, weights.shape[1])
        weights = halves.swapaxes(1, 2).reshape(weights.shape)
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    if weights.ndim == 1 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, weights)
    else:
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)


def _add_tokenizer(writer: GGUFWriter, base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|pad|>"])
    template = base / "chat_template.jinja"
    writer.add_chat_template(template.read_text(encoding="utf-8"))

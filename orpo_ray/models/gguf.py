"""A base in a GGUF file: dequantised once, into a folder that is used like any other base.

The folder is in this server's cache, beside the local copies of buckets. Its name follows from the
file's place, size and time, so a changed file is converted again.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from orpo_ray.config.storage import caches, local_path
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import Announce

_MAGIC = b"GGUF"
_VOCABULARY = "tokenizer.ggml.tokens"
_SCALED_ROPE = "rope_freqs.weight"
_PLAIN = {"F32": torch.float32, "F16": torch.float16}
_KEPT = {**_PLAIN, "BF16": torch.bfloat16}


def converted_folder(base: str) -> Path:
    """Where the dequantised form of a GGUF file is on this server, or will be.

    Raises ConfigError if there is no such file.
    """
    file = local_path(base).resolve()
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"model.base: no file {base}") from error
    named = f"{file}:{found.st_size}:{found.st_mtime_ns}".encode()
    return caches() / "gguf" / f"{file.stem}-{hashlib.sha256(named).hexdigest()[:16]}"


def convert_gguf(base: str, announce: Announce) -> None:
    """Dequantise a GGUF file into its folder, unless that is there.

    Raises ConfigError if the extra `gguf` is not installed, and with the name of what cannot be
    read.
    """
    folder = converted_folder(base)
    if folder.is_dir():
        return
    file = local_path(base)
    reader = _readable(base, file)
    announce(f"dequantising {base}, once, to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        _write(base, file, reader, building)
        _settle(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _readable(base: str, file: Path) -> Any:
    """The file's reader. Raises ConfigError for a file that holds no whole base."""
    try:
        from gguf import GGUFReader
        from gguf.quants import _type_traits as quantised
    except ImportError as error:
        raise ConfigError(
            f"model.base: {base} needs the package gguf; pip install 'orpo_ray[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        why = f"it is cut short or damaged; fetch it again ({error})" if _is_gguf(file) else error
        raise ConfigError(f"model.base: {base} cannot be read as a GGUF file: {why}") from error
    if _VOCABULARY not in reader.fields:
        raise ConfigError(f"model.base: {base} holds no tokenizer ({_VOCABULARY})")
    if any(tensor.name == _SCALED_ROPE for tensor in reader.tensors):
        raise ConfigError(
            f"model.base: {base} scales its rotary positions ({_SCALED_ROPE}), which cannot be "
            "converted; take this model's folder or hub name"
        )
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in _PLAIN and tensor.tensor_type not in quantised:
            raise ConfigError(
                f"model.base: {tensor.name} in {base} is {tensor.tensor_type.name}, which cannot "
                "be dequantised"
            )
    return reader


def _is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def _dtype(reader: Any) -> torch.dtype:
    """The number format that keeps what most matrices of the file hold.

    float16 rounds a dequantised weight by far less than its quantisation did.
    """
    kinds = Counter(t.tensor_type.name for t in reader.tensors if len(t.shape) > 1)
    return _KEPT.get(max(kinds, key=kinds.__getitem__, default=""), torch.float16)


def _write(base: str, file: Path, reader: Any, folder: Path) -> None:
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        AutoTokenizer.from_pretrained(str(file.parent), **where).save_pretrained(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=_dtype(reader),
            quantization_config=GgufConfig(dequantize=True),
            **where,
        )
    # transformers reads the file's fields without checks.
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model.base: {base} cannot be converted: {reason}") from error
    model.save_pretrained(str(folder))
    _drop_tokens_from(len(reader.fields[_VOCABULARY].data), folder / "tokenizer.json")


def _drop_tokens_from(count: int, file: Path) -> None:
    """Remove the tokens beyond the file's own: transformers adds <|endoftext|> to every tokenizer.

    The base has no embedding for it.
    """
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each["id"] < count]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _settle(building: Path, folder: Path) -> None:
    """Rename the folder to its place. If another process was first, its folder stays."""
    building.chmod(0o755)
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise

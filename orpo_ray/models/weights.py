"""The weights of a model folder, read and written a shard at a time, so that none fits in memory.

A tensor that is read stays on disk until it is used: safetensors maps the file.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orpo_ray.errors import ConfigError

SHARD_BYTES = 5 * 10**9
"""The most bytes of a file, if no file of the base is larger than that."""
INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


class Weights:
    """The tensors of a folder by name. Raises ConfigError for a folder without whole weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.shapes: dict[str, Tensor] = {}
        """Tensors without numbers, by name."""
        self._home: dict[str, Path] = {}
        for file in self.files:
            for name, shape in _shapes(file).items():
                self.shapes[name] = shape
                self._home[name] = file

    def read(self, name: str) -> Tensor:
        """A tensor. Its numbers come from the disk when they are used.

        The file is opened each time: what is read of an open file counts as this process's memory.
        """
        tensor: Tensor = _opened(self._home[name]).get_tensor(name)
        return tensor

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(map(_bytes, self.shapes.values()))

    @property
    def largest_file(self) -> int:
        """The size of the largest file."""
        return max(file.stat().st_size for file in self.files)


def write_weights(
    folder: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], most: int
) -> None:
    """Write tensors to files of at most `most` bytes, one file after the other.

    `shapes` are tensors without numbers. `read` gives the numbers of one when its file is written.
    """
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=most)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: shapes[name] for name in names}, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants all at once.

    The format is a length, a header of JSON, and the bytes of the tensors one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes(shape)
        dtype = _NAMES[shape.dtype]
        header[name] = {"dtype": dtype, "shape": list(shape.shape), "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with file.open("wb") as stream:
        stream.write(len(written).to_bytes(8, "little") + written)
        for name, shape in shapes.items():
            tensor = read(name)
            assert (tensor.dtype, tensor.shape) == (shape.dtype, shape.shape), name
            numbers: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(numbers)
        stream.flush()
        os.fsync(stream.fileno())


def shape_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the same shape without numbers, in a number format."""
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in order."""
    index = folder / INDEX
    try:
        names: Iterable[str] = (
            sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if index.is_file()
            else [_WHOLE]
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: cannot be read: {error}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it, so its weights cannot be read")
    return [folder / name for name in names]


def _shapes(file: Path) -> dict[str, Tensor]:
    opened = _opened(file)
    found = {}
    for name in opened.keys():  # noqa: SIM118 - an opened file is no dictionary
        part = opened.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ConfigError(
                f"{file}: {name} is stored as {part.get_dtype()}; name the base as it was "
                "published in 16 bits"
            )
        found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error

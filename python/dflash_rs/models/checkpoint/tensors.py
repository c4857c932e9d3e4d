"""What is stored: which files hold the weights, and the names, types and shapes in them. No value is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .reading import CONFIG, read_object, short, short_reason

# What transformers looks for, in this order: weights in one file, and the index of weights in several.
SINGLES = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Stored types whose values are the weights themselves.
_PLAIN = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as the file names it, and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """Whether the values are the weights themselves: floating point, of at least 16 bits, real."""
        return self.kind in _PLAIN


def weight_map_of(index: Path) -> dict[str, str]:
    """Which shard an index promises every tensor in. Raises CheckpointError where a shard is no plain file name."""
    weight_map = read_object(index, "an index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: not an index of shards (weight_map: got {short(weight_map)}, expected an object)"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(
                f"{index}: not an index of shards (shard {short(name)} is not a plain file name, expected a file beside the index)"
            )
    return weight_map


def from_index(index: Path) -> dict[Path, list[str]]:
    """The shards of an index, and the tensors that it promises in each. Raises CheckpointError."""
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map_of(index).items():
        files.setdefault(index.parent / name, []).append(tensor)
    return files


def check_indices(folder: Path) -> None:
    """What transformers asks of the index it reads, beside the files' names."""
    for single, name in zip(SINGLES, INDICES):
        if (folder / single).is_file():
            return
        if (folder / name).is_file():
            about = read_object(folder / name, "an index").get("metadata")
            if not isinstance(about, dict):
                raise CheckpointError(
                    f"{folder / name}: metadata: got {short(about)}, expected an object, which may be empty"
                )


def tensor_files(folder: Path, explicit: Any = None) -> dict[Path, list[str]]:
    """The files of weights that transformers would read, with the tensors that an index promises in each.

    `explicit` is `transformers_weights` of the configuration. Raises CheckpointError.
    """
    if explicit is not None:
        if not isinstance(explicit, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors(\.index\.json)?", explicit):
            raise CheckpointError(
                f"{folder / CONFIG}: transformers_weights: got {short(explicit)}, expected a safetensors file or index in the folder"
            )
        return from_index(folder / explicit) if explicit.endswith(".json") else {folder / explicit: []}
    for single, index in zip(SINGLES, INDICES):
        if (folder / single).is_file():
            return {folder / single: []}
        if (folder / index).is_file():
            return from_index(folder / index)
    return {folder / SINGLES[0]: []}


def stored_tensors(files: dict[Path, list[str]], what: str, *, once: bool = False) -> dict[str, Stored]:
    """Names, types and shapes of all tensors, without reading the values. `once` refuses what is stored twice under one name.

    Raises CheckpointError naming the file.
    """
    found: dict[str, Stored] = {}
    for file, promised in files.items():
        if not file.is_file():
            raise CheckpointError(f"{file}: not found, expected the weights of {what}")
        here = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        missing = sorted(set(promised) - here.keys())
        if missing:
            raise CheckpointError(f"{file}: {missing[0]}: not there, but the index places it in this shard")
        twice = next((name for name in here if once and name in found), None)
        if twice is not None:
            raise CheckpointError(f"{file}: {twice}: stored twice")
        found |= here
    return found


def _safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file ({short_reason(error)})") from None


def _pickled(file: Path) -> dict[str, Stored]:
    """torch reads a pickle without running what is in it (`weights_only`); on "meta" it reads no values."""
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        reason = short_reason(error)
        raise CheckpointError(
            f"{file}: cannot be read as plain tensors ({type(error).__name__}: {reason}); anything else in a pickle is not run, "
            "expected safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()):
        raise CheckpointError(f"{file}: got something else than named tensors, expected the weights of a model")
    return {name: Stored(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def numbered_layers(names: Any) -> int:
    """How many layers tensors can belong to: the largest number in a name, and one more."""
    numbers = [int(n) for name in names for n in re.findall(r"(?:^|\.)(\d{1,9})(?=\.)", name)]
    return max(numbers, default=-1) + 1

"""What the weights of a checkpoint cannot be meant to hold: one check for the embedded engine's drafter and for SGLang's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def check_weights(path: str | Path, weights: Iterable[tuple[str, Any]]) -> None:
    """Refuses values that are not finite or complex, and matrices of nothing but zeros: such a drafter runs, and nothing it says is
    accepted.

    `weights` are names and torch tensors. Raises CheckpointError naming the tensor.
    """
    for name, weight in weights:
        if weight.is_complex():
            raise CheckpointError(f"{path}: {name}: got complex numbers, expected real ones")
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            continue  # quantized: nothing to see without its scales
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{path}: {name}: has values that are not finite")
        if weight.ndim > 1 and not bool(weight.any()):
            raise CheckpointError(f"{path}: {name}: is all zeros")

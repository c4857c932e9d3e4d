"""Features of a frozen target, kept on disk: its pass over a row is made once, and later epochs cost the drafter's part only.

    row --> hash of its tokens and positions --> there? read : one pass over this row alone, written, used

What is read is what was computed, to the bit. Rows are the same in every epoch (`documents.rows_of`), so the second one computes nothing. A file is
written whole or not at all, so several processes may fill one folder, and an interrupted run goes on with what there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Bytes at the begin of each tensor that tell one target from another.
_TOLD_BY = 4096
# What stays free on the disk, whatever is promised.
_SPARE_BYTES = 1 << 30

Pass = Callable[[torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor]"]


class FeatureStore:
    """A folder of features of one target at some taps: files ``HASH.safetensors`` with `features` and `last`, and ``features.json`` that says of
    what.

    Raises ValueError for a folder with features of something else, and where the disk has no room for `rows` rows of `length` tokens.
    """

    def __init__(self, folder: Path, target: Any, taps: tuple[int, ...], rows: int = 0, length: int = 0):
        self.folder = folder
        self.computed = self.read = 0
        kind = {"target": fingerprint(target), "taps": list(taps), "dtype": str(target.dtype).removeprefix("torch.")}
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "features.json"
        if described.exists():
            try:
                found = json.loads(described.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"store_features: {described} cannot be read ({error}); choose another folder"
                ) from error
            if found != kind:
                raise ValueError(
                    f"store_features: {folder} holds features of another target, taps or dtype (got {found}, expected {kind}); choose another folder"
                )
        else:
            temporary = described.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(kind), encoding="utf-8")
            os.replace(temporary, described)
        width = target.config.get_text_config().hidden_size * (len(taps) + 1)
        # Those that are there already need no room.
        missing = max(0, rows - sum(1 for _ in folder.glob("*.safetensors")))
        needed, free = missing * length * width * target.dtype.itemsize, shutil.disk_usage(folder).free
        if needed + _SPARE_BYTES > free:
            raise ValueError(
                f"store_features: got {folder} with {free / 1e9:,.1f} GB free, expected {(needed + _SPARE_BYTES) / 1e9:,.1f} GB: {missing:,} rows of "
                f"{length} tokens, {width * target.dtype.itemsize / 1e3:,.1f} KB a token"
            )
        self.bytes_needed = needed

    def __call__(
        self, run: Pass, tokens: torch.Tensor, position: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `run` gives for these rows, int64 [b, S]: features [b, S, K*H] and last states [b, S, H]."""
        each = []
        for r in range(len(tokens)):
            places = None if position is None else position[r : r + 1]
            each.append(self._row(run, tokens[r : r + 1], places))
        features, last = zip(*each)
        return torch.cat(features), torch.cat(last)

    def _row(self, run: Pass, tokens: torch.Tensor, position: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
        digest.update(b"" if position is None else position.cpu().numpy().tobytes())
        path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
        if path.exists():
            try:
                found = load_file(path, device=str(tokens.device))
                features, last = found["features"], found["last"]
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(
                    f"store_features: {path} is damaged ({error}): delete it, and it is made again"
                ) from error
            if features.shape[:2] != tokens.shape or last.shape[:2] != tokens.shape:
                raise ValueError(
                    f"store_features: {path} is damaged (got {list(last.shape)}, expected {list(tokens.shape)} tokens): delete it, and it is made again"
                )
            self.read += 1
            return features, last
        features, last = run(tokens, position)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({"features": features.contiguous(), "last": last.contiguous()}, temporary)
        os.replace(temporary, path)
        self.computed += 1
        return features, last


def fingerprint(target: Any) -> str:
    """Tells a target's weights from others: a hash of the names and shapes of all and the begin of each."""
    digest = hashlib.sha256()
    for name, tensor in target.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        begin = tensor.detach().flatten()[: _TOLD_BY // tensor.element_size()].contiguous().cpu()
        digest.update(begin.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]

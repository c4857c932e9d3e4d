"""What a frozen target makes of the responses, computed once and kept on disk: every further epoch costs the drafter's part only.

What was made for some taps serves whoever needs some of them: a head that reads the last states alone, beside a drafter.

A folder holds ``features.bin``, an array ``[tokens, width]`` in the target's dtype over all tokens of the responses (the tapped layers' outputs
behind each other, then the hidden state that the head reads), ``settings.json``, which says what it was made of, ``captured-R-of-N.json``, how
many rows process R of N has written, and ``captured.json``, once all are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .common import Group, Progress, read_settings, same_settings, write_whole
from .documents import Documents, Rows, rows_once

if TYPE_CHECKING:
    from .drafter import Teacher

# NumPy has no bfloat16: its bits travel as integers.
_ON_DISK = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16}
# Is there when all of a folder is.
_WHOLE = "captured.json"
# Rows that the target runs at once while features are captured, and rows between two notes of how far it is.
_ROWS, _ROWS_BETWEEN_NOTES = 4, 64


class StoredFeatures:
    """Features ``[tokens, K*H]`` and last hidden states ``[tokens, H]`` of all tokens of the responses, out of a folder. `taps`: which of the parts of
    H columns are the features, in order; the last part is the hidden state."""

    def __init__(self, values: np.ndarray, hidden: int, taps: list[int], dtype: torch.dtype, device: torch.device):
        self._values, self._hidden, self._taps, self._dtype, self._device = values, hidden, taps, dtype, device

    def read(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """place ``int64 [b, S]``, indices into `Documents.tokens`, -1 where there is no token (zeros are given there) -> what a `Teacher` gives."""
        rows = place.cpu().numpy()
        found = self._values[np.maximum(rows, 0)]
        found[rows < 0] = 0
        found = found.reshape(*rows.shape, -1, self._hidden)
        if (wanted := [*self._taps, found.shape[-2] - 1]) != list(range(found.shape[-2])):
            found = found[..., wanted, :]
        both = torch.from_numpy(found).view(self._dtype).to(self._device).flatten(-2)
        width = len(self._taps) * self._hidden
        return both[..., :width], both[..., width:]

    @classmethod
    def capture(
        cls,
        folder: Path,
        documents: Documents,
        teacher: Teacher,
        length: int,
        whole_rows: bool,
        about: dict,
        group: Group,
        device: torch.device,
    ) -> StoredFeatures:
        """Reads what is in `folder`, computes what is missing. The processes of a group share the work; an interrupted capture goes on.

        `about` says which target and taps. Raises ValueError where the folder was made of something else, or the disk has no room.
        """
        features, last = teacher(torch.zeros(1, 1, dtype=torch.int64, device=device))
        (width, hidden), dtype = (features.shape[-1], last.shape[-1]), last.dtype
        if dtype not in _ON_DISK:
            raise ValueError(
                f"store_features: got a target in {dtype}, expected one of {', '.join(map(str, _ON_DISK))}"
            )
        shape = (documents.tokens.size, width + hidden)
        text = hashlib.sha256(documents.tokens.tobytes() + documents.starts.tobytes()).hexdigest()
        settings = {
            **about,
            "responses": text,
            "seq_len": length,
            "dtype": str(dtype),
            "tokens": shape[0],
            "width": shape[1],
        }
        kind = np.dtype(_ON_DISK[dtype])
        if (kept := _whole(folder, settings)) is not None:
            values = np.memmap(folder / "features.bin", dtype=kind, mode="r", shape=(shape[0], kept["width"]))
            return cls(values, hidden, [kept["taps"].index(tap) for tap in settings["taps"]], dtype, device)
        if group.leads:
            _prepare(folder, settings, shape[0] * shape[1] * kind.itemsize)
        group.wait()
        values = np.memmap(folder / "features.bin", dtype=kind, mode="r+", shape=shape)
        rows = list(rows_once(documents, np.argsort(-documents.lengths(), kind="stable"), length, whole_rows))[
            group.rank :: group.size
        ]
        note = folder / f"captured-{group.rank}-of-{group.size}.json"
        done = json.loads(note.read_text(encoding="utf-8")) if note.exists() else 0
        progress = Progress(len(rows), "rows of features")
        # A target that is spread over the processes runs in all of them or in none.
        passes = group.most(-(-(len(rows) - done) // _ROWS))
        for _ in range(passes):
            if done == len(rows):
                teacher(torch.zeros(1, 1, dtype=torch.int64, device=device))
                continue
            part = Rows.of(rows[done : done + _ROWS], length)
            tokens, position = torch.from_numpy(part.tokens).to(device), torch.from_numpy(part.position).to(device)
            both = torch.cat(teacher(tokens, position), dim=-1).cpu()
            known = part.place >= 0
            bits = both.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else both.numpy()
            values[part.place[known]] = bits[known]
            done = min(done + _ROWS, len(rows))
            if done % _ROWS_BETWEEN_NOTES == 0 or done == len(rows):
                values.flush()
                write_whole(note, done)
            if group.leads:
                progress.show(done, "")
        group.wait()
        if group.leads:
            write_whole(folder / _WHOLE, True)
        return cls(values, hidden, list(range(width // hidden)), dtype, device)


def _whole(folder: Path, settings: dict) -> dict | None:
    """What a folder was made of that has all of what is wanted, whoever made it; None where it has not."""
    path = folder / "settings.json"
    if not path.exists() or not (folder / _WHOLE).exists():
        return None
    found = read_settings("store_features", path)
    same = all(found.get(name) == settings[name] for name in settings if name not in ("taps", "width"))
    return found if same and set(settings["taps"]) <= set(found["taps"]) else None


def _prepare(folder: Path, settings: dict, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists():
        same_settings("store_features", folder, read_settings("store_features", path), settings)
        return
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"store_features: {size / 2**30:.1f} GiB are needed in {folder}, {free / 2**30:.1f} are free")
    with open(folder / "features.bin", "wb") as file:
        file.truncate(size)
    write_whole(path, settings)

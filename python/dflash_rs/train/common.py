"""What both trainings share: seeds, optimisers, learning-rate schedule, windows, resumable checkpoints, a progress line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import options


def windows(tokens: np.ndarray, length: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless windows of `length` tokens, each epoch a fresh permutation at a fresh offset; `start` skips windows.

    The sequence depends on `seed` alone, so a resumed run continues with the very windows it would have seen.
    """
    if tokens.size < 2 * length:
        raise ValueError(f"corpus: got {tokens.size} tokens, expected at least {2 * length}")
    epoch, seen = 0, 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(length))
        count = (tokens.size - offset) // length
        order = rng.permutation(count)
        if seen + count <= start:
            seen += count
        else:
            for i in order[max(0, start - seen) :]:
                begin = offset + int(i) * length
                yield tokens[begin : begin + length]
            seen += count
        epoch += 1


def batches(tokens: np.ndarray, length: int, size: int, seed: int, start_batch: int = 0) -> Iterator[torch.Tensor]:
    """Endless ``int64`` batches ``[size, length]`` of `windows`."""
    source = windows(tokens, length, seed, start_batch * size)
    while True:
        yield torch.from_numpy(np.stack([next(source) for _ in range(size)]).astype(np.int64))


def trapezoid(step: int, total: int, warmup: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, constant, linear fall to zero over the last `decay` share of the run."""
    if step < warmup:
        return (step + 1) / warmup
    begin = int(total * (1 - decay))
    return 1.0 if step < begin else max(0.0, (total - step) / max(1, total - begin))


def cosine(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (step - warmup) / max(1, total - warmup)))))


def smooth(mean: float | None, value: float, count: int) -> float:
    """The mean of the first 50 values, then an exponential average: early progress is not hidden by the first value."""
    return value if mean is None else mean + (value - mean) * max(0.02, 1 / max(1, count))


class Optimizers:
    """Muon on matrices inside the layers, AdamW on embeddings, norms and everything else. The matrices of several experts in one tensor
    are matrices each.

    Muon's update is rescaled to AdamW's root mean square (`match_rms_adamw`), so one learning rate serves both.
    """

    def __init__(self, module: torch.nn.Module, lr: float, weight_decay: float, matrices_outside: tuple[str, ...]):
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        # Parameters that hold several matrices, and these, which share their memory.
        self._stacks: list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]] = []
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            inside = not any(part in name for part in matrices_outside)
            if inside and p.ndim == 3 and min(p.shape[1:]) > 1:
                self._stacks.append((p, [torch.nn.Parameter(part) for part in p.detach().unbind(0)]))
                matrices += self._stacks[-1][1]
            else:
                (matrices if inside and p.ndim == 2 else rest).append(p)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
        self.lr = lr

    def step(self, factor: float) -> None:
        for whole, matrices in self._stacks:
            for i, matrix in enumerate(matrices):
                matrix.grad = None if whole.grad is None else whole.grad[i]
            whole.grad = None
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@dataclass(frozen=True)
class Group:
    """The processes of one data-parallel run (``torchrun --nproc-per-node N``); a plain start is a group of one.

    On a busy CPU, N processes of one thread each beat one process of N threads: they meet once a step, not once an operation.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Group:
        """Joins the group that ``torchrun`` describes in the environment, if there is one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(torch.distributed.get_rank(), size)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process of the group is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def most(self, count: int) -> int:
        """The largest of what the processes say."""
        if self.size == 1:
            return count
        counts = [0] * self.size
        torch.distributed.all_gather_object(counts, count)
        return max(counts)

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's rows of a global batch."""
        if batch.shape[0] % self.size:
            raise ValueError(f"batch_size: got {batch.shape[0]}, expected a multiple of the {self.size} processes")
        return batch[self.rank :: self.size]

    def average_gradients(self, module: torch.nn.Module) -> None:
        """Replaces every gradient by its mean over the group: one exchange of one flat buffer."""
        if self.size == 1:
            return
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


class Limit:
    """The minutes that a run may take before it stops at a place from which it can go on; None: as long as it needs.

    Counted from here. Raises ValueError for a negative number."""

    def __init__(self, minutes: float | None):
        if minutes is not None and not minutes >= 0:
            raise ValueError(f"minutes: got {minutes}, expected at least 0")
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def over(self, group: Group | None = None, ahead: float = 0.0) -> bool:
        """Whether the time is up, or will be in `ahead` seconds; of a group, as soon as it is for one process."""
        if self._end is None:
            return False
        own = int(time.monotonic() + ahead >= self._end)
        return bool(own if group is None else group.most(own))


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a checkpoint so that a crash at any moment leaves either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def write_whole(path: Path, value: object) -> None:
    """Writes `value` as JSON, whole or not at all."""
    os.replace(_beside(path, value), path)


def write_first(path: Path, value: object) -> Any:
    """Writes `value` as JSON where nobody wrote before, and returns what stands there: of several processes that start at once, one writes."""
    temporary = _beside(path, value)
    try:
        # Unlike a rename, a link never takes the place of what another process put there.
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return read_settings("out", path)


def _beside(path: Path, value: object) -> Path:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return temporary


def load_checkpoint(path: Path) -> dict | None:
    """The checkpoint at `path`, or None when there is none. Raises CheckpointError where it is damaged, or holds more than tensors."""
    from ..models.checkpoint import readable

    if not path.exists():
        return None
    with readable(path, "checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def resumed(path: Path, settings: Any) -> dict | None:
    """The checkpoint at `path` of a run with these `settings`, None where there is none. Raises ValueError where others made it."""
    state = load_checkpoint(path)
    # What a setting was before there was one is its default.
    if state is not None:
        before = asdict(type(settings)()) | state["settings"]
        same_settings(
            "out",
            path,
            before,
            asdict(settings),
            ", or go on from what is finished there in another folder (init_from)",
        )
    return state


def same_settings(argument: str, made: Path, before: dict, now: dict, remedy: str = "") -> None:
    """Raises ValueError that names `argument` and the first setting which what stands in `made` was made with, and which is another one now.
    `remedy`: what else helps, beside another folder and the same settings."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            was, is_now = (_brief(values.get(name)) for values in (before, now))
            raise ValueError(
                f"{argument}: {made} was made with other settings: {name} was {was}, now it is {is_now}; choose another folder "
                f"or the same settings{remedy}"
            )


def _brief(value: Any) -> str:
    """A setting for a message: what is empty is seen, and of a digest no more than tells it from another."""
    text = str(value)
    return "nothing" if value in ("", None) else text if len(text) <= 40 or " " in text else f"{text[:12]}..."


def read_settings(argument: str, path: Path) -> dict:
    """The settings in a folder's file. Raises ValueError that names `argument` and the file where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: {path} is damaged ({error}); choose another folder, or take this one away"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{argument}: {path} is damaged (a {type(found).__name__}, expected an object)")
    return found


def finite(loss: torch.Tensor, step: int, path: Path) -> float:
    """A step's loss. Raises FloatingPointError where it is not finite: what comes after would be lost."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"loss is {value} at step {step}; the last good checkpoint is {path}")
    return value


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or under ``torchrun`` the GPU of this process's number, or else the CPU; anything else must exist."""
    device = options.pick_device(torch, name)
    if device.type == "cpu" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if name not in ("auto", "cuda"):
        raise ValueError(
            f"device: got {name!r} for every process of torchrun, expected 'auto': each has a GPU of its own"
        )
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= there:
        raise ValueError(
            f"device: got process {own} of this machine and {there} GPUs, expected at most one process for each GPU"
        )
    return torch.device("cuda", own)


@dataclass
class Progress:
    """A single line on a terminal, a line every `every` seconds elsewhere."""

    total: int
    unit: str
    every: float = 60.0
    _begin: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    _first: int | None = None

    def show(self, done: int, text: str, force: bool = False) -> None:
        """Reports `done` of `total` units and a free text."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, now
        tty = sys.stderr.isatty()
        if not force and now - self._last < (0.5 if tty else self.every):
            return
        self._last = now
        rate = (done - self._first) / max(1e-9, now - self._begin)
        speed = f"{rate:.2f}/s  {(self.total - done) / rate / 60:.0f} min left  " if rate > 0 else ""
        width = 24
        full = int(width * min(1.0, done / max(1, self.total)))
        bar = "#" * full + "." * (width - full)
        line = f"[{bar}] {done}/{self.total} {self.unit}  {speed}{text}"
        print(("\r\x1b[K" if tty else "") + line, end="" if tty else "\n", file=sys.stderr, flush=True)

"""Reads a target's checkpoint with transformers, quietly."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import nn

from ...errors import CheckpointError, warn
from .. import checkpoint
from .probe import check_architecture


class Quiet:
    """transformers without its progress bar and its report of the tensors it met, which `load` goes through itself.

    Both are settings of the process: they are the caller's again when the last of several threads has left.
    """

    def __init__(self):
        self._lock, self._inside, self._bar = threading.Lock(), 0, False

    @staticmethod
    def _keep(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    def __enter__(self) -> None:
        from transformers.utils import logging

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._bar = logging.is_progress_bar_enabled()
                self._bars(logging, False)
                logging.get_logger("transformers.modeling_utils").addFilter(self._keep)

    def __exit__(self, *_) -> None:
        from transformers.utils import logging

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._bars(logging, self._bar)
                logging.get_logger("transformers.modeling_utils").removeFilter(self._keep)

    @staticmethod
    def _bars(logging, on: bool) -> None:
        from huggingface_hub import utils as hub

        # transformers switches the hub's bars along with its own. A download of gigabytes may show how far it is.
        hidden = hub.are_progress_bars_disabled()
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()
        if hidden != hub.are_progress_bars_disabled():
            (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()


quiet = Quiet()


def describe(path: str | Path) -> checkpoint.Described:
    """What a checkpoint's files say of a target, all that can be refused refused, without reading its weights. Raises CheckpointError."""
    with quiet:
        return checkpoint.describe_causal_lm(path, check_architecture)


def read_model(about: str | Path | checkpoint.Described, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The `...ForCausalLM` of a checkpoint folder or a hub name (or what `describe` made of it), all of its weights checked to be there.

    Raises CheckpointError when there is none, or when it is damaged or incomplete; a tensor that is missing would
    otherwise be made up. Warns of tensors that the model has no place for: often spare parts, such as layers that predict
    further ahead, but they may be what makes the checkpoint another model.
    """
    with quiet:
        model, spare = checkpoint.load_causal_lm(about, dtype, check_architecture)
    if spare:
        path = about.path if isinstance(about, checkpoint.Described) else about
        warn(
            f"target {path}: a {type(model).__name__} has no place for {len(spare)} of its tensors ({checkpoint.some(spare)}); they "
            "are ignored"
        )
    return model


def check_finite(path: str | Path, model: nn.Module) -> None:
    """Raises CheckpointError naming a weight with values that are not finite."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"target {path}: {name}: has values that are not finite")

"""Is the paged forward the model's own? Compared once, on a few short requests, when a model is loaded."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedModel
from ..batch import StepBatch

if TYPE_CHECKING:
    from .adapter import TargetModel


class Routing(TorchFunctionMode):
    """Gives the tokens of a paged forward the experts that the model's own forward chose for them.

    In 16-bit types rounding decides between experts that are nearly as good, and another expert is another row altogether: no
    measure of error would tell that from a fault. With the same experts in both, what is left is rounding or a fault.
    Routers choose with torch.topk along the last dimension; the n-th choice of a forward is the n-th of the other.
    """

    def __init__(self):
        super().__init__()
        self._chosen: dict[int, list[Tensor | None]] = {}
        self._request: int | None = None
        self._rows: list[tuple[int, int, int]] = []
        self._count = self._tokens = 0

    def of(self, request: int, tokens: int) -> Routing:
        """To be entered around the model's own forward over the `tokens` tokens of a request."""
        self._request, self._tokens = request, tokens
        self._chosen[request] = []
        return self

    def again(self, spans: list[tuple[int, int, int]]) -> Routing:
        """To be entered around a forward over packed spans (request, first token, end); what lies beyond a request's tokens goes with its
        last one."""
        self._request, self._rows, self._count = None, spans, 0
        self._tokens = sum(end - start for _, start, end in spans)
        return self

    def _per_token(self, choice: Tensor) -> Tensor | None:
        """[tokens, ...] of what the router chose, or None when it is nothing per token."""
        choice = choice[0] if choice.dim() > 2 and choice.shape[0] == 1 else choice
        return choice if choice.dim() > 1 and choice.shape[0] == self._tokens else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk) or found.indices.dim() < 2:
            return found
        dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        if dim not in (-1, found.indices.dim() - 1):
            return found
        if self._request is not None:
            self._chosen[self._request].append(self._per_token(found.indices))
            return found
        nth, self._count = self._count, self._count + 1
        parts = []
        for request, start, end in self._rows:
            choices = self._chosen[request]
            if nth >= len(choices) or choices[nth] is None:
                return found
            choice = choices[nth]
            parts.append(choice[torch.arange(start, end).clamp(max=len(choice) - 1)])
        own = self._per_token(found.indices)
        if own is None or any(part.shape[1:] != own.shape[1:] for part in parts):
            return found
        indices = torch.cat(parts).view(found.indices.shape)
        scores = args[0] if args else kwargs["input"]
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def elsewhere(config, tokens: int):
    """A cache of transformers that says it holds `tokens` tokens and holds none: a forward with it runs far from the start of the text,
    by the model's own reckoning of positions, at the cost of its few tokens."""
    from transformers import DynamicCache

    class Elsewhere(DynamicCache):
        def get_seq_length(self, layer_idx=0):
            return tokens

        def get_query_offset(self, layer_idx=0):
            return tokens

        def get_mask_sizes(self, query_length, layer_idx=0):
            return query_length, tokens

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return key_states, value_states

    return Elsewhere(config=config)


def _cache_name(model: Any) -> str:
    """How this model's forward calls its cache, which transformers 5.24 has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """transformers recommends packages for recurrent layers when it runs them, which it does here and nowhere else."""
    logger = logging.getLogger("transformers.integrations.hub_kernels")

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


class Check:
    """Compares the paged forward with the model's ordinary one on four short requests, two of them fed in chunks.

    The last one stands at the end of the context: rotations, scales and embeddings that change with the position, or with the longest
    request of a batch, differ there. Windows are the probe's business: see `Recorder`. Where layers keep a state, short chunks are followed by
    tokens that are rejected, and one chunk is longer than a block.
    """

    lengths = (6, 1, 4, 3)
    page_size = 2
    block = 3

    def __init__(self, target: TargetModel):
        generator = torch.Generator().manual_seed(0)
        high = min(target.vocab_size, target.embedding.weight.shape[0])
        self.tokens = [torch.randint(high, (n,), generator=generator) for n in self.lengths]
        self.bases = (0, 0, 0, max(0, target.max_context - self.lengths[3]))
        self.routing = Routing() if target.dtype != torch.float32 else None
        self.expected = []
        for r, (tokens, base) in enumerate(zip(self.tokens, self.bases, strict=True)):
            given = (
                {_cache_name(target.model): elsewhere(target.model.config, base), "use_cache": True}
                if base
                else {"use_cache": False}
            )
            routed = contextlib.nullcontext() if self.routing is None else self.routing.of(r, len(tokens))
            with routed, _without_hints():
                out = target.model(input_ids=tokens[None].to(target.device), **given)
            self.expected.append(out.logits[0].float())

    def _run(self, target: TargetModel) -> list[Tensor]:
        target.alloc_kv(32)
        pages = np.array([[7, 2, 5, 11], [9, 10, 0, 0], [1, 12, 0, 0], [4, 3, 0, 0]], dtype=np.int32)
        if target.state is not None:
            target.state.alloc(len(self.lengths), 0, self.block)
        got: list[list[Tensor]] = [[] for _ in self.lengths]
        spans = ([(0, 0, 4), (1, 0, 1), (3, 0, 2)], [(2, 0, 1), (0, 4, 6)], [(3, 2, 3), (2, 1, 4)])
        for step in spans:
            if (
                target._fused is not None
            ):  # its table of rotations would grow to the whole context; they are the model's own
                step = [span for span in step if span[0] != 3]
            extra = [0] * len(step)
            if target.state is not None:
                extra = [max(0, self.block - (end - start)) for _, start, end in step]
            fed = [(r, start, end + more) for (r, start, end), more in zip(step, extra, strict=True)]
            starts = np.cumsum([0] + [end - start for _, start, end in fed])
            places = np.concatenate([np.arange(start, end) for _, start, end in fed])
            rows = np.repeat([r for r, _, _ in fed], np.diff(starts))
            batch = StepBatch.from_arrays(
                # Of what is rejected again, any tokens do: those of another place.
                token_ids=np.array(
                    [int(self.tokens[r][p % self.lengths[r]]) for r, p in zip(rows, places, strict=True)]
                ),
                positions=np.minimum(places + np.array(self.bases)[rows], target.max_context - 1),
                slots=pages[rows, places // self.page_size].astype(np.int64) * self.page_size + places % self.page_size,
                query_starts=starts,
                context_lens=[start for _, start, _ in step],
                page_table=pages,
                row_ids=[r for r, _, _ in step],
                logit_rows=np.arange(starts[-1]),
                page_size=self.page_size,
                device=target.device,
            )
            with contextlib.nullcontext() if self.routing is None else self.routing.again(fed):
                logits = target.forward(batch)[0].float()
            if target.state is not None:
                kept = np.array([end - start for _, start, end in step], dtype=np.int32)
                target.state.keep(np.array([r for r, _, _ in step], dtype=np.int32), kept)
            for (r, _, _), start, end, more in zip(step, starts[:-1], starts[1:], extra, strict=True):
                got[r].append(logits[start : end - more])
        return [torch.cat(parts) if parts else self.expected[r] for r, parts in enumerate(got)]

    def error(self, target: TargetModel) -> float:
        """Largest relative error of a row of logits, in the Euclidean norm; infinite where a logit is not a number."""
        worst = 0.0
        for got, expected in zip(self._run(target), self.expected, strict=True):
            errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
            worst = max(worst, float(errors.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
        return worst

    def agrees(self, target: TargetModel) -> bool:
        """Whether the error is rounding. In 16-bit types two correct orders of summation differ by several percent of a
        row's norm on an untrained model; a wrong mask, position or scale differs by the norm itself."""
        exact = target.dtype == torch.float32 and (target._fused is None or target.matmul_precision == "highest")
        return self.error(target) <= (1e-4 if exact else 0.2)

    def compare(self, target: TargetModel, what: str) -> None:
        if not self.agrees(target):
            raise UnsupportedModel(
                f"{type(target.model).__name__}: the paged forward ({what}) differs from the model's own by "
                f"{self.error(target):.2g} relative, expected rounding only"
            )

"""The target's own token at every place of a block, exactly as SGLang would draw it one token at a time.

Sample and match: every row of the verified block becomes a row of a plain decoding batch (its own penalties, bias, mask,
temperature, filters and seed position) and goes through SGLang's own sampler. So each token is the one plain SGLang gives with
greedy decoding and with ``sampling_seed`` in deterministic mode, and otherwise a fresh draw from the same distribution; the drafts
only decide how many of the draws one pass can use.

Order, as in SGLang: additive penalties, repetition penalty, grammar, bias, custom processors, temperature, filters, draw.

What a penalty counts is kept here, on the device: SGLang's own penalizers are not fed when it speculates, and with overlap
scheduling the host learns a step's tokens one step late.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dflash_rs.sglang import compat

if TYPE_CHECKING:
    from dflash_rs.sglang.kernels import Draws
    from dflash_rs.sglang.trees import Tree

# What the rows of penalised requests may take at a time, several float32 copies of [rows, B, V]: more are adjusted one part after the other.
_PENALTY_BYTES = 256 << 20
_PENALTY_COPIES = 6

# Requests with custom processors whose last tokens are remembered; those of requests that ended are dropped, oldest first.
_REMEMBERED = 4096


def counts_tokens(params: Any) -> bool:
    """Whether these sampling parameters depend on which tokens came before."""
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0 or params.repetition_penalty != 1.0


def is_penalized(params: Any) -> bool:
    """Whether these sampling parameters change logits by what came before or by how many tokens did."""
    return counts_tokens(params) or params.min_new_tokens > 0


def stop_ids(req: Any) -> list[int]:
    """Tokens that ``min_new_tokens`` forbids."""
    tokenizer = req.tokenizer
    ids = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if tokenizer is not None:
        ids |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
        ids.add(tokenizer.eos_token_id)
    ids.discard(None)
    return sorted(ids)


def put(values: Sequence[Any], device: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Numbers of the host on the device. From pinned memory: a pageable copy would wait for the step that runs there, and with it the host."""
    host = torch.tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class History:
    """How often each token occurs in the output of each request, i32 ``[rows, V]``, by row of SGLang's request pool.

    The table is made when the first request needs it. A row is started anew whenever a request is prefilled or arrives with its KV, so it
    needs no cleaning up: aborts and retractions leave nothing behind that matters.
    """

    def __init__(self, rows: int, vocab: int, device: Any):
        self.rows, self.vocab, self.device = rows, vocab, device
        self.table: torch.Tensor | None = None

    def start(self, rows: torch.Tensor, outputs: Sequence[Sequence[int]]) -> None:
        """Requests enter with the output they already have (after a retraction, or from a prefill server; none otherwise); rows i64 ``[n]``."""
        if self.table is None:
            self.table = torch.zeros((self.rows, self.vocab), dtype=torch.int32, device=self.device)
        self.table.index_fill_(0, rows, 0)
        for n, output in enumerate(outputs):
            if len(output):
                self.add(rows[n : n + 1], put([list(output)], self.device), put([len(output)], self.device))

    def add(self, rows: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Counts the first ``lengths[n]`` of ``tokens[n]``; rows i64 ``[n]``, tokens i64 ``[n, B]``."""
        assert self.table is not None
        taken = torch.arange(tokens.shape[1], device=self.device)[None] < lengths[:, None]
        where = (rows[:, None].expand_as(tokens), tokens.clamp(0, self.vocab - 1))
        self.table.index_put_(where, taken.to(torch.int32), accumulate=True)

    def at(self, rows: torch.Tensor, drafts: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Counts at every place of a block, f32 ``[n, B, V]``; drafts ``[n, B-1]``. Place ``i`` has seen ``drafts[n, :i]`` as well, or with `seen`
        bool ``[n, B, B]`` those drafts ``j`` of which ``seen[n, i, j + 1]`` is true."""
        assert self.table is not None
        n, places = drafts.shape[0], drafts.shape[1] + 1
        counts = torch.zeros((n, places, self.vocab), dtype=torch.float32, device=self.device)
        known = drafts.clamp(0, self.vocab - 1)
        if seen is not None:
            counts.scatter_add_(2, known[:, None].expand(n, places, places - 1), seen[:, :, 1:].to(torch.float32))
        elif places > 1:
            counts[:, 1:].scatter_(2, known[:, :, None], 1.0)
            counts.cumsum_(dim=1)
        return counts.add_(self.table[rows][:, None])


class Penalties:
    """The penalised requests of a batch, as tensors with one entry per request."""

    def __init__(self, reqs: Sequence[Any], slots: torch.Tensor, device: Any, index: Sequence[int] | None = None):
        """Of those that `index` names, all by default."""
        index = range(len(reqs)) if index is None else index
        self.index = [i for i in index if is_penalized(reqs[i].sampling_params)]
        self.device = device
        if not self.index:
            return
        chosen = [reqs[i] for i in self.index]
        params = [req.sampling_params for req in chosen]
        self.where = put(self.index, device)
        self.slots = slots[self.where]
        self.counting = any(counts_tokens(p) for p in params)
        self.frequency = put([p.frequency_penalty for p in params], device, torch.float32)
        self.presence = put([p.presence_penalty for p in params], device, torch.float32)
        self.repetition = put([p.repetition_penalty for p in params], device, torch.float32)
        self.least = put([p.min_new_tokens for p in params], device)
        self.prompt = put([len(req.origin_input_ids) for req in chosen], device)
        self.stops = [stop_ids(req) if p.min_new_tokens > 0 else [] for req, p in zip(chosen, params)]

    def __bool__(self) -> bool:
        return bool(self.index)

    def additive(self, counts: torch.Tensor | None, written: torch.Tensor, vocab: int) -> torch.Tensor:
        """What is added to logits, f32 ``[n, B, V]``; ``written`` i64 ``[n, B]``: output tokens before each place."""
        n, places = written.shape
        if counts is None:
            total = torch.zeros((n, places, vocab), dtype=torch.float32, device=self.device)
        else:
            total = -(counts * self.frequency[:, None, None])
            total -= (counts > 0) * self.presence[:, None, None]
        forbidden = [(row, column) for row, ids in enumerate(self.stops) for column in ids if column < vocab]
        if forbidden:
            rows, columns = put(forbidden, self.device).unbind(1)
            early = written[rows] < self.least[rows, None]
            total[rows, :, columns] = total[rows, :, columns].masked_fill(early, -torch.inf)
        return total

    def scaling(self, counts: torch.Tensor) -> torch.Tensor:
        """What logits are divided by where positive and multiplied by where negative, f32 ``[n, B, V]``."""
        return torch.where(counts > 0, self.repetition[:, None, None], 1.0)


class RowRequest:
    """A request as a custom processor sees it at one place of a block: its output goes up to that place."""

    def __init__(self, req: Any, output_ids: list[int]):
        self._req, self.output_ids = req, output_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._req, name)


class TargetSampler:
    """Draws the target's tokens. One per worker; ``sampler`` is SGLang's own, ``rows`` those of its request pool; ``draws``: what draws where nobody
    asks for SGLang's own draws."""

    def __init__(self, sampler: Any, rows: int, vocab: int, device: Any, draws: Draws | None = None):
        self.sampler, self.vocab, self.device, self.draws = sampler, vocab, device, draws
        self.history = History(rows, vocab, device)
        # Tokens of a request's last step: with overlap scheduling its `output_ids` may lack them.
        self.last: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def untouched(self, info: Any, reqs: Sequence[Any]) -> bool:
        """Whether the target's tokens are the argmax of its raw logits."""
        return (
            info is None
            or info.is_all_greedy
            and info.logit_bias is None
            and not info.has_custom_logit_processor
            and not any(is_penalized(req.sampling_params) for req in reqs)
        )

    # --- prefill ------------------------------------------------------------------------------------------------------

    def enter(self, reqs: Sequence[Any], slots: torch.Tensor, info: Any) -> Any:
        """Requests are prefilled; ``slots`` i64 ``[R]`` are their rows of the request pool. Returns the sampling info to prefill
        with: for requests that come back with output (after a retraction) SGLang's own penalties would start from nothing."""
        penalties = Penalties(reqs, slots, self.device)
        self.begin(reqs, slots)
        back = [n for n, i in enumerate(penalties.index) if len(reqs[i].output_ids)]
        if not back:
            return info
        written = put([[len(reqs[i].output_ids)] for i in penalties.index], self.device)
        none = torch.empty((len(penalties.index), 0), dtype=torch.int64, device=self.device)
        counts = self._counts(penalties, none)
        additive = info.acc_additive_penalties.clone()
        additive[penalties.where] = penalties.additive(counts, written, self.vocab)[:, 0]
        scaling = info.acc_scaling_penalties
        if counts is not None:
            scaling = torch.ones_like(additive) if scaling is None else scaling.clone()
            scaling[penalties.where] = penalties.scaling(counts)[:, 0]
        return dataclasses.replace(info, acc_additive_penalties=additive, acc_scaling_penalties=scaling)

    def begin(self, reqs: Sequence[Any], slots: torch.Tensor) -> None:
        """Requests enter with the output that they have; ``slots`` i64 ``[R]``."""
        if counting := [i for i, req in enumerate(reqs) if counts_tokens(req.sampling_params)]:
            mine = put(counting, self.device)
            self.history.start(slots[mine], [reqs[i].output_ids for i in counting])

    # --- verification -------------------------------------------------------------------------------------------------

    def targets(
        self,
        logits: torch.Tensor,
        info: Any,
        reqs: Sequence[Any],
        slots: torch.Tensor,
        block: torch.Tensor,
        starts: torch.Tensor,
        scored: bool = True,
        tree: Tree | None = None,
    ) -> torch.Tensor:
        """The target's token after every row, i64 ``[R, B]``.

        ``logits`` f32 ``[R * B, V]``, with grammar masks applied; adjusted in place, so that log-probabilities are those of
        the distribution drawn from. Unless they are ``scored``, nobody reads them afterwards, and the sampler may overwrite
        them. ``block`` i64 ``[R, B]`` is each request's anchor and drafts, ``starts`` i64 ``[R]`` the anchor's position. With
        a `tree` the block are its nodes, and each is a place on the path above it.
        """
        if self.untouched(info, reqs):
            return torch.argmax(logits, dim=-1).view_as(block)
        self.adjust(logits.view(*block.shape, -1), info, reqs, slots, block, starts, tree)
        if info.is_all_greedy:
            return torch.argmax(logits, dim=-1).view_as(block)
        places = block.shape[1]
        positions = starts if places == 1 else (starts[:, None] + _depths(block, tree)).reshape(-1)
        if info.sampling_seed is None and self.draws is not None:
            params = [req.sampling_params for req in reqs]
            if self.draws.serves(params, logits.dtype):
                logits = compat.installed().sanitized(self.sampler, logits, bare(info))
                return self.draws(logits, params, block, positions).view_as(block)
        if info.sampling_seed is None:
            # The sampler turns logits into probabilities in place.
            return self._draw(logits.clone() if scored else logits, info, positions, places).view_as(block)
        # Seeded draws of SGLang number the columns by rank as soon as one request of the batch filters. Drawing the two kinds
        # apart makes a request's tokens its own: those it gets when it is alone.
        out = torch.empty_like(block)
        for rows, greedy in self._kinds(reqs):
            mine = put(rows, logits.device)
            chosen = logits.view(*block.shape, -1)[mine].flatten(0, 1)
            if greedy:
                out[mine] = torch.argmax(chosen, dim=-1).view(len(rows), places)
                continue
            place = positions.view_as(block)[mine].reshape(-1)
            out[mine] = self._draw(chosen, _select(info, rows, mine, reqs), place, places).view(len(rows), places)
        return out

    def adjust(
        self,
        logits: torch.Tensor,
        info: Any,
        reqs: Sequence[Any],
        slots: torch.Tensor,
        block: torch.Tensor,
        starts: torch.Tensor,
        tree: Tree | None = None,
    ) -> None:
        """Penalties, bias and custom processors, in place; ``logits`` ``[R, B, V]``."""
        penalised = [i for i, req in enumerate(reqs) if is_penalized(req.sampling_params)]
        part = max(1, _PENALTY_BYTES // (_PENALTY_COPIES * 4 * logits.shape[1] * logits.shape[2]))
        for begin in range(0, len(penalised), part):
            some = Penalties(reqs, slots, self.device, penalised[begin : begin + part])
            self._penalise(logits, some, block, starts, tree)
        if info.logit_bias is not None:
            logits.add_(info.logit_bias[:, None].to(logits.dtype))
        if info.has_custom_logit_processor:
            for processor, indices in compat.installed().processors(info):
                rows = put(indices, logits.device)
                params = [
                    p
                    for i in indices
                    for p in self._places(
                        reqs[i], info.custom_params[i], block[i], starts[i], None if tree is None else tree.seen[i]
                    )
                ]
                result = processor(logits[rows].flatten(0, 1), params)
                logits[rows] = result.view(len(indices), *logits.shape[1:]).to(logits.dtype)

    def committed(self, reqs: Sequence[Any], slots: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """A step gained the first ``lengths[r]`` of ``tokens[r]``; i64 ``[R, B]``, i32 ``[R]``."""
        counting = [i for i, req in enumerate(reqs) if counts_tokens(req.sampling_params)]
        if counting:
            mine = put(counting, self.device)
            self.history.add(slots[mine], tokens[mine], lengths[mine])
        for i, req in enumerate(reqs):
            if req.custom_logit_processor is not None:
                self.last[req.rid] = (tokens[i].clone(), lengths[i].clone())
                self.last.move_to_end(req.rid)
                if len(self.last) > _REMEMBERED:
                    self.last.popitem(last=False)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _penalise(
        self,
        logits: torch.Tensor,
        penalties: Penalties,
        block: torch.Tensor,
        starts: torch.Tensor,
        tree: Tree | None,
    ) -> None:
        mine = penalties.where
        counts = self._counts(penalties, block[mine, 1:], None if tree is None else tree.seen[mine])
        written = (starts[mine] + 1 - penalties.prompt)[:, None] + _depths(block, tree)[mine]
        changed = logits[mine] + penalties.additive(counts, written, self.vocab)
        if counts is not None:
            by = penalties.scaling(counts)
            changed = torch.where(changed < 0, changed * by, changed / by)
        logits[mine] = changed.to(logits.dtype)

    def _counts(
        self, penalties: Penalties, drafts: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        return self.history.at(penalties.slots, drafts, seen) if penalties.counting else None

    def _draw(self, logits: torch.Tensor, info: Any, positions: torch.Tensor, places: int) -> torch.Tensor:
        """Overwrites `logits`."""
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        output = LogitsProcessorOutput(next_token_logits=logits)
        rows = logits.shape[0]
        tokens = self.sampler(output, _spread(info, places), False, [0] * rows, [None] * rows, positions)
        return tokens.to(torch.int64)

    def _kinds(self, reqs: Sequence[Any]):
        from sglang.srt.sampling.sampling_params import TOP_K_ALL

        kinds: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for i, req in enumerate(reqs):
            p = req.sampling_params
            kinds[0 if p.top_k <= 1 else 1 if p.top_p == 1.0 and p.top_k == TOP_K_ALL else 2].append(i)
        return [(rows, kind == 0) for kind, rows in kinds.items() if rows]

    def _places(
        self, req: Any, params: dict | None, block: torch.Tensor, start: torch.Tensor, seen: torch.Tensor | None
    ) -> list[dict | None]:
        """A custom processor's parameters at every place of a block."""
        if params is None or "__req__" not in params:
            return [params] * block.shape[0]
        output = list(req.output_ids)
        missing = int(start) + 1 - len(req.origin_input_ids) - len(output)
        if missing > 0:
            tokens, length = self.last[req.rid]
            output += tokens[: int(length)].tolist()[-missing:]
        drafts = block.tolist()[1:]
        if seen is None:
            paths = [drafts[:place] for place in range(block.shape[0])]
        else:
            paths = [[token for token, above in zip(drafts, row[1:]) if above] for row in seen.tolist()]
        return [params | {"__req__": RowRequest(req, output + path)} for path in paths]


def _depths(block: torch.Tensor, tree: Tree | None) -> torch.Tensor:
    """How far each place of a block ``[R, B]`` is from the anchor, i64 ``[R, B]``."""
    if tree is not None:
        return tree.depths
    return torch.arange(block.shape[1], device=block.device).expand_as(block)


# The fields of SGLang's sampling info that change logits before they are drawn from, with nothing in them.
_NOTHING_TO_ADJUST: dict[str, Any] = {
    "penalizer_orchestrator": None,
    "acc_additive_penalties": None,
    "acc_scaling_penalties": None,
    "grammar_mask": None,
    "has_custom_logit_processor": False,
    "custom_logit_processor": None,
    "logit_bias": None,
}


def bare(info: Any) -> Any:
    """The same sampling info with nothing left to adjust: what SGLang's own code in between gets to see."""
    return dataclasses.replace(info, **_NOTHING_TO_ADJUST)


_PER_REQUEST = ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")


def _spread(info: Any, places: int) -> Any:
    """One row per place of the block instead of one per request."""

    def each(value: torch.Tensor) -> torch.Tensor:
        return value if places == 1 else value.repeat_interleave(places, dim=0)

    return dataclasses.replace(
        info,
        grammars=None,
        **_NOTHING_TO_ADJUST,
        **compat.installed().no_sampling_mask(),
        **{name: None if (value := getattr(info, name)) is None else each(value) for name in _PER_REQUEST},
    )


def _select(info: Any, rows: list[int], index: torch.Tensor, reqs: Sequence[Any]) -> Any:
    """The sampling info of some of the requests."""
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    params = [reqs[i].sampling_params for i in rows]
    return dataclasses.replace(
        info,
        need_top_p_sampling=any(p.top_p != 1.0 for p in params),
        need_top_k_sampling=any(p.top_k != TOP_K_ALL for p in params),
        need_min_p_sampling=any(p.min_p > 0 for p in params),
        **{name: None if (value := getattr(info, name)) is None else value[index] for name in _PER_REQUEST},
    )

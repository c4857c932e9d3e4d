"""Draft trees: many candidates for the next tokens, checked in one pass of the target, of which one path is kept.

    drafter's block ──> candidates ──> Tree          most likely prefixes, arXiv 2604.12989 (the core's builder, or its kernel)
    SGLang's verify pass, a node per slot            mask: what lies above a node; position: the anchor's and its depth
    the target's own token after every node          sampling.TargetSampler
    Tree.walk ──> the accepted path                  moved to the front: KV, hidden states, logits

What comes after the pass of the target is SGLang's own step for a chain of the drafter's block: the path stands where a chain would. So a
request needs slots for all nodes while it is verified, and gains at most a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dflash_rs import DraftTree, cuda

if TYPE_CHECKING:
    from dflash_rs.sglang.coupled import Seeded

# Candidates for each place of the block; deeper ones are hardly ever among the likeliest prefixes.
MOST_CANDIDATES = 16
# Rows of logits over the vocabulary that are there at a time.
ROWS = 256
# Types of a head's weights that are no packed ones.
_DENSE = (torch.float32, torch.bfloat16, torch.float16)


class Tree:
    """The trees of a batch, ``R`` requests with room for ``M`` nodes each. Node 0 is the anchor, parents come before their children.

    - `tokens` i64 ``[R, M]``.
    - `parents` i64 ``[R, M]``: -1 for the anchor. Where a tree has fewer nodes, the rest hang from the anchor and are never accepted.
    - `depths` i64 ``[R, M]``: 0 for the anchor.
    - `real` bool ``[R, M]``: false where there is no node.
    - `seen` bool ``[R, M, M]``: ``seen[r, i, j]`` where ``j`` is ``i`` or lies above it.
    """

    def __init__(self, tokens: Tensor, parents: Tensor, depths: Tensor, counts: Tensor, depth: int):
        """`counts` ``[R]``: nodes of each tree, the anchor included; what lies behind is not read. `depth`: no node lies deeper."""
        rows, nodes = tokens.shape
        self.depth = depth
        self.real = torch.arange(nodes, device=tokens.device)[None] < counts[:, None]
        self.tokens = torch.where(self.real, tokens, tokens[:, :1])
        self.parents = torch.where(self.real, parents.to(torch.int64), 0)
        self.parents[:, 0] = -1
        self.depths = torch.where(self.real, depths.to(torch.int64), 1)
        above = torch.arange(nodes, device=tokens.device) == self.parents[:, :, None]
        reach = above | torch.eye(nodes, dtype=torch.bool, device=tokens.device)
        # From one step up to two, four and so on, until the anchor is reached from everywhere.
        for _ in range(max(0, depth - 1).bit_length()):
            steps = reach.to(torch.float32)
            reach = torch.bmm(steps, steps) > 0
        self.seen = reach

    @property
    def nodes(self) -> int:
        """``M``."""
        return self.tokens.shape[1]

    @classmethod
    def build(cls, anchors: Tensor, tokens: Tensor, log_probs: Tensor, drafts: int, *, kernels: bool = False) -> Tree:
        """The `drafts` likeliest prefixes below each of the `anchors` i64 ``[R]``; `tokens` i64 and `log_probs` f32 ``[R, depth, k]``: candidates
        for each place, the likeliest first. `kernels`: by the kernel of this package, on a device that has it; otherwise on the host."""
        depth = tokens.shape[1]
        if kernels:
            built = cuda.tree_build(anchors.contiguous(), tokens.contiguous(), log_probs.contiguous(), drafts)
            return cls(built.tokens, built.parents, built.depths, built.counts, depth)
        rows = anchors.shape[0]
        out = torch.zeros((3, rows, drafts + 1), dtype=torch.int64)
        counts = torch.empty(rows, dtype=torch.int64)
        for row, anchor in enumerate(anchors.tolist()):
            tree = DraftTree.build(anchor, tokens[row].numpy(), log_probs[row].numpy(), drafts)
            counts[row] = len(tree)
            out[0, row, : len(tree)] = torch.from_numpy(tree.tokens)
            out[1, row, : len(tree)] = torch.from_numpy(tree.parents)
            out[2, row, : len(tree)] = torch.from_numpy(tree.depths)
        return cls(out[0], out[1], out[2], counts, depth)

    @classmethod
    def along(cls, anchors: Tensor, tokens: Tensor, log_probs: Tensor, drafts: int) -> Tree:
        """The same where a candidate's likelihood depends on the one before it: `log_probs` f32 ``[R, depth, k, k]``, ``[r, i, p, c]`` of candidate ``c``
        behind candidate ``p`` of the place before; all ``p`` of the first place are the anchor.

        Of each depth the likeliest prefixes are kept, as many as the tree may have nodes: what lies above a likely prefix is likelier still.
        """
        rows, depth, best = tokens.shape
        scores, order = log_probs[:, 0, 0].topk(min(drafts, best), dim=-1)
        found = [(scores, order, torch.zeros_like(order))]
        before = 1
        for place in range(1, depth):
            above, chosen, _ = found[-1]
            steps = log_probs[:, place].gather(1, chosen[:, :, None].expand(-1, -1, best))
            scores, flat = (above[:, :, None] + steps).flatten(1).topk(min(drafts, above.shape[1] * best), dim=-1)
            found.append((scores, flat % best, flat // best + before))
            before += above.shape[1]
        # All of them by depth, numbered from 1; 0 is the anchor. A parent is never less likely than its child, and of equals it comes first.
        levels = torch.cat([torch.full_like(chosen, at + 1) for at, (_, chosen, _) in enumerate(found)], 1)
        ids = torch.cat([tokens[:, at].gather(1, chosen) for at, (_, chosen, _) in enumerate(found)], 1)
        above = torch.cat([parents for _, _, parents in found], 1)
        order = torch.cat([scores for scores, _, _ in found], 1).sort(dim=1, descending=True, stable=True).indices
        taken = order[:, :drafts]
        nodes = taken.shape[1] + 1
        number = torch.zeros((rows, above.shape[1] + 1), dtype=torch.int64, device=tokens.device)
        number.scatter_(1, taken + 1, torch.arange(1, nodes, device=tokens.device).expand(rows, -1))
        parents = torch.full((rows, drafts + 1), -1, dtype=torch.int64, device=tokens.device)
        parents[:, 1:nodes] = number.gather(1, above.gather(1, taken))
        out = torch.zeros((2, rows, drafts + 1), dtype=torch.int64, device=tokens.device)
        out[0, :, 0] = anchors
        out[0, :, 1:nodes], out[1, :, 1:nodes] = ids.gather(1, taken), levels.gather(1, taken)
        counts = torch.full((rows,), nodes, dtype=torch.int64, device=tokens.device)
        return cls(out[0], parents, out[1], counts, depth)

    def positions(self, starts: Tensor) -> Tensor:
        """Positions of all nodes, i64 ``[R, M]``, with the anchors at `starts` ``[R]``."""
        return starts.to(torch.int64)[:, None] + self.depths

    def mask(self, starts: Tensor, most: int) -> Tensor:
        """Who attends to whom, in SGLang's flat form: for each request after the other ``M`` rows of ``starts[r] + M`` keys, true where a node sees
        the key. `most`: how many entries there are for certain room for, at least ``sum(M * (starts + M))``; what is left over is true."""
        rows, nodes = self.tokens.shape
        starts = starts.to(torch.int64)
        flat = torch.ones(most, dtype=torch.bool, device=starts.device)
        lengths = starts + nodes
        begins = torch.cumsum(lengths * nodes, 0) - lengths * nodes
        place = torch.arange(nodes, device=starts.device)
        where = (begins + starts)[:, None, None] + lengths[:, None, None] * place[None, :, None] + place[None, None]
        flat[where.reshape(-1)] = self.seen.reshape(-1)
        return flat

    def walk(self, sampled: Tensor, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Follows the drafts while they are the tokens that were drawn above them.

        `sampled` i64 ``[R, M]``: the target's token after every node; `most` i64 ``[R]``: most drafts that each request may accept. Returns the accepted nodes
        i64 ``[R, depth + 1]``, by depth and the anchor first (behind the last one is the anchor again), and how many drafts they are, i32 ``[R]``.
        """
        drawn = sampled.gather(1, self.parents.clamp(min=0))
        fits = self.real & (drawn == self.tokens)
        if most is not None:
            fits &= self.depths <= most[:, None]
        fits[:, 0] = True
        # Siblings are different tokens, so of each depth at most one node is left.
        kept = ~(self.seen & ~fits[:, None, :]).any(2)
        place = torch.where(kept, self.depths, self.depth + 1)
        path = torch.zeros((sampled.shape[0], self.depth + 2), dtype=torch.int64, device=sampled.device)
        path.scatter_(1, place, torch.arange(self.nodes, device=sampled.device).expand_as(place))
        return path[:, :-1], (kept.sum(1) - 1).to(torch.int32)


def links(parents: Tensor) -> tuple[Tensor, Tensor]:
    """First child and next sibling of every node, i64 ``[R, M]``, -1 where there is none; `parents` ``[R, M]``, -1 for what hangs from nowhere."""
    rows, nodes = parents.shape
    child, sibling = torch.full((2, rows, nodes), -1, dtype=torch.int64)
    every = torch.arange(rows)
    for node in range(nodes - 1, 0, -1):
        parent = parents[:, node]
        has = parent >= 0
        sibling[has, node] = child[every[has], parent[has]]
        child[every[has], parent[has]] = node
    return child, sibling


def candidates(hidden: Tensor, lm_head: Any, group: Any, best: int) -> tuple[Tensor, Tensor]:
    """The `best` tokens by the head's logits of the drafter's `hidden` ``[n, H]``, the likeliest first: tokens i64 and log-probabilities f32
    ``[n, best]``. Where the ranks of `group` have a part of the vocabulary each, every rank gets the same."""
    parts = [_best_of(part, lm_head, group, best, True) for part in hidden.split(ROWS)]
    tokens, values, totals = (torch.cat(whole) for whole in zip(*parts))
    log_probs, order = _plain_numbers(values - totals).sort(dim=-1, descending=True, stable=True)
    return tokens.gather(-1, order), log_probs


def best_of(hidden: Tensor, lm_head: Any, group: Any, best: int) -> tuple[Tensor, Tensor]:
    """As `candidates`, with their logits f32 instead of log-probabilities."""
    parts = [_best_of(part, lm_head, group, best, False)[:2] for part in hidden.split(ROWS)]
    tokens, values = parts[0] if len(parts) == 1 else (torch.cat(whole) for whole in zip(*parts))
    return tokens, values


def likelihoods(sums: Tensor) -> Tensor:
    """Logarithms of the shares that ``softmax`` makes of `sums` ``[..., k]``, f32."""
    return _plain_numbers(sums.to(torch.float32).log_softmax(-1))


def is_plain(lm_head: Any) -> bool:
    """Whether logits of this head are a product with one matrix, neither quantized nor with tokens that an adapter has added."""
    weight, shard = getattr(lm_head, "weight", None), getattr(lm_head, "shard_indices", None)
    return weight is not None and weight.dtype in _DENSE and not (shard is not None and int(shard.num_added_elements))


class Computed(NamedTuple):
    """In the place of a head where hidden states are its logits already; `start`: the first token that this rank has."""

    start: int


def head_logits(hidden: Tensor, lm_head: Any) -> tuple[Tensor, int]:
    """Logits ``[n, V]`` of `hidden` ``[n, H]`` for the vocabulary's tokens that this rank has, in the head's type, and which token is the first. They are
    not to be changed."""
    if isinstance(lm_head, Computed):
        return hidden, lm_head.start
    weight, shard = lm_head.weight, getattr(lm_head, "shard_indices", None)
    start = 0
    if shard is not None:
        weight, start = weight[: int(shard.num_org_elements)], int(shard.org_vocab_start_index)
    return torch.matmul(hidden.to(weight.dtype), weight.T), start


def _best_of(
    hidden: Tensor, lm_head: Any, group: Any, best: int, totalled: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, logits f32 ``[n, best]`` and, if they are to be `totalled`, the logarithm of the whole vocabulary's sum ``[n, 1]``."""
    logits, start = head_logits(hidden, lm_head)
    total = torch.logsumexp(logits.to(torch.float32), dim=-1, keepdim=True) if totalled else None
    values, tokens = logits.topk(min(best, logits.shape[-1]), dim=-1)
    values = values.to(torch.float32)
    if start:
        tokens += start
    if group is not None and group.world_size > 1:
        values, tokens = (group.all_gather(x.contiguous(), dim=-1) for x in (values, tokens))
        if total is not None:
            total = torch.logsumexp(group.all_gather(total.contiguous(), dim=-1), dim=-1, keepdim=True)
        values, order = values.topk(min(best, values.shape[-1]), dim=-1)
        tokens = tokens.gather(-1, order)
    return tokens, values, total


def _plain_numbers(log_probs: Tensor) -> Tensor:
    """What is no number is the least likely; rounding must not lift a certain token above 0."""
    return torch.nan_to_num(log_probs, nan=-1e30, neginf=-1e30).clamp(max=0.0)


class Recorded:
    """A target worker whose last pass can be looked at, and changed, before SGLang's step reads on."""

    def __init__(self, worker: Any):
        self._worker = worker
        self.result: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def forward_batch_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The target's pass."""
        self.result = self._worker.forward_batch_generation(*args, **kwargs)
        return self.result


class Step:
    """One step of trees: what is drafted, verified and kept, between SGLang's own doings.

    - `worker`: SGLang's DFLASH worker, in the shape of the drafter's block.
    - `drafts`: most drafts of a tree.
    - `passes`: puts the target's attention backend and graphs for all nodes in place; its argument is how many entries their mask has.
    - `move`: moves the KV of a path, see ``kernels.PathKv``.
    - `kernels`: whether trees are built by the kernel of this package.
    - `coupled`: the target's random numbers, where a request samples and they are known; see there.
    """

    def __init__(
        self,
        worker: Any,
        target: Recorded,
        drafts: int,
        passes: Callable[[int], None],
        move: Callable[..., None],
        kernels: bool,
        coupled: Seeded | None = None,
    ):
        self.worker, self.target, self.drafts, self.passes, self.move = worker, target, drafts, passes, move
        self.kernels, self.coupled = kernels, coupled
        self.tree: Tree | None = None
        # Slots of all nodes, where the anchors stand, and rows of the requests.
        self.places: tuple[Tensor, Tensor, Tensor] | None = None

    def forget(self) -> None:
        """The step is over. What it holds is large, and SGLang's classes that stand for it live until they are collected."""
        self.tree = self.places = self.target.result = None

    def draft(self, hidden: Tensor, lm_head: Any, group: Any) -> Tensor:
        """Trees out of the drafter's `hidden` ``[R * (B - 1), H]``; returns the best token of every place, i64 ``[R * (B - 1)]``."""
        rows, best = hidden.shape[0] // (self.worker.block_size - 1), min(self.drafts, MOST_CANDIDATES)
        if self.coupled is None:
            tokens, log_probs = candidates(hidden, lm_head, group, best)
        else:
            found = candidates(hidden, lm_head, group, self.coupled.candidates)
            positions = self.worker._draft_block_positions_buf[:rows, :-1]
            tokens, log_probs = self.coupled.reordered(*found, positions, best)
        shape = (rows, -1, tokens.shape[-1])
        anchors = self.worker._draft_block_ids_buf[:rows, 0].to(torch.int64)
        self.tree = Tree.build(anchors, tokens.view(shape), log_probs.view(shape), self.drafts, kernels=self.kernels)
        return tokens[:, 0]

    def draft_along(self, anchors: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """Trees out of a DFlash 2's lattice: candidates i64 ``[R, B - 1, k]`` and their scores behind each other ``[R, B - 1, k, k]``. Returns the
        first candidate of every place, i64 ``[R, B - 1]``."""
        self.tree = Tree.along(anchors.to(torch.int64), tokens, likelihoods(scores), self.drafts)
        return tokens[:, :, 0]

    def verify(self, told: Any, batch: Any, table: Tensor) -> None:
        """Has SGLang's pass verify the trees instead of the chain it was `told` of; `table` are the KV slots of SGLang's requests."""
        assert self.tree is not None
        block, nodes = int(told.draft_token_num), self.tree.nodes
        starts = batch.seq_lens.to(torch.int64)
        place = starts[:, None] + torch.arange(nodes, device=starts.device)
        rows = batch.req_pool_indices.to(torch.int64)
        slots = table[rows[:, None], place].to(torch.int64)
        self.places = slots, starts, rows
        told.draft_token = self.tree.tokens.reshape(-1)
        told.positions = self.tree.positions(starts).reshape(-1)
        told.draft_token_num = told.num_tokens_per_req = told.num_tokens_for_logprob_per_req = nodes
        batch.out_cache_loc = slots.reshape(-1)
        before = batch.seq_lens_cpu
        # SGLang's bound of the length: what is committed, and the block. Where it knows no better, all that is reserved.
        exact = before is not batch.spec_info.nxt_kv_lens_cpu
        if exact:
            batch.seq_lens_cpu = before + (nodes - block)
            batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        told.kv_loc_plan = self.worker.model_runner.kv_index_translator.plan(
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=before - block if exact else before,
            write_virtual=batch.out_cache_loc,
            read_extent=nodes,
        )
        # With overlap scheduling the host may be a step behind, which gains at most a block.
        told.custom_mask = self.tree.mask(starts, nodes * (int(batch.seq_lens_sum) + block * starts.shape[0]))
        self.passes(told.custom_mask.numel())

    def keep(self, sampled: Tensor, most: Tensor | None, scored: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the drafts that are the target's tokens `sampled` i64 ``[R, M]``: KV, hidden states and, where they are `scored`, logits of the path
        move to where a chain's would be. Returns how many drafts i32 ``[R]``, the bonus i64 ``[R]`` and the tokens gained i64 ``[R, B]``, of
        which those behind the bonus are never read."""
        assert self.tree is not None and self.places is not None
        path, accepted = self.tree.walk(sampled, most)
        gained = sampled.gather(1, path)
        bonus = gained.gather(1, accepted.to(torch.int64)[:, None])[:, 0]
        self.move(path, accepted, *self.places)
        rows = (torch.arange(path.shape[0], device=path.device)[:, None] * self.tree.nodes + path).reshape(-1)
        output = self.target.result.logits_output
        output.hidden_states = output.hidden_states[rows]
        if scored:
            output.next_token_logits = output.next_token_logits[rows]
        return accepted, bonus, gained

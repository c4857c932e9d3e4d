"""A step of the engine that stays on the GPU: one copy up, two graphs, one copy down.

    plan ──> upload ──> [ prepare, drafter, choose ] ──> [ prepare, target, draw, accept, inject ] ──> download ──> walk, commit
    host                  drafting graph                   verifying graph                              the only wait

Between upload and download the host is asked for nothing: anchors, drafts, drawn tokens, what was accepted and where its draft KV
goes are read and written on the device. A step that is launched before the results of the last one are home finds where its rows
start where that one left it (`_catch_up`); host arrays have two copies for it. A decoding step is padded to a bucket (requests to a power of two, every request to the
longest block) and captured in a CUDA graph per bucket; a step with chunks of prompts differs every time and runs the same functions
without a graph.

Chains are the drafter's likeliest tokens; in a step with a request that samples another graph draws them, by the numbers that the target's tokens
will be drawn with (`drafting`). Drafting a tree, the drafting graph ends with its nodes, and the verifying one moves the KV of the accepted path
to where it belongs. Trees have one size per step: which of it a request gets is the drafter's to say, and nobody asks it.

States of recurrent layers stay on the device, too, at their addresses: a row's slot is data, and by how many kept tokens its state has to move
on is what its context says. The host speaks up where a prompt begins from a copy of a state, where one is to be made, and where a chunk
of prompt longer than a block was kept.

What may be drawn for a constrained request is said by the host: in the few steps with one, its rows go there between the target and the walk,
and their tokens come back.

Every input of a graph is a view of one block of memory that stays where it is, every output a view of another (`Arena`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import cuda
from ...attention import CudaAttention
from ...config import EngineConfig, StepCosts
from ...errors import DflashError
from ...models.drafter import DeviceDrafter, Drafter
from ...models.target import TargetModel
from ..backend import Step
from ..constraints import Constraint, Edited
from ..costs import rising
from ..timing import StageTimes, stage
from . import drafting
from .arena import Arena
from .aside import Aside
from .graphs import Graphs

_ROUNDS, _PATIENCE_S = 12, 2.0


def serves(target: TargetModel, draft: Drafter | None) -> bool:
    """Whether steps of these models can stay on the device: kernels for it, heads and a type that they take."""
    if not cuda.available(target.device) or (target.state is not None and target.state.on_device() is None):
        return False
    return target.kernel and (draft is None or draft.on_device() is not None)


class Wanted(NamedTuple):
    """What a step is to give, the same for all its rows: whether any row filters its vocabulary, whether tokens are scored, how many of the
    likeliest ones are named, whether draft KV is stored, and whether the drafts are trees."""

    filters: bool
    scored: bool
    best: int
    inject: bool
    trees: bool = False


def _bucket(count: int, most: int) -> int:
    """The next power of two, at most `most`."""
    return min(1 << max(count - 1, 0).bit_length(), most)


def _widths(nodes: int) -> list[int]:
    """Tokens of a row, the anchor counted, that trees of up to `nodes` drafts come in, so that graphs are few: 2^i or 3 * 2^i."""
    steps = {m << i for i in range(10) for m in (2, 3)} | {nodes + 1}
    return sorted(n for n in steps if 1 < n <= nodes + 1)


def _splits(max_keys: int) -> int:
    """Splits that a graph for requests of up to `max_keys` keys has room for: a power of two."""
    return 1 << (-(-max_keys // cuda.SPLIT_KEYS) - 1).bit_length()


class _Flight(NamedTuple):
    """A step on its way: tokens of its blocks or nodes of its trees, what it was asked for, and where its results arrive when `event` has
    come (None: they are there): the output arena's arrays, the likeliest tokens with their scores, the rows that constraints edited, and whether
    the plan knows its drafts already."""

    step: Step
    block: int
    wanted: Wanted
    out: dict[str, np.ndarray]
    tops: list[Tensor] | None
    event: Any
    edited: Edited | None = None
    told: bool = False


class DeviceBackend:
    """Runs the steps of an engine on the device of its target. Both models have their KV allocated.

    `graphs` captures decoding steps in CUDA graphs, the target's pass only where its forward is one of ours: other code may do anything.
    """

    # What is drafted is verified: to ask the host would be to wait for the drafter.
    asks_host = False
    injected_steps = 0

    def __init__(
        self,
        core: Any,
        target: TargetModel,
        draft: Drafter | None,
        config: EngineConfig,
        *,
        block_size: int,
        max_context: int,
        constrained: Mapping[int, Constraint],
        tree_nodes: int = 0,
        graphs: bool = True,
    ):
        self.core, self.times, self.constrained = core, StageTimes(), constrained
        self.target, self.draft = target, None if draft is None else draft.on_device()
        self.device, self.page_size, self.block_size = target.device, config.page_size, block_size
        self.rows = config.max_running
        self.tree_nodes, self.widths = tree_nodes, _widths(tree_nodes)
        # Most tokens of a decoding row.
        row = max(block_size, tree_nodes + 1)
        # Positions that a block may reach past the last one of a text.
        self.limit = max_context + block_size
        cuda.load(self.device)
        self.graphs = Graphs(self.device) if graphs else None
        self.target_in_graph = target.path != "modules"
        self._state = None if target.state is None else target.state.on_device()
        target.prepare(self.limit)
        if self.draft is not None:
            self.draft.prepare(self.limit)
        r, n = self.rows, self.rows * row
        # Row `r` is an empty request, for the padding of drafting batches.
        self._in = Arena(
            self.device,
            {
                "query_starts": ((r + 1,), np.int32),
                # 0 where only the device knows, which then fills in what the host says.
                "start_known": ((r + 1,), np.int32),
                "anchor_known": ((r + 1,), np.int32),
                "table_rows": ((r + 1,), np.int64),
                "context_lens": ((r + 1,), np.int32),
                "valid_from": ((r + 1,), np.int32),
                "draft_rows": ((r,), np.int32),
                "draft_rows64": ((r,), np.int64),
                "anchors": ((r + 1,), np.int64),
                "sampling": ((r, cuda.SAMPLING_ROW_BYTES), np.uint8),
                # In the order of `draft_rows`.
                "draft_sampling": ((r, cuda.SAMPLING_ROW_BYTES), np.uint8),
                "pages": ((r + 1, core.page_table.shape[1]), np.int32),
            },
        )
        self._out = Arena(
            self.device,
            {
                "tokens": ((n,), np.int64),
                "drafts": (((r + 1) * row,), np.int64),
                "parents": (((r + 1) * row if tree_nodes else 0,), np.int32),
                "status": ((n,), np.int32),
                "logprobs": ((n,), np.float32),
                "accepted": ((r,), np.int32),
            },
        )
        self._row_ids = torch.arange(r, dtype=torch.int32, device=self.device)
        # Where each row of the page table stands after the last step that it was in; the last entry is nobody's.
        rows = core.page_table.shape[0] + 1
        self._lens = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._anchors = torch.zeros(rows, dtype=torch.int64, device=self.device)
        # Tokens that the last step's rows gained at most, beyond what the host counts on.
        self._uncertain = 0
        self._edits = self._edit_room(1024)
        if tree_nodes:
            self._make_room_for_trees(n)

    def _make_room_for_trees(self, tokens: int) -> None:
        """Room for trees of up to `tree_nodes` drafts, and where the target's KV lies."""
        caches = list(self.target.caches.values())
        self._target_kv = cuda.KvCaches([k for k, _ in caches], [v for _, v in caches])
        # Which node of which tree a packed token is.
        self._nodes = Arena(self.device, {"nodes": ((tokens,), np.int64)})
        room = (self.rows + 1) * (self.tree_nodes + 1)
        self._depths = torch.zeros(room, dtype=torch.int32, device=self.device)
        self._masks = torch.zeros(room * -(-(self.tree_nodes + 1) // 64), dtype=torch.int64, device=self.device)

    def _edit_room(self, entries: int) -> Arena:
        parts = {name: ((entries,), np.int32) for name in ("history_tokens", "history_counts", "bias_tokens")}
        return Arena(self.device, {**parts, "bias_values": ((entries,), np.float32)})

    @property
    def _drafter(self) -> DeviceDrafter:
        """Only of steps that draft, or store draft KV."""
        assert self.draft is not None
        return self.draft

    @property
    def num_graphs(self) -> int:
        return 0 if self.graphs is None else len(self.graphs)

    # ---- a step --------------------------------------------------------------------------------------------------

    @stage("verify")
    def launch(self, step: Step) -> _Flight:
        plan = step.plan
        sampling = self.core.device_sampling(plan)
        if sampling.unresolved:
            raise DflashError(
                "a step was launched ahead although its draws count tokens that are not known; this is a defect"
            )
        batch, _, _, drafted, longest, block, prompts = plan.outline
        bucket = batch if prompts else _bucket(batch, self.rows)
        self._in.turn()
        unknown, max_keys = self.core.fill_inputs(plan, sampling, bucket, self._uncertain, **self._in.host)
        self._fill_edits(sampling)
        self._in.upload("pages", batch)
        self._uncertain = longest - 1
        if self._state is not None:
            starting = plan.state_restore >= 0
            self._state.restore(plan.row_ids[starting], plan.state_restore[starting])
        if unknown:
            self._run(("catch up",), self._catch_up)
        tree_block = step.block if step.trees else None
        if tree_block is not None:
            self._fill_nodes(plan, bucket, longest)
        if drafted:
            # Trees are made of what is likely.
            coupled = sampling.samples and not step.trees
            self.draft_graph(_bucket(drafted, self.rows), block, max_keys, tree_block, coupled)
        wanted = Wanted(
            sampling.filters,
            sampling.scores,
            sampling.alternatives,
            step.inject,
            step.trees,
        )
        best = None
        aside = None
        if self.constrained and not self.constrained.keys().isdisjoint(plan.request_ids.tolist()):
            aside = Aside(self, plan, block if drafted else 0, step.trees)
        if prompts:
            best = self._mixed(plan, self._drafts(max(block, 1)), longest, max_keys, wanted, aside)
        elif wanted.best or aside is not None:
            best = self._verify(bucket, longest, max_keys, wanted, aside)
        else:
            self.verify_graph(bucket, longest, max_keys, wanted)
        tops = None if best is None else list(best)
        if tops is not None and self.device.type == "cuda":
            tops = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tops]
        self._out.turn()
        # The last copy of the step.
        out = self._out.download()
        edited = None if aside is None else aside.edited
        return _Flight(step, block, wanted, out, tops, self._out.copied, edited, aside is not None)

    def keep(self, step: Step, accepted: Any) -> None:
        """Chunks of prompts that are longer than a block are kept whole; what is kept of others their next context says."""
        if self._state is not None:
            plan = step.plan
            self._state.keep(plan.row_ids, plan.context_lens + plan.block_len)

    def resolve(self, launched: _Flight) -> Any:
        self._wait(launched)
        accepted = self._walk(launched)
        if self._state is not None:
            plan = launched.step.plan
            saved = plan.state_save >= 0
            lengths = plan.context_lens[saved] + plan.block_len[saved]
            self._state.save(plan.row_ids[saved], lengths, plan.state_save[saved])
        return accepted

    @stage("verify")
    def _wait(self, launched: _Flight) -> None:
        """The only wait of a step."""
        if launched.event is not None:
            launched.event.synchronize()

    @stage("accept")
    def _walk(self, launched: _Flight) -> Any:
        """What the core keeps, which has to be what the device kept."""
        plan, block, wanted, out, tops = (
            launched.step.plan,
            launched.block,
            launched.wanted,
            launched.out,
            launched.tops,
        )
        batch, _, rows, drafted, *_ = plan.outline
        drafts = None
        if drafted and not launched.told:
            chains = out["drafts"][: (self.rows + 1) * (block - 1)].reshape(self.rows + 1, block - 1)
            if wanted.trees:
                self._set_trees(plan, chains, out["parents"][: (self.rows + 1) * block].reshape(self.rows + 1, block))
            else:
                drafts = chains
        return self.core.accept_outputs(
            plan,
            out["tokens"][:rows],
            out["status"][:rows],
            out["accepted"][:batch],
            drafts=drafts,
            logprobs=out["logprobs"][:rows] if wanted.scored else None,
            top_tokens=None if tops is None else tops[0][:rows].numpy(),
            top_logprobs=None if tops is None else tops[1][:rows].numpy(),
            edited=launched.edited,
        )

    def tell_drafts(self, plan: Any, block: int, trees: bool) -> None:
        """Fills the drafts of a step into its plan before its results are home."""
        if not block:
            return
        chains = self._drafts(block).cpu().numpy()
        if trees:
            self._set_trees(plan, chains, self._trees(block)[0].cpu().numpy())
        else:
            plan.set_drafts(np.ascontiguousarray(chains[plan.draft_rows]))

    def _set_trees(self, plan: Any, drafts: np.ndarray, parents: np.ndarray) -> None:
        rows = plan.draft_rows
        anchors = plan.token_ids[plan.query_starts[rows]]
        plan.set_trees(np.concatenate((anchors[:, None], drafts[rows]), axis=1), parents[rows], plan.block_len[rows])

    def draft_graph(
        self, requests: int, row: int, max_keys: int, tree_block: int | None = None, coupled: bool = False
    ) -> None:
        """Drafts for rows of `row` tokens: blocks of so many, or trees of so many nodes out of blocks of `tree_block`. `coupled` chains are drawn as
        `draft_sampling` says."""
        splits, block = _splits(max_keys), tree_block or row

        def work() -> None:
            inputs, draft, keys = self._in.device, self._drafter, splits * cuda.SPLIT_KEYS
            rows64 = inputs["draft_rows64"][:requests]
            blocks = drafting.run(draft, inputs, requests, block, self.page_size, self.limit, keys)
            if tree_block is None:
                asked = inputs["draft_sampling"][:requests] if coupled else None
                self._drafts(block).index_copy_(0, rows64, drafting.chains(draft, blocks, asked))
                return
            trees = drafting.trees(draft, blocks, row)
            self._drafts(row).index_copy_(0, rows64, trees.tokens[:, 1:])
            for room, values in zip(self._trees(row), (trees.parents, trees.depths, trees.masks.view(torch.int64))):
                room.index_copy_(0, rows64, values)

        self._run(("draft", requests, row, tree_block, splits, coupled), work)

    def verify_graph(self, requests: int, block: int, max_keys: int, wanted: Wanted) -> None:
        splits = _splits(max_keys)

        def work() -> None:
            self._verify(requests, block, splits * cuda.SPLIT_KEYS, wanted)

        if self.target_in_graph:
            self._run(("verify", requests, block, splits, wanted), work)
        else:
            work()

    def _run(self, key: tuple, work: Callable[[], None]) -> None:
        if self.graphs is None:
            work()
        else:
            self.graphs.run(key, work)

    def _drafts(self, block: int) -> Tensor:
        """int64 [rows + 1, block - 1], packed: the kernel takes no gaps."""
        return self._out.device["drafts"][: (self.rows + 1) * (block - 1)].view(self.rows + 1, block - 1)

    def _fill_nodes(self, plan: Any, bucket: int, row: int) -> None:
        """Tells the packed tokens of a step of trees which nodes they are."""
        self._nodes.turn()
        nodes, lens = self._nodes.host["nodes"], plan.block_len
        tokens = plan.token_ids.size
        within = np.arange(tokens) - np.repeat(plan.query_starts[:-1], lens)
        nodes[:tokens] = np.repeat(np.arange(lens.size), lens) * row + within
        # Anchors are all alike, those of rows without a tree and of the padding, too: they borrow one that this step writes.
        nodes[:tokens][within == 0] = nodes[tokens : bucket * row] = int(plan.draft_rows[0]) * row
        self._nodes.upload("nodes", bucket * row)

    def _fill_edits(self, sampling: Any) -> None:
        """Brings up what is counted, biased and masked, of the few steps that have any of it."""
        used = max(sampling.history_tokens.size, sampling.bias_tokens.size)
        if not used:
            return
        room = self._edits.host["bias_tokens"].size
        if used > room:
            # Graphs know the old room's address.
            if self.graphs is not None:
                self.graphs.forget()
            while room < used:
                room *= 2
            self._edits = self._edit_room(room)
        self._edits.turn()
        for name, values in self._edits.host.items():
            entries = getattr(sampling, name)
            values[: entries.size] = entries
        self._edits.upload("bias_values")

    # ---- what the graphs hold: no host values, the same tensors every time ----------------------------------------

    def _catch_up(self) -> None:
        """Fills in what only the device knows: where rows start, and their first tokens."""
        inputs, rows = self._in.device, self._in.device["table_rows"]
        lens, anchors = inputs["context_lens"], inputs["anchors"]
        lens.copy_(torch.where(inputs["start_known"] > 0, lens, self._lens.index_select(0, rows)))
        anchors.copy_(torch.where(inputs["anchor_known"] > 0, anchors, self._anchors.index_select(0, rows)))

    def _trees(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of trees of `row` nodes: parents and depths int32 [rows + 1, row], masks int64 [rows + 1, row, words]."""
        count, words = (self.rows + 1) * row, -(-row // 64)
        parents = self._out.device["parents"][:count].view(-1, row)
        return parents, self._depths[:count].view(-1, row), self._masks[: count * words].view(-1, row, words)

    def _verify(
        self, requests: int, block: int, max_keys: int, wanted: Wanted, aside: Aside | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """A decoding step of `requests` rows of at most `block` tokens each, padding included."""
        inputs, tokens = self._in.device, requests * block
        token_ids, positions, slots = (torch.empty(tokens, dtype=torch.int64, device=self.device) for _ in range(3))
        table = self._table(requests)
        tree = None
        if wanted.trees:
            nodes = self._nodes.device["nodes"][:tokens]
            tree = tuple(part.flatten(0, 1).index_select(0, nodes) for part in self._trees(block))
        cuda.prepare_block(
            query_starts=inputs["query_starts"][: requests + 1], context_lens=inputs["context_lens"][:requests],
            anchors=inputs["anchors"][:requests], table=table, token_ids=token_ids, positions=positions, slots=slots,
            drafts=self._drafts(block)[:requests] if block > 1 else None, depths=None if tree is None else tree[1],
        )  # fmt: skip
        return self._pass(requests, token_ids, positions, slots, None, None, block, max_keys, wanted, tree, aside)

    def _mixed(
        self, plan: Any, drafts: Tensor, longest: int, max_keys: int, wanted: Wanted, aside: Aside | None
    ) -> tuple[Tensor, Tensor] | None:
        """A step with chunks of prompts: the host knows everything but the drafts."""
        packed = torch.from_numpy(np.concatenate((plan.token_ids, plan.positions, plan.slots))).to(self.device)
        token_ids, positions, slots = packed.view(3, -1)
        numbers = np.concatenate((plan.logit_starts, plan.logit_rows))
        starts, logit_rows = torch.from_numpy(numbers).to(self.device).split(
            [plan.logit_starts.size, plan.logit_rows.size]
        )  # fmt: skip
        for row in plan.draft_rows.tolist():
            first, end = int(plan.query_starts[row]) + 1, int(plan.query_starts[row + 1])
            token_ids[first:end] = drafts[row, : end - first]
        requests = plan.context_lens.size
        return self._pass(
            requests, token_ids, positions, slots, starts, logit_rows, longest, max_keys, wanted, None, aside, plan
        )

    def _table(self, requests: int) -> cuda.PageTable:
        return cuda.PageTable(self._in.device["pages"], self._row_ids[:requests], self.page_size)

    def _pass(
        self, requests: int, token_ids: Tensor, positions: Tensor, slots: Tensor, logit_starts: Tensor | None,
        logit_rows: Tensor | None, longest: int, max_keys: int, wanted: Wanted, tree: tuple[Tensor, ...] | None = None,
        aside: Aside | None = None, plan: Any = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Target, draw, accept, inject; returns the likeliest tokens per row with their scores. `tree`: parents, depths and masks of the
        packed tokens; `aside` draws some rows on the host; `plan` of a step with chunks of prompts."""
        parents = None if tree is None else tree[0]
        inputs, outputs, edits = self._in.device, self._out.device, self._edits.device
        query_starts, lens = inputs["query_starts"][: requests + 1], inputs["context_lens"][:requests]
        table = self._table(requests)
        attention = CudaAttention(
            query_starts=query_starts,
            context_lens=lens,
            table=table,
            max_block_len=longest,
            max_keys=max_keys,
            slots=slots,
            ancestors=None if tree is None else tree[2],
        )
        with self._states(query_starts, lens, longest, plan):
            logits, features = self.target.run(token_ids, positions, self.limit, attention, logit_rows)
        rows = logits.shape[0]
        sampled = outputs["tokens"][:rows]
        if rows:
            sampling = cuda.SamplingRows(
                inputs["sampling"][:requests], edits["history_tokens"], edits["history_counts"], edits["bias_tokens"],
                edits["bias_values"], wanted.filters,
            )  # fmt: skip
            cuda.sample_rows(
                logits, sampling, query_starts=query_starts, token_ids=token_ids, positions=positions, row_tokens=logit_rows,
                parents=parents,
                out=cuda.Sampled(sampled, outputs["status"][:rows], outputs["logprobs"][:rows] if wanted.scored else None),
            )  # fmt: skip
            if aside is not None:
                aside.draw(logits, sampled)
        room = cuda.empty_accepted(requests, token_ids.shape[0], longest, self.device)
        assert room.commit_slots is not None
        accepted = cuda.accept(
            query_starts=query_starts, context_lens=lens, token_ids=token_ids, sampled=sampled, table=table,
            max_nodes=longest, logit_starts=logit_starts, parents=parents,
            # Nobody's tokens, the padding, are nobody's to write.
            out=room._replace(accepted=outputs["accepted"][:requests], commit_slots=room.commit_slots.fill_(-1)),
        )  # fmt: skip
        rows64 = inputs["table_rows"][:requests]
        self._lens.index_copy_(0, rows64, accepted.context_lens)
        # A row that could not be drawn has no token; what is launched ahead for it goes on with any, and nobody hears of it.
        self._anchors.index_copy_(0, rows64, accepted.next_anchors.clamp_min(0))
        if tree is not None:
            cuda.compact_kv(accepted.path, lens, self._target_kv, table)
        if wanted.inject:
            kv = self._drafter.context(features)
            self._drafter.store(kv, accepted.commit_positions, accepted.commit_slots, accepted.commit_rows)
        return cuda.tree_top_k(logits, wanted.best) if wanted.best and rows else None

    def _states(
        self, query_starts: Tensor, lens: Tensor, longest: int, plan: Any
    ) -> contextlib.AbstractContextManager[None]:
        """Around the target's pass: its recurrent layers then know whose tokens they see."""
        if self._state is None:
            return contextlib.nullcontext()
        whose = () if plan is None else (plan.block_len, plan.row_ids)
        return self._state.running(query_starts, lens, self._in.device["table_rows"][: lens.shape[0]], longest, *whose)

    # ---- made-up steps: costs, and graphs ahead of requests --------------------------------------------------------

    @torch.inference_mode()
    def costs(self) -> StepCosts:
        """What passes cost here, for the planner: the target's by rows, the drafter's with the injection that follows."""
        shapes = sorted({(1, size) for size in (1, 2, (self.block_size + 2) // 2, self.block_size)})
        shapes += [(n, self.block_size) for n in (2, 4, 8, 16, 32, 64) if n <= self.rows]
        trees = [
            (n, self.tree_nodes + 1) for n in (1, 4, 16, 64) if n <= self.rows and self.tree_nodes >= self.block_size
        ]
        shapes = sorted({*shapes, *trees}, key=lambda shape: shape[0] * shape[1])
        target, drafts = [], []
        for requests, block in shapes:
            self.make_up(requests, block)
            passes = [
                lambda r=requests, b=block, i=inject: self.verify_graph(r, b, 1, Wanted(False, False, 0, i))
                for inject in (False, True)
            ]
            plain = self._time(passes[0])
            target.append((requests * block, plain))
            if 1 < block <= self.block_size:
                first = partial(self.draft_graph, requests, block, 1)
                both = self._time(lambda first=first, then=passes[1]: [work() for work in (first, then)])
                drafts.append((requests * block, max(both - plain, 0.0)))
        return StepCosts(rising(target), rising(drafts))

    def make_up(self, requests: int, block: int) -> None:
        """Uploads a step of empty requests of `block` tokens each, all on page 0."""
        host = self._in.host
        for name in ("context_lens", "valid_from", "anchors", "sampling", "draft_sampling", "pages"):
            host[name][:] = np.zeros((), dtype=host[name].dtype)
        host["draft_rows"][:] = host["draft_rows64"][:] = np.arange(self.rows)
        host["table_rows"][:] = np.arange(self.rows + 1)
        host["query_starts"][:] = np.minimum(np.arange(self.rows + 1), requests) * block
        self._in.upload("pages")

    def _time(self, work) -> float:
        """Seconds of the shortest of some rounds; the first ones warm up."""
        begun, best = time.perf_counter(), float("inf")
        for turn in range(2 + _ROUNDS):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            if turn > 1:
                best = min(best, time.perf_counter() - start)
                if time.perf_counter() - begun > _PATIENCE_S:
                    break
        return best

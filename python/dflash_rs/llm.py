"""The embedded engine: one process, a Hugging Face causal LM as target, a DFlash drafter beside it.

    plan ──> propose ──> forward ──> accept ──> inject ──> commit ──> events
    core     drafter     target      core       drafter    core       text

The core (Rust) decides and books; torch runs the two models; this file only carries values from one to the other and turns
tokens into text. Each stage is one call with whole-batch arrays.
"""

from __future__ import annotations

import atexit
import functools
import secrets
import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from .arguments import bad, flag, integer, thread_count
from .config import EngineConfig, StepCosts
from .errors import DflashError, InvalidArgument
from .options import (
    Asked,
    asked,
    core_params,
    encodable,
    import_torch,
    known_tokens,
    pick_costs,
    pick_device,
    pick_dtype,
    pick_models,
    pick_precision,
)
from .outputs import ABORT, REASONS, Active, Output, Prompt, StreamEvent, refused, token_logprobs
from .sampling import SamplingParams
from .streams import Stream
from .text import Detokenizer, token_bytes
from .turns import Turns

if TYPE_CHECKING:
    from .device_step import DeviceStep

# Page tables beyond this are a mistake, not a plan.
_MOST_TABLE_BYTES = 1 << 30
_MOST_NODES = 1023
_CALL = functools.partial.__call__


class LLM:
    """A target, optionally with a DFlash drafter, behind continuous batching and a paged KV cache.

    - `model`: folder or hub name of a Hugging Face causal LM; None is the bundled pair. `draft`: folder or hub name of a DFlash checkpoint;
      None decodes plainly; "auto" is the bundled drafter, and only goes with the bundled model.
    - `device`: "cpu", "cuda" or "auto". `dtype`: "float32", "bfloat16", "float16" or "auto" (float32 on a CPU, bfloat16 on a
      GPU). float32 makes rounding differences between block sizes as rare as they can be.
    - `matmul_precision`: "highest"; "medium", which multiplies bfloat16 values and adds up in float32 (what torch calls medium, too; for
      float32 on a CPU); or "auto", medium where the processor has an instruction for it. Medium costs some digits of the
      logits, as bfloat16 checkpoints do anywhere; with and without a drafter they are the same digits.
    - `block_size`: tokens of a block, anchor included; None is the drafter's own.
    - `threads`: torch's CPU threads for the whole process; None leaves them.
    - `adaptive`: draft and verify as many tokens as pay, judged by what a pass and a row of it cost here (measured when the
      models are loaded, see `costs`), by what was accepted so far, and by the drafter's own confidence. False drafts and
      verifies whole blocks. `costs`: the costs to judge by instead, a `StepCosts`. The text is the same in every case.
    - `tree_nodes`: drafts of a tree at most: where the drafter is unsure, several tokens are drafted for one place, and the target
      picks the path. 0 drafts chains of one token per place. Trees may be longer than a block; they pay where a row more costs little.
    - `cuda_graphs`: on a GPU, capture decoding steps in CUDA graphs. False launches every kernel anew, for looking for faults.
    - the rest: see `dflash_rs.config.EngineConfig`.

    Text is the same with and without a drafter, for every sampling option, up to rounding of the logits. An LLM may be used
    from several threads; the steps are taken one at a time. A signal handler may call `abort` and `close`, which then take effect at
    the end of the step it came into; a call that would take a step itself raises DflashError there, and so does every call in a forked
    child.

    Raises InvalidArgument for a bad option, CheckpointError for a checkpoint that is damaged or does not fit its target,
    MissingPackage without torch and transformers.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        draft: str | Path | None = "auto",
        *,
        device: str = "auto",
        dtype: str = "auto",
        matmul_precision: str = "highest",
        block_size: int | None = None,
        threads: int | None = None,
        page_size: int = 16,
        num_pages: int = 0,
        max_running: int = 32,
        max_context: int = 0,
        max_batch_tokens: int = 1024,
        prefix_cache: bool = True,
        adaptive: bool = True,
        costs: StepCosts | None = None,
        tree_nodes: int = 0,
        cuda_graphs: bool = True,
    ):
        torch = import_torch()

        from .device_step import DeviceStep, serves
        from .models.checkpoint import load_tokenizer, readable
        from .models.costs import measure
        from .models.loader import load_draft
        from .models.target import TargetModel
        from .models.threads import while_loading

        self.config = EngineConfig(page_size, num_pages, max_running, max_context, max_batch_tokens, prefix_cache)
        page_size, max_running = self.config.page_size, self.config.max_running
        max_context, max_batch_tokens = self.config.max_context, self.config.max_batch_tokens
        model, draft = pick_models(model, draft)
        flag("adaptive", adaptive)
        flag("cuda_graphs", cuda_graphs)
        costs = pick_costs(costs)
        if threads is not None:
            torch.set_num_threads(thread_count("threads", threads))
        self._torch = torch
        self.device = pick_device(torch, device)
        self.dtype = pick_dtype(torch, dtype, self.device)
        self.model_dir, self.draft_dir = str(model), None if draft is None else str(draft)

        self.matmul_precision = pick_precision(matmul_precision, self.device, self.dtype)
        products = {"matmul_precision": self.matmul_precision}

        with while_loading():
            self._target = TargetModel.load(model, device=str(self.device), dtype=self.dtype, **products)
            self._draft = None if draft is None else load_draft(draft, self._target, **products)
        if self._draft is not None:
            self._target.set_taps(self._draft.config.target_layer_ids)
        self.block_size = self._pick_block(block_size)
        most = 0 if draft is None else _MOST_NODES
        expected = "0 without a drafter" if draft is None else None
        self.tree_nodes = integer("tree_nodes", tree_nodes, 0, most, expected=expected)
        # Most tokens of a decoding row.
        row = max(self.block_size, self.tree_nodes + 1)
        self.tokenizer = load_tokenizer(model)
        self.vocab_size = self._target.vocab_size
        with readable(model, "tokenizer"):
            self._bytes = token_bytes(self.tokenizer, self.vocab_size)
        self.eos_token_ids = list(self._target.eos_token_ids)

        limit = self._target.max_context
        if max_context > limit:
            raise InvalidArgument(f"max_context: got {max_context}, expected at most {limit}, the target's own limit")
        self.max_context = max_context or limit
        per_token = self._target.kv_bytes_per_token + (self._draft.kv_bytes_per_token if self._draft else 0)
        table = max_running * -(-(self.max_context + row) // page_size) * 4
        if table > _MOST_TABLE_BYTES:
            raise InvalidArgument(
                f"max_running: got {max_running}, expected at most {max_running * _MOST_TABLE_BYTES // table}: page tables of so many "
                f"requests would take {table / 2**30:,.1f} GiB"
            )
        pages = self.config.pages(per_token, self.max_context, row)
        self._alloc_kv(pages, per_token)
        self._core = _core.Engine(
            num_pages=pages,
            page_size=page_size,
            max_running=max_running,
            max_context=self.max_context,
            block_size=row,
            max_batch_tokens=max(max_batch_tokens, max_running),
            vocab_size=self.vocab_size,
            eos_ids=self.eos_token_ids,
            prefix_cache=prefix_cache,
            vocabulary=self._bytes,
        )
        self._draws_on_device = False
        self._device_step: DeviceStep | None = None
        if not serves(self._target, self._draft):
            self._draws_on_device = self._kernels_here()
        else:
            self._device_step = DeviceStep(
                self._target,
                self._draft,
                self.config,
                block_size=self.block_size,
                max_context=self.max_context,
                table_width=self._core.page_table.shape[1],
                tree_nodes=self.tree_nodes,
                graphs=cuda_graphs,
            )
        self.costs: StepCosts | None = None
        # Without costs it drafts whole blocks, whole trees.
        self._planner = _core.Planner(self.block_size, tree_nodes=self.tree_nodes)
        self._observes = False
        if self._draft is not None and adaptive:
            self.costs = costs or (
                measure(self._target, self._draft, self.block_size)
                if self._device_step is None
                else self._device_step.costs()
            )
            # Measured in a busy moment they are too high; what steps take corrects that. On a GPU the clock here sees launches only.
            self._observes = costs is None and self.device.type == "cpu"
            self._planner = self.costs.planner(self.block_size, self.tree_nodes)
        self._active: dict[int, Active] = {}
        self._closed = False
        self._turns = Turns()
        _MADE.add(self)
        # Requests to abort when whoever has the turn gives it up.
        self._leaving: deque[int] = deque()
        self._stage_seconds = dict.fromkeys(("plan", "draft", "verify", "accept", "inject", "commit", "text"), 0.0)
        self._steps = 0

    def _alloc_kv(self, pages: int, bytes_per_token: int) -> None:
        slots = pages * self.config.page_size
        # A size that torch cannot even express, or that the system does not give.
        too_much = InvalidArgument(
            f"num_pages, page_size: got {pages} pages of {self.config.page_size} tokens, expected a cache that fits the memory; this "
            f"one takes {slots * bytes_per_token / 2**30:,.1f} GiB"
        )
        if slots >= 2**31:
            raise too_much
        try:
            self._target.alloc_kv(slots)
            if self._draft is not None:
                self._draft.alloc_kv(slots)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise too_much from error

    def _kernels_here(self) -> bool:
        """Whether at least the draws can be made on the GPU; on one, says why nothing else is."""
        if self.device.type != "cuda":
            return False
        from . import cuda

        heads = {kv.key_dim for kv in self._target.kv_layers.values()}
        heads |= set() if self._draft is None else {self._draft.config.head_dim}
        warnings.warn(
            f"steps go through torch: got {self.dtype}, key heads of {', '.join(map(str, sorted(heads)))} elements and {self.device}, "
            f"expected bfloat16, heads of {', '.join(map(str, cuda.HEAD_DIMS))} in both models and a build with kernels for this GPU "
            "(dflash-rs doctor tells)",
            stacklevel=3,
        )
        # Loading may allocate, which a captured graph must not.
        found = cuda.available(self.device) and self.dtype in (self._torch.bfloat16, self._torch.float32)
        if found:
            cuda.load(self.device)
        return found

    def _pick_block(self, block_size: int | None) -> int:
        if self._draft is None:
            if block_size is not None:
                integer("block_size", block_size, 1, 1, expected="None or 1 without a drafter")
            return 1
        own = self._draft.config.block_size
        if block_size is None:
            return own
        return integer("block_size", block_size, 2, own, expected=f"2..{own} (the drafter was trained with {own})")

    # ---- requests ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as `generate` would make them."""
        return self._encode("text", text)

    def _encode(self, name: str, text: str) -> list[int]:
        if not isinstance(text, str) or not encodable(text):
            raise bad(name, text, "a string without lone surrogates")
        return list(self.tokenizer(text).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are not shown."""
        return Detokenizer(self.tokenizer, self._bytes).push(known_tokens("ids", ids, self.vocab_size), None, True)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        draft: bool = True,
        on_error: str = "raise",
    ) -> list[Output]:
        """Completes prompts (strings, or lists of token ids) and returns one `Output` each, in order.

        `params`: one for all or one each. `draft=False` decodes plainly on the same engine: the same text, slower.

        A prompt that cannot be taken, or whose parameters cannot be honoured, is an InvalidArgument (or OutOfPages) that names it,
        ``prompts[2]: ...`` or ``params[2].logit_bias: ...``, before any runs. With ``on_error="return"`` the others run, and at its place
        comes an `Output` without tokens, with ``finish_reason="error"`` and that message as its `error`; what is wrong with the call
        as a whole raises all the same. A request that fails later always comes back with ``finish_reason="error"``.
        """
        outputs: dict[int, Output] = {}
        with self.stream(prompts, params, draft=draft, on_error=on_error) as events:
            for event in events:
                if event.output is not None:
                    outputs[event.index] = event.output
        return [outputs[i] for i in range(len(outputs))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        draft: bool = True,
        on_error: str = "raise",
    ) -> Stream:
        """Like `generate`, but an iterator of tokens as they are committed. Closing or dropping it aborts what is unfinished:
        ``with llm.stream(...) as events:``. With ``on_error="return"`` refused prompts are the first events."""
        flag("draft", draft)
        if not isinstance(on_error, str) or on_error not in ("raise", "return"):
            raise bad("on_error", on_error, "'raise' or 'return'")
        self._check_open()
        stream = Stream(self)
        taken: list[tuple[Asked, list[int]]] = []
        for one in asked(prompts, params):
            try:
                taken.append((one, one.check(self._encode, self.vocab_size, self._bytes is not None)))
            except InvalidArgument as error:
                if on_error == "raise":
                    raise
                stream._events.append(refused(one.index, one.prompt, one.params, str(error)))
        drafts, strict = draft and self._draft is not None, on_error == "raise"
        self._turns.take(lambda: self._submit(stream, taken, drafts, strict), self._settle)
        return stream

    def abort(self, request_id: int | None) -> bool:
        """Ends a request wherever it is; its pages return. False when it is unknown or already finished."""
        if request_id is not None:
            request_id = integer("request_id", request_id, 0, expected="the request_id of an event or output")
        if self._turns.mine():
            self._leaving.append(request_id)
            return request_id in self._active
        return self._turns.take(lambda: self._abort(request_id), self._settle)

    def _abort(self, request: int) -> bool:
        active = self._active.get(request)
        if active is None:
            return False
        self._core.abort(request)
        self._finish(active, request, ABORT, [], 0, "")
        return True

    def _drop(self, requests: list[int]) -> None:
        """Aborts requests, at once or when the running step ends; waits for nothing."""
        if requests:
            self._leaving.extend(requests)
            self._turns.soon(self._settle)

    def _settle(self) -> None:
        """Does what was asked for while somebody had the turn."""
        while self._leaving:
            self._abort(self._leaving[0])
            self._leaving.popleft()
        if self._closed:
            for request in list(self._active):
                self._abort(request)
            self._target.caches = {}
            if self._draft is not None:
                self._draft._engine = None

    def _check_open(self) -> None:
        if self._closed:
            raise DflashError("this LLM is closed: make a new one")

    def _submit(self, stream: Stream, taken: list[tuple[Asked, list[int]]], drafts: bool, strict: bool) -> None:
        """Gives the core what can run. All or nothing if `strict`, else what it refuses becomes an event of the stream."""
        self._check_open()
        ids: list[int] = []
        actives: list[Active] = []
        try:
            for one, tokens in taken:
                seed = secrets.randbits(63) if one.params.seed is None else one.params.seed
                active = Active(
                    one.index, one.prompt, tokens, one.params, seed, Detokenizer(self.tokenizer, self._bytes)
                )
                active.drafts = drafts
                if self._device_step is not None:
                    active.draws = self._device_step.draws(one.params, seed)
                add = functools.partial(self._core.add, tokens, **core_params(one.params, seed, drafts))
                try:
                    # In one call: no interruption comes between a request's beginning and our knowing its number.
                    ids.extend(map(_CALL, (add,)))
                except DflashError as error:
                    told = one.tell(error)
                    if strict:
                        raise told from None
                    stream._events.append(refused(one.index, one.prompt, one.params, str(told)))
                else:
                    actives.append(active)
            found = dict(zip(ids, actives, strict=True))
            stream._waiting.update(found)
            self._active.update(found)
        except BaseException:
            for request in ids:
                self._core.abort(request)
                self._active.pop(request, None)
            stream._waiting.clear()
            raise

    def _ready(self, waiting: dict[int, Active]) -> list[StreamEvent]:
        """What is new for these requests, after a step if nothing is. Finished requests leave `waiting`."""
        return self._turns.take(lambda: self._next(waiting), self._settle)

    def _next(self, waiting: dict[int, Active]) -> list[StreamEvent]:
        if not any(a.events for a in waiting.values()):
            self._step()
        ready = []
        for request, active in list(waiting.items()):
            ready.extend(active.events)
            active.events.clear()
            if active.output is not None:
                del waiting[request]
        return ready

    # ---- a step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Takes one step for whoever runs. An interruption calls the step off; the requests go on from where they were."""
        from .models.batch import StepBatch

        seconds, clock = self._stage_seconds, time.perf_counter
        t0 = clock()
        row, block, trees = self._decide()
        plan = None
        try:
            plan = self._core.plan(row)
            if plan is None:
                raise DflashError(
                    f"nothing can run although {len(self._active)} requests are unfinished; this is a defect"
                )
            with self._torch.inference_mode():
                # Plain requests among themselves owe the drafter nothing; the core notes what it has not seen.
                inject = any(self._active[r].drafts for r in plan.request_ids.tolist() if r in self._active)
                # Prompts take their share of a step: what drafts beside them drafts chains.
                if trees and plan.is_prefill.any():
                    plan.narrow(np.minimum(plan.block_len[plan.draft_rows], block) - 1)
                    trees = False
                trees = trees and plan.draft_rows.size > 0
                block = min(block, int(plan.block_len[plan.draft_rows].max(initial=0))) if not trees else block
                drafted_rows = plan.draft_rows.size * block
                if self._device_step is not None:
                    t1 = t2 = clock()
                    drawn = self._take_on_device(plan, inject, block if trees else None)
                    t3 = clock()
                    accepted = self._walk(plan, drawn)
                    t4 = t5 = clock()
                else:
                    page_table = self._core.page_table
                    t1 = clock()
                    if plan.draft_rows.size:
                        (self._draft_trees if trees else self._draft_chains)(plan, page_table, block)
                    t2 = clock()
                    batch = StepBatch.from_arrays(
                        token_ids=plan.token_ids,
                        positions=plan.positions,
                        slots=plan.slots,
                        query_starts=plan.query_starts,
                        context_lens=plan.context_lens,
                        page_table=page_table,
                        row_ids=plan.row_ids,
                        logit_rows=plan.logit_rows,
                        page_size=self.config.page_size,
                        ancestors=plan.ancestors.reshape(plan.token_ids.size, -1) if trees else None,
                        device=self.device,
                    )
                    logits, features = self._target.forward(batch)
                    sampled = self._draw_on_device(plan, batch, logits)
                    host = logits.float().cpu().numpy() if sampled is None else None
                    t3 = clock()
                    accepted = (
                        self._core.accept(plan, host) if sampled is None else self._core.accept_sampled(plan, sampled)
                    )
                    if accepted.move_from.size:
                        self._target.move_kv(accepted.move_from, accepted.move_to)
                    t4 = clock()
                    if inject:
                        rows = accepted.commit_rows
                        self._draft.inject(features, plan.positions[rows], accepted.commit_slots, rows)
                    t5 = clock()
                if plan.draft_rows.size:
                    self._planner.record_step(plan, accepted, self._temperatures(plan.request_ids))
                events = self._core.commit(plan, accepted, injected=inject)
                t6 = clock()
            self._route(events)
            t7 = clock()
        except BaseException:
            if plan is None:
                self._core.cancel_all()
            elif not self._core.cancel(plan):
                # Committed, and somebody's tokens did not arrive: nobody gets a text with a hole.
                for request in plan.request_ids.tolist():
                    self._abort(request)
            raise
        self._steps += 1
        if self._observes and plan.logit_rows.size == plan.token_ids.size:  # a prefill computes fewer logits than rows
            self._planner.observe(plan.token_ids.size, t3 - t2, drafted_rows if inject else 0, t2 - t1 + t5 - t4)
        for name, begin, end in (
            ("plan", t0, t1), ("draft", t1, t2), ("verify", t2, t3), ("accept", t3, t4),
            ("inject", t4, t5), ("commit", t5, t6), ("text", t6, t7),
        ):  # fmt: skip
            seconds[name] += end - begin

    def _take_on_device(self, plan: Any, inject: bool, tree_block: int | None) -> Any:
        """Drafts, verifies and injects without coming back in between; see device_step.py."""
        draws = [self._active[r].draws for r in plan.request_ids.tolist()]
        histories = self._core.histories(plan) if any(d.penalises for d in draws) else None
        return self._device_step.run(plan, self._core.page_table, draws, histories, inject, tree_block=tree_block)

    def _walk(self, plan: Any, drawn: Any) -> Any:
        if drawn.parents is not None:
            plan.set_trees(drawn.drafts, drawn.parents, plan.block_len[plan.draft_rows])
        elif drawn.drafts is not None:
            plan.set_drafts(drawn.drafts)
        accepted = self._core.accept_sampled(
            plan,
            drawn.tokens,
            drawn.logprobs,
            status=drawn.status,
            top_tokens=drawn.top_tokens,
            top_logprobs=drawn.top_logprobs,
        )
        drawn.check(accepted, plan.is_prefill)
        return accepted

    def _draw_on_device(self, plan: Any, batch: Any, logits: Any) -> np.ndarray | None:
        """The target's tokens, drawn where the logits are: the same ones, without moving a vocabulary's worth of numbers per row.

        None when the host has to: no kernel for this device, penalties (their counts live in the core), log-probabilities
        asked for, or a row that cannot be drawn, which the core explains.
        """
        if not self._draws_on_device or not logits.shape[0]:
            return None
        from . import cuda

        requests = []
        for request in plan.request_ids.tolist():
            active = self._active.get(request)
            if active is None or active.logprobs is not None:
                return None
            o = active.params
            if o.repetition_penalty != 1 or o.presence_penalty != 0 or o.frequency_penalty != 0:
                return None
            requests.append(
                {
                    "seed": active.seed, "temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p, "min_p": o.min_p,
                    "logit_bias": o.logit_bias,
                }
            )  # fmt: skip
        torch, device = self._torch, logits.device
        sampled = cuda.sample_rows(
            logits,
            cuda.sampling_rows(requests, device),
            query_starts=torch.from_numpy(plan.query_starts.copy()).to(device),
            token_ids=batch.token_ids,
            positions=batch.positions,
            row_tokens=torch.from_numpy(plan.logit_rows.copy()).to(device),
            parents=torch.from_numpy(plan.parents.copy()).to(device) if plan.parents.size else None,
        )
        tokens = sampled.tokens.cpu().numpy()
        return None if (tokens < 0).any() else tokens

    def _decide(self) -> tuple[int, int, bool]:
        """The largest width of this step's requests, the tokens of the drafter's blocks, and whether to draft trees."""
        active = list(self._active.values())[: self.config.max_running]
        temperatures = np.array([a.params.temperature for a in active if a.drafts], np.float32)
        # On a device what is drafted is verified: there is nobody to ask in between.
        widths = [] if self._device_step is None else [drafts + 1 for drafts in self._device_step.tiers]
        others = len(active) - temperatures.size
        return self._planner.decide(temperatures, others, widths=widths, room=self.config.max_batch_tokens)

    def _candidates(self, plan: Any, page_table: np.ndarray, block: int, k: int | None) -> tuple[np.ndarray, ...]:
        """What the drafter has to say, for those who draft: see `DFlashDraft.candidates`."""
        rows = plan.draft_rows
        return self._draft.candidates(
            plan.token_ids[plan.query_starts[rows]],
            plan.context_lens[rows],
            page_table,
            plan.row_ids[rows],
            page_size=self.config.page_size,
            valid_from=plan.draft_valid_from[rows],
            block_size=block,
            k=k,
        )

    def _draft_chains(self, plan: Any, page_table: np.ndarray, block: int) -> None:
        """Fills in the drafts, and leaves out those that do not pay."""
        drafts, probabilities = (np.ascontiguousarray(e[:, :, 0]) for e in self._candidates(plan, page_table, block, 1))
        plan.set_drafts(drafts)
        offer = probabilities, self._temperatures(plan.request_ids[plan.draft_rows]), *self._room(plan)
        plan.narrow(self._planner.admit(*offer, plan=plan) - 1)

    def _draft_trees(self, plan: Any, page_table: np.ndarray, block: int) -> None:
        """Drafts a tree for everyone, of the drafts that pay."""
        anchors = plan.token_ids[plan.query_starts[plan.draft_rows]]
        candidates = self._candidates(plan, page_table, block, None)
        offer = *candidates, self._temperatures(plan.request_ids[plan.draft_rows]), *self._room(plan)
        plan.set_trees(*self._planner.admit_trees(anchors, *offer, plan=plan))

    def _room(self, plan: Any) -> tuple[np.ndarray, int]:
        """Most tokens of each request that drafts, and the tokens that run beside them."""
        most = plan.block_len[plan.draft_rows]
        return most, plan.token_ids.size - int(most.sum())

    def _temperatures(self, request_ids: np.ndarray) -> np.ndarray:
        active = (self._active.get(request) for request in request_ids.tolist())
        return np.array([1.0 if a is None else a.params.temperature for a in active], np.float32)

    def _route(self, events: Any) -> None:
        errors = dict(events.errors)
        ids, tokens, starts = events.request_ids.tolist(), events.tokens.tolist(), events.token_starts.tolist()
        finish, drafted, accepted = events.finish.tolist(), events.drafted.tolist(), events.accepted.tolist()
        ends, cached = events.text_ends.tolist(), events.cached_tokens.tolist()
        for e, request in enumerate(ids):
            active = self._active.get(request)
            if active is None:
                continue
            new = tokens[starts[e] : starts[e + 1]]
            active.cached = cached[e]
            if active.logprobs is not None:
                active.logprobs.extend(token_logprobs(events, starts[e], starts[e + 1]))
            if active.token_ids and new:
                active.count(drafted[e], accepted[e], len(new))
            elif new:
                active.first = time.perf_counter()
            active.token_ids += new
            final = finish[e] != 0
            # The accepted drafts come first; a stop may have cut the block short.
            kept = min(accepted[e], len(new))
            piece = active.text.push(new, None if ends[e] < 0 else ends[e], final)
            if final:
                self._finish(active, request, finish[e], new, kept, piece, errors.get(request))
            elif new:
                active.events.append(StreamEvent(active.index, request, piece, new, kept))

    def _finish(
        self,
        active: Active,
        request: int,
        code: int,
        new: list[int],
        accepted: int,
        piece: str,
        error: str | None = None,
    ) -> None:
        reason = REASONS[code]
        active.output = Output(
            request, active.prompt, active.text.text, active.token_ids, reason, active.logprobs, active.metrics(), error
        )
        active.events.append(StreamEvent(active.index, request, piece, new, accepted, reason, active.output))
        self._active.pop(request, None)

    # ---- looking inside ------------------------------------------------------------------------------------------

    def next_token_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 logits ``[vocab_size]`` after `ids`, by one forward over all of them, without the running requests' cache."""
        from .models.batch import StepBatch

        self._check_open()
        tokens = np.asarray(known_tokens("ids", ids, self.vocab_size), dtype=np.int64)
        n = tokens.size
        if not 1 <= n <= self.max_context:
            raise InvalidArgument(f"ids: got {n} tokens, expected 1..{self.max_context}, this engine's max_context")
        batch = StepBatch.from_arrays(
            token_ids=tokens,
            positions=np.arange(n),
            slots=np.arange(n),
            query_starts=np.array([0, n]),
            context_lens=np.array([0]),
            page_table=np.zeros((1, 1), dtype=np.int32),
            row_ids=np.array([0]),
            logit_rows=np.array([n - 1]),
            page_size=n,
            device=self.device,
        )

        def run() -> np.ndarray:
            self._check_open()
            kept = self._target.caches, self._target.num_slots
            try:
                self._target.alloc_kv(n)
                return self._target.forward(batch)[0][0].float().cpu().numpy()
            finally:
                self._target.caches, self._target.num_slots = kept

        return self._turns.take(run, self._settle)

    def stats(self) -> dict[str, Any]:
        """Counters since the start: steps, seconds per stage, CUDA graphs captured, pages and requests, and acceptance over all requests.

        On a GPU "verify" holds drafting and injection as well: they are one stretch of device time.
        """
        step = self._device_step

        def look() -> dict[str, Any]:
            return {
                "steps": self._steps,
                "stage_seconds": dict(self._stage_seconds),
                "cuda_graphs": len(step.graphs) if step is not None and step.graphs is not None else 0,
                **self._core.counts(),
                **self._core.stats(),
            }

        return look() if self._turns.mine() else self._turns.take(look, self._settle)

    def close(self) -> None:
        """Aborts what is unfinished and frees the KV cache. The object cannot be used afterwards; closing it again does nothing.

        From a signal handler it takes effect when the step it came into has ended; in a forked child it does nothing.
        """
        self._closed = True
        if not self._turns.forked() and not self._turns.mine():
            self._turns.take(lambda: None, self._settle)

    def __enter__(self) -> LLM:  # noqa: PYI034 (typing.Self needs Python 3.11)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_MADE: weakref.WeakSet[LLM] = weakref.WeakSet()
# A step takes far less, unless something hangs; then so does the process for that long, and no longer.
_PATIENCE_AT_EXIT_S = 30.0


@atexit.register
def _end() -> None:
    for llm in list(_MADE):
        llm._turns.end(_PATIENCE_AT_EXIT_S)

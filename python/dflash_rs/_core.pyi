"""The compiled half of dflash_rs: whole-batch arrays, one crossing per stage."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__version__: str

# --- CUDA -------------------------------------------------------------------------------------------------------------

def cuda_info() -> dict[str, Any]:
    """What was built and what this machine has. Opens the driver, creates no context, raises nothing.

    ``architectures``: list of the code in the fatbin (``sm_90a``, ``compute_80``), ``nvcc``: the compiler's version or
    None, ``fatbin_bytes``, ``driver``: its CUDA version or None, ``driver_error``: why it cannot be used, or None,
    ``devices``: a list of dicts with ``name``, ``capability`` (major, minor), ``multiprocessors`` and ``supported``
    (whether the fatbin holds code for it).
    """

_CudaTensor: TypeAlias = tuple[
    int, str, int, Sequence[int], Sequence[int]
]  # address, dtype, device ordinal, shape, strides

def cuda_load() -> dict[str, tuple[int, int, int]]:
    """Loads every kernel into the current context: {name: (registers, local bytes, static shared bytes)}."""

def cuda_clusters(device: int) -> bool:
    """Whether a device, the current one, runs the attention in clusters of blocks."""

def cuda_probe(out: _CudaTensor, stream: int) -> None:
    """Writes the architecture of the code that the driver picked to `out`, int32 [1]."""

def pack_sampling(requests: Sequence[dict[str, Any]]) -> DeviceSampling:
    """See ``dflash_rs.cuda.sampling_rows``."""

def cuda_sample_scratch(rows: int, vocab: int) -> int:
    """Bytes of scratch that `cuda_sample_rows` needs."""

def cuda_prepare_block(
    *,
    query_starts: _CudaTensor,
    context_lens: _CudaTensor,
    anchors: _CudaTensor,
    page_table: _CudaTensor,
    row_ids: _CudaTensor,
    page_size: int,
    token_ids: _CudaTensor,
    positions: _CudaTensor,
    stream: int,
    slots: _CudaTensor | None = None,
    drafts: _CudaTensor | None = None,
    depths: _CudaTensor | None = None,
    mask_token: int = 0,
) -> None:
    """See `dflash_rs.cuda.prepare_block`."""

def cuda_kv_inject(
    *,
    kv: _CudaTensor,
    k_norm: _CudaTensor,
    cos_sin: _CudaTensor,
    positions: _CudaTensor,
    slots: _CudaTensor,
    k_caches: _CudaTensor,
    v_caches: _CudaTensor,
    cache: _CudaTensor,
    eps: float,
    stream: int,
    rows: _CudaTensor | None = None,
) -> None:
    """See `dflash_rs.cuda.kv_inject`."""

def cuda_block_attention(
    *,
    q: _CudaTensor,
    k: _CudaTensor,
    v: _CudaTensor,
    k_cache: _CudaTensor,
    v_cache: _CudaTensor,
    out: _CudaTensor,
    query_starts: _CudaTensor,
    context_lens: _CudaTensor,
    page_table: _CudaTensor,
    row_ids: _CudaTensor,
    page_size: int,
    max_block_len: int,
    max_keys: int,
    scale: float,
    stream: int,
    mask: str = "causal",
    window: int | None = None,
    valid_from: _CudaTensor | None = None,
    slots: _CudaTensor | None = None,
    ancestors: _CudaTensor | None = None,
    partial_out: _CudaTensor | None = None,
    partial_stats: _CudaTensor | None = None,
    num_splits: int = 1,
    split_keys: int = 512,
    softcap: float | None = None,
    sinks: _CudaTensor | None = None,
    clusters: bool = False,
) -> None:
    """See `dflash_rs.cuda.block_attention`."""

def cuda_sample_rows(
    *,
    logits: _CudaTensor,
    sampling: _CudaTensor,
    query_starts: _CudaTensor,
    token_ids: _CudaTensor,
    positions: _CudaTensor,
    history_tokens: _CudaTensor,
    history_counts: _CudaTensor,
    bias_tokens: _CudaTensor,
    bias_values: _CudaTensor,
    tokens: _CudaTensor,
    status: _CudaTensor,
    scratch: _CudaTensor,
    stream: int,
    row_tokens: _CudaTensor | None = None,
    parents: _CudaTensor | None = None,
    logprobs: _CudaTensor | None = None,
    filters: bool = True,
) -> None:
    """See `dflash_rs.cuda.sample_rows`."""

def cuda_accept(
    *,
    query_starts: _CudaTensor,
    context_lens: _CudaTensor,
    token_ids: _CudaTensor,
    sampled: _CudaTensor,
    page_table: _CudaTensor,
    row_ids: _CudaTensor,
    page_size: int,
    accepted: _CudaTensor,
    out_tokens: _CudaTensor,
    out_lens: _CudaTensor,
    new_context_lens: _CudaTensor,
    next_anchors: _CudaTensor,
    max_nodes: int,
    stream: int,
    logit_starts: _CudaTensor | None = None,
    node_counts: _CudaTensor | None = None,
    parents: _CudaTensor | None = None,
    path: _CudaTensor | None = None,
    commit_rows: _CudaTensor | None = None,
    commit_positions: _CudaTensor | None = None,
    commit_slots: _CudaTensor | None = None,
) -> None:
    """See `dflash_rs.cuda.accept`."""

def cuda_tree_top_k(
    *,
    values: _CudaTensor,
    tokens: _CudaTensor,
    log_probs: _CudaTensor,
    stream: int,
    normalise: bool = True,
) -> None:
    """See `dflash_rs.cuda.tree_top_k`."""

def cuda_tree_build(
    *,
    anchors: _CudaTensor,
    top_tokens: _CudaTensor,
    top_log_probs: _CudaTensor,
    tokens: _CudaTensor,
    parents: _CudaTensor,
    depths: _CudaTensor,
    counts: _CudaTensor,
    stream: int,
    budgets: _CudaTensor | None = None,
    scores: _CudaTensor | None = None,
    first_child: _CudaTensor | None = None,
    next_sibling: _CudaTensor | None = None,
    masks: _CudaTensor | None = None,
) -> None:
    """See `dflash_rs.cuda.tree_build`."""

def cuda_compact_kv(
    *,
    path: _CudaTensor,
    context_lens: _CudaTensor,
    k_caches: _CudaTensor,
    v_caches: _CudaTensor,
    cache: _CudaTensor,
    page_table: _CudaTensor,
    row_ids: _CudaTensor,
    page_size: int,
    stream: int,
) -> None:
    """See `dflash_rs.cuda.compact_kv`."""

def cuda_delta_rule(
    *,
    mixed: _CudaTensor,
    gates: _CudaTensor,
    weight: _CudaTensor,
    decay: _CudaTensor,
    dt_bias: _CudaTensor,
    query_starts: _CudaTensor,
    context_lens: _CudaTensor,
    slots: _CudaTensor,
    memory: _CudaTensor,
    window: _CudaTensor,
    kept: _CudaTensor,
    kept_gates: _CudaTensor,
    stands: _CudaTensor,
    out: _CudaTensor,
    made: _CudaTensor,
    scales: _CudaTensor,
    pending: _CudaTensor,
    longest: int,
    beta_scale: float,
    stream: int,
    into: _CudaTensor | None = None,
    ends: _CudaTensor | None = None,
    end_memory: _CudaTensor | None = None,
    end_window: _CudaTensor | None = None,
) -> None:
    """See `dflash_rs.recurrent.delta_rule`."""

# --- engine -----------------------------------------------------------------------------------------------------------

# Rows, raw logits, edited logits, reasons: see `Engine.accept`.
_Edited: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], Sequence[str | None]]

@final
class Engine:
    """Continuous batching with speculative blocks over one KV pool.

    ::

        engine.add(prompt, ...)
        while engine.has_work:
            plan = engine.plan()
            plan.set_drafts(drafts)  # if len(plan.draft_rows)
            accepted = engine.accept(plan, logits)  # or accept_sampled
            events = engine.commit(plan, accepted)

    Steps are resolved in the order they were launched. Dropping a plan that was not committed calls its step off: its
    requests go on from their last resolved token. All sizes are in tokens (KV slots) unless said otherwise.
    ``state_checkpoints`` is for a target that keeps state which pages do not hold: how many copies of it the prefix cache may keep; a hit
    ends where one is, so with 0 nothing is reused. A row's state is in the slot of its number in ``StepPlan.row_ids``.
    ``vocabulary`` (the bytes of each token, in order of ids) is needed for stop strings only, ``special_vocabulary`` (the same with the names of
    tokens that are no text) for requests with ``skip_special_tokens`` False. ``depth`` is how many steps
    may be unresolved while the next one is planned: 0, or 1 for an overlapped pipeline.

    Raises ``InvalidArgument`` naming the size that is out of range (``max_batch_tokens`` must be at least
    ``max_running``).
    """

    def __new__(
        cls,
        *,
        num_pages: int,
        vocab_size: int,
        page_size: int = 16,
        max_running: int = 32,
        max_context: int = 2048,
        block_size: int = 8,
        max_batch_tokens: int = 2048,
        eos_ids: Sequence[int] = ...,
        prefix_cache: bool = True,
        state_checkpoints: int | None = None,
        depth: int = 0,
        vocabulary: Sequence[bytes] | None = None,
        special_vocabulary: Sequence[bytes] | None = None,
    ) -> Engine: ...
    def add(self, prompt: Sequence[int] | NDArray[np.integer], params: dict[str, Any] | None = None) -> int:
        """Queues a request and returns its number, unique for the life of the engine.

        ``params``: what it asks for, by name: the options of ``SamplingParams`` with their defaults, but ``seed`` (0, an unsigned 64-bit
        number), ``stop`` (strings or bytes), ``draft`` (True; False never verifies drafts for it, its text is the same either way), and ``edited``
        (False; True for one whose rows are edited before they are drawn, see ``accept``).
        ``SamplingParams.for_core`` makes one.

        Raises ``InvalidArgument`` naming the option, and for a name that is none; ``OutOfPages`` when prompt and ``max_tokens`` could not
        fit the pool even if it were empty.
        """

    def record(self, request_id: int) -> Record | None:
        """What an unfinished request is given, to be looked at while it runs and afterwards. ``None`` when there is none of that number."""

    def drafting(self, most: int) -> tuple[NDArray[np.float32], int, int]:
        """Of the ``most`` oldest requests: the temperatures of those that draft, ``[n]``, how many do not, and how many tokens they have together."""

    def let_drafter_rest(self, rests: bool) -> None:
        """While the drafter rests, steps owe it no K/V (``StepPlan.drafts`` is false): its context begins anew where it is woken."""

    def is_wanted(self, plan: StepPlan) -> bool:
        """Whether any request that a launched step is for is still there."""

    def abort(self, request_id: int) -> bool:
        """Ends a request wherever it is; there is no event for it. ``False``: it had ended already."""

    def plan(self, max_block: int | None = None) -> StepPlan | None:
        """Launches the next step with blocks of at most ``max_block`` tokens (default ``block_size``).

        ``None`` when nothing can run: no request is left, or (``depth`` 1) all wait for a launched step.
        Raises ``DflashError`` when as many steps are unresolved as ``depth`` allows.
        """

    def plan_ahead(self, max_block: int | None = None) -> StepPlan | None:
        """Launches the next step while the last one is unresolved (``depth`` 1): decoding rows, of whose first tokens and places only the
        device knows the truth (-1 in ``token_ids``, ``start_known``, a lower bound in ``context_lens``).

        ``None`` when the results have to come first: nothing is in flight, prompts have work to do, or draws depend on earlier tokens.
        """

    def settle(self, plan: StepPlan) -> None:
        """Tells a step that was launched ahead what is known now that the one before it is resolved: first tokens, context lengths,
        positions and slots, in place. Rows of requests that have ended start where those ended, with token 0.

        Raises ``DflashError`` when an earlier step is unresolved or this one is closed.
        """

    def accept(self, plan: StepPlan, logits: NDArray[np.float32], edited: _Edited | None = None) -> Accepted:
        """Draws the target's tokens and walks the drafts; the GIL is released.

        ``logits``: f32 ``[N, vocab_size]``, C-contiguous, raw, in the order of ``plan.logit_rows``. A row that cannot be
        drawn from (NaN, +inf, all -inf) ends its own request with an error and nobody else's: see ``Accepted.failed``.

        ``edited``: rows of requests whose ``params`` say ``edited``: which of the ``N``, rising, i64 ``[E]``; their logits, by which tokens are
        scored, and what was made of them, from which they are drawn, f32 ``[E, vocab_size]``; and for each why it has no token, or None. The
        walk ends before a row without one; the request ends with that error once it stands there.
        """

    def draw_edited(self, plan: StepPlan, edited: _Edited) -> NDArray[np.int64]:
        """Draws edited rows, as ``accept`` takes them, for a device that walks its drafts itself: ``[E]``, -1 for a row without a token.

        The drafts of the plan have to be set.
        """

    def accept_sampled(
        self,
        plan: StepPlan,
        sampled: NDArray[np.int64],
        logprobs: NDArray[np.float32] | None = None,
        *,
        status: NDArray[np.int32] | None = None,
        top_tokens: NDArray[np.int64] | None = None,
        top_logprobs: NDArray[np.float32] | None = None,
        edited: _Edited | None = None,
    ) -> Accepted:
        """Walks the drafts with tokens drawn elsewhere, ``[N]`` in the order of ``plan.logit_rows``; ``logprobs`` are their scores.

        ``status`` ``[N]``: 0, or why a row has no token (see ``cuda.Sampled``); such a row ends its own request. ``top_tokens`` and
        ``top_logprobs`` ``[N, k]``: the likeliest tokens; a request is told as many of them as it asked for. ``edited`` as in ``accept``: rows
        that are drawn here instead.
        """

    def device_sampling(self, plan: StepPlan) -> DeviceSampling:
        """What the rows of a launched step ask of their draws, for a device that draws them."""

    def fill_inputs(
        self,
        plan: StepPlan,
        wanted: DeviceSampling,
        bucket: int,
        uncertain: int,
        *,
        query_starts: NDArray[np.int32],
        start_known: NDArray[np.int32],
        anchor_known: NDArray[np.int32],
        table_rows: NDArray[np.int64],
        context_lens: NDArray[np.int32],
        valid_from: NDArray[np.int32],
        draft_rows: NDArray[np.int32],
        draft_rows64: NDArray[np.int64],
        anchors: NDArray[np.int64],
        sampling: NDArray[np.uint8],
        draft_sampling: NDArray[np.uint8],
        pages: NDArray[np.int32],
    ) -> tuple[bool, int]:
        """Writes a launched step, padded to ``bucket`` rows, into arrays that go to a device with room for ``r`` rows: ``[r + 1]`` each, but
        ``draft_rows`` and ``draft_rows64`` ``[r]``, ``sampling`` and ``draft_sampling`` ``[r, DeviceSampling.ROW_BYTES]`` and ``pages``
        ``[r + 1, width of page_table]``. ``draft_sampling`` says how the drafts of each of ``draft_rows`` are drawn, with the random numbers of the
        row's own draws; it is written where any row samples.

        Gives whether only the device knows where some row starts or with which token, and the most keys of a row, of which one whose start
        is unknown may have ``uncertain`` more than the host counts on.
        """

    def accept_outputs(
        self,
        plan: StepPlan,
        sampled: NDArray[np.int64],
        status: NDArray[np.int32],
        accepted: NDArray[np.int32],
        *,
        drafts: NDArray[np.int64] | None = None,
        logprobs: NDArray[np.float32] | None = None,
        top_tokens: NDArray[np.int64] | None = None,
        top_logprobs: NDArray[np.float32] | None = None,
        edited: _Edited | None = None,
    ) -> Accepted:
        """Walks the drafts of a step that a device has walked: as ``accept_sampled``, ``drafts`` ``[>= R, columns]`` by row of the step, None
        where there are none or where they are set; ``accepted`` ``[R]``: what the device kept.

        Raises ``DflashError`` when the core keeps something else.
        """

    def look_up(
        self, plan: StepPlan, block_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
        """Drafts from the requests' own texts: what followed the longest ending that occurred before.

        For blocks of ``block_size`` tokens: tokens and chances ``[len(draft_rows), block_size - 1]``, 0 behind what was found, and how many
        were found ``[len(draft_rows)]``. A chance is that of a draft when all before it are right, learnt from earlier ones.
        Raises ``DflashError`` when an earlier step is unresolved: there is no text to look anything up in then.
        """

    def commit(self, plan: StepPlan, accepted: Accepted, injected: bool = True) -> Events:
        """Resolves a step: books KV, appends tokens up to each request's stop, releases what is finished.

        ``injected``: draft K/V were computed for ``accepted.commit_rows``; otherwise drafts see nothing before them.
        """

    def cancel(self, plan: StepPlan) -> bool:
        """Calls a step off: its requests go on from their last resolved token. ``False``: it was closed already."""

    def cancel_all(self) -> None:
        """Calls every unresolved step off, as after Ctrl-C."""

    def evict(self, count: int | None = None) -> int:
        """Frees up to ``count`` cached pages that no request holds (default: all); returns how many."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def block_size(self) -> int:
        """Tokens of a block, the anchor counted."""

    @property
    def page_size(self) -> int:
        """KV slots per page."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool; the KV cache has ``num_pages * page_size`` slots."""

    @property
    def page_table(self) -> NDArray[np.int32]:
        """The persistent page table, i32 ``[rows, max_pages_per_request]``, read-only, indexed by ``StepPlan.row_ids``.

        One view stays current for the life of the engine: entry ``p`` of a row is the page of positions
        ``p * page_size ..``; entries behind a row's pages are undefined.
        """

    def counts(self) -> dict[str, int]:
        """``waiting``, ``running``, ``in_flight``, ``free_pages``, ``cached_pages``, ``reclaimable_pages`` (cached, held by no
        request), ``total_pages``, ``retractions``; with ``state_checkpoints`` how many of them are in use."""

    def stats(self) -> dict[str, object]:
        """Acceptance over all requests: ``passes``, ``committed``, ``drafted`` (positions), ``verified`` (drafts, more of them in
        trees), ``accepted`` (int), ``tau`` (float, or ``None`` before the first pass), ``histogram`` (passes by drafts accepted), ``per_position`` (share accepted)."""

@final
class StepPlan:
    """A launched step: ``R`` rows packed to ``T`` tokens, ``N`` of which need logits. Decoding rows come first.

    The arrays are views of the plan's own memory.
    """

    @property
    def step_id(self) -> int:
        """Number of the step."""

    @property
    def is_open(self) -> bool:
        """Whether the step has been neither committed nor called off."""

    @property
    def drafts(self) -> bool:
        """Whether any of its requests drafts at all: then what it keeps needs draft KV."""

    @property
    def outline(self) -> tuple[int, int, int, int, int, int, bool]:
        """Sizes at a glance: rows, tokens, tokens whose logits are needed, rows with drafts, tokens of the longest row and of the longest one
        with drafts, whether any row is a chunk of prompt."""

    @property
    def temperatures(self) -> NDArray[np.float32]:
        """``[R]``: sampling temperatures."""
    @property
    def seeds(self) -> NDArray[np.uint64]:
        """``[R]``: seeds of the requests' draws."""

    def set_drafts(self, drafts: NDArray[np.int64]) -> None:
        """Fills in the drafts, i64 ``[len(draft_rows), columns]``; row ``k`` uses its first ``block_len - 1`` columns.

        Raises ``InvalidArgument`` for a wrong shape or a draft outside the vocabulary; no draft is set then.
        """

    def narrow(self, widths: NDArray[np.int32]) -> None:
        """Verifies only the first ``widths[i]`` tokens of row ``draft_rows[i]``, the anchor counted. Read the arrays again afterwards.

        Raises ``InvalidArgument`` for a wrong length or a number outside 1 to the row's tokens; nothing changes then.
        """

    def set_trees(self, tokens: NDArray[np.int64], parents: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        """Drafts trees (DDTree, arXiv 2604.12989): ``tokens`` and ``parents`` ``[len(draft_rows), w]``, of which row ``i`` uses the first
        ``counts[i]``: its anchor, then nodes behind their parents, as many as the row has tokens at most.

        A token's position is that of its depth, its KV goes to the slot of its index: ``Accepted.move_from`` says what has to move
        before the commit. Attention sees ``ancestors``. Read the arrays again afterwards.

        Raises ``InvalidArgument`` for trees that do not fit their rows, ``OutOfTurn`` when drafts are trees already or ``start_known`` is
        false; nothing changes then.
        """

    @property
    def parents(self) -> NDArray[np.int32]:
        """``[T]``: the token that each one follows, as an index within its row, -1 for the first; empty while drafts are chains."""

    @property
    def ancestors(self) -> NDArray[np.uint64]:
        """``[T * words]``: bit ``j`` of a token is set when token ``j`` of its row is itself or before it on its path; empty while
        drafts are chains."""

    @property
    def request_ids(self) -> NDArray[np.uint64]:
        """``[R]``: which request."""

    @property
    def row_ids(self) -> NDArray[np.int32]:
        """``[R]``: row of the page table."""

    @property
    def query_starts(self) -> NDArray[np.int32]:
        """``[R + 1]``: where each row's tokens start among the ``T``."""

    @property
    def context_lens(self) -> NDArray[np.int32]:
        """``[R]``: valid KV tokens before this step, the position of the row's first token."""

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """``[T]``: tokens; -1 for drafts not set yet, and for an anchor only the device knows (``depth`` 1)."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """``[T]``: positions; -1 where only the device knows."""

    @property
    def slots(self) -> NDArray[np.int64]:
        """``[T]``: KV slots the tokens are written to; -1 where only the device knows."""

    @property
    def logit_rows(self) -> NDArray[np.int32]:
        """``[N]``: packed indices whose logits are needed."""

    @property
    def logit_starts(self) -> NDArray[np.int32]:
        """``[R + 1]``: where each row's part of ``logit_rows`` starts."""

    @property
    def draft_rows(self) -> NDArray[np.int32]:
        """``[n]``: rows with drafts, ``block_len > 1``."""

    @property
    def block_len(self) -> NDArray[np.int32]:
        """``[R]``: tokens of the row: 1 for a plain step, the anchor and its drafts, or a chunk of prompt."""

    @property
    def is_prefill(self) -> NDArray[np.bool_]:
        """``[R]``: whether the row is a chunk of prompt."""

    @property
    def draft_valid_from(self) -> NDArray[np.int32]:
        """``[R]``: first position from which on the row's draft K/V are valid; a drafter masks what is before."""

    @property
    def start_known(self) -> NDArray[np.bool_]:
        """``[R]``: whether the host knows where the row starts; always true at ``depth`` 0."""

    @property
    def state_restore(self) -> NDArray[np.int32]:
        """``[R]``: the checkpoint to be copied into the row's state before the pass, -1 for none; empty for a target without state. A row at
        position 0 starts from nothing."""

    @property
    def state_save(self) -> NDArray[np.int32]:
        """``[R]``: the checkpoint that gets the state after the row's last token, before the commit, -1 for none; empty for a target without
        state."""

@final
class DeviceSampling:
    """What ``R`` rows ask of their draws, packed as the kernels read it. Views of buffers that live as long as this does."""

    ROW_BYTES: Final[int]
    @property
    def rows(self) -> NDArray[np.uint8]:
        """``[R * ROW_BYTES]``: ``SamplingRow`` of cuda/params.h. A row whose request has left changes nothing."""

    @property
    def history_tokens(self) -> NDArray[np.int32]:
        """Distinct tokens of prompt and output of the rows that are penalised, ascending within a row."""

    @property
    def history_counts(self) -> NDArray[np.int32]:
        """Their occurrences in the output; 0: in the prompt alone."""

    @property
    def bias_tokens(self) -> NDArray[np.int32]:
        """Row by row the tokens with a bias, ascending, then those that are masked, ascending."""

    @property
    def bias_values(self) -> NDArray[np.float32]:
        """Their biases; -inf beside a mask."""

    @property
    def filters(self) -> bool:
        """Whether any row leaves part of its vocabulary out (top_k, top_p, min_p)."""

    @property
    def samples(self) -> bool:
        """Whether any row draws at random, at a temperature above 0."""

    @property
    def scores(self) -> bool:
        """Whether any row's tokens are scored."""

    @property
    def alternatives(self) -> int:
        """How many of the likeliest tokens are named beside each token, of the row that wants most."""

    @property
    def unresolved(self) -> bool:
        """Whether a row's history lacks what an unresolved step before this one may add: commit that one, and ask again."""

@final
class Accepted:
    """What a step keeps, row by row."""

    @property
    def step_id(self) -> int:
        """Number of the step."""

    @property
    def accepted(self) -> NDArray[np.int32]:
        """``[R]``: drafts accepted."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens gained, the bonus token included; a stop is applied at commit."""

    @property
    def token_starts(self) -> NDArray[np.int32]:
        """``[R + 1]``: where each row's tokens start."""

    @property
    def commit_rows(self) -> NDArray[np.int64]:
        """``[M]``: packed indices whose KV and features are valid now."""

    @property
    def commit_starts(self) -> NDArray[np.int32]:
        """``[R + 1]``: where each row's part of ``commit_rows`` starts."""

    @property
    def commit_slots(self) -> NDArray[np.int64]:
        """``[M]``: the slot each of them keeps, that of its position; -1 where only the device knows."""

    @property
    def move_from(self) -> NDArray[np.int64]:
        """Slots whose KV has to move before the commit: accepted drafts of trees. All are read before any of ``move_to`` is written."""

    @property
    def move_to(self) -> NDArray[np.int64]:
        """Where it has to go, one slot for each."""

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """``[len(tokens)]``: log-softmax of the raw logits at each token, NaN where not asked for."""

    @property
    def top_starts(self) -> NDArray[np.int32]:
        """``[len(tokens) + 1]``: where each token's alternatives start."""

    @property
    def top_tokens(self) -> NDArray[np.int64]:
        """The likeliest tokens beside each token, falling."""

    @property
    def top_logprobs(self) -> NDArray[np.float32]:
        """Their log-probabilities."""

    @property
    def failed(self) -> list[tuple[int, str]]:
        """``(row, message)`` of each row whose tokens could not be drawn."""

@final
class Record:
    """What a request was given: by pieces, one for each step that gave it tokens or ended it, or as a whole.

    Text never shows half a character, nor what may still become a stop string.
    """

    def read(self) -> list[tuple[str | None, list[int], int, int]]:
        """The pieces that were not read: text (None for an engine without a vocabulary), tokens, how many of them were drafts, and why the
        request ended with it: 0 it goes on, 1 stop token, 2 stop string, 3 length, 4 error, 5 abort."""

    def text(self) -> str | None:
        """The text of all pieces, which count as read then; None for an engine without a vocabulary."""

    def tokens(self) -> list[int]:
        """Output tokens."""

    def scores(self) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """Each token with its log-probability and the likeliest tokens with theirs; empty unless the request asked for them."""

    @property
    def finish(self) -> int:
        """Why it ended, as in ``read``; 0 while it has not."""

    @property
    def stopped_by(self) -> int | None:
        """Which of its stop strings it ended with, None for none."""

    @property
    def error(self) -> str | None:
        """The message of the failure it ended with."""

    def metrics(self) -> dict[str, Any]:
        """``cached_prompt_tokens``, ``output_tokens``, ``steps`` (target passes after the first token), ``drafted_steps``, ``tau`` (0 before the
        first of them), ``accepted_per_position``, ``accept_histogram``, ``ttft_s`` and ``total_s`` since its arrival."""

def read_records(records: Sequence[Record]) -> list[tuple[int, str | None, list[int], int, int]]:
    """The pieces of many requests that were not read, in the order of ``records``, each with its record's place before what
    ``Record.read`` gives."""

@final
class Events:
    """What a step meant for its requests: one entry per request that gained tokens or ended."""

    @property
    def step_id(self) -> int:
        """Number of the step."""

    @property
    def request_ids(self) -> NDArray[np.uint64]:
        """``[E]``: which request."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """New output tokens, nothing after a stop; a stop token itself is included."""

    @property
    def token_starts(self) -> NDArray[np.int32]:
        """``[E + 1]``: where each request's tokens start."""

    @property
    def finish(self) -> NDArray[np.uint8]:
        """``[E]``: 0 goes on, 1 stop token (the last one), 2 stop string, 3 length, 4 error."""

    @property
    def drafted(self) -> NDArray[np.int32]:
        """``[E]``: positions drafted: the length of a chain, the depth of a tree."""

    @property
    def verified(self) -> NDArray[np.int32]:
        """``[E]``: drafts verified."""

    @property
    def accepted(self) -> NDArray[np.int32]:
        """``[E]``: drafts accepted."""

    @property
    def text_ends(self) -> NDArray[np.int64]:
        """``[E]``: output bytes certain to be text, counted from the first output token; -1 for requests without stop strings.

        While a request runs, an ending that may become a stop string is held back. A stop string or stop token that ended it
        is not counted.
        """

    @property
    def cached_tokens(self) -> NDArray[np.int32]:
        """``[E]``: tokens found in the prefix cache when the request last entered."""

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """``[len(tokens)]``: log-softmax of the raw logits at each token, NaN where not asked for."""

    @property
    def top_starts(self) -> NDArray[np.int32]:
        """``[len(tokens) + 1]``: where each token's alternatives start."""

    @property
    def top_tokens(self) -> NDArray[np.int64]:
        """The likeliest tokens beside each token, falling."""

    @property
    def top_logprobs(self) -> NDArray[np.float32]:
        """Their log-probabilities."""

    @property
    def ended(self) -> list[int]:
        """Requests that ended."""

    @property
    def errors(self) -> list[tuple[int, str]]:
        """``(request_id, message)`` of each request that ended with an error."""

def multiplies_bf16() -> bool:
    """Whether the host kernels multiply pairs of bfloat16 in one instruction: what makes ``precision="medium"`` fast."""

def cpu_isa() -> str:
    """The instruction set of the host kernels: what ``DFLASH_CPU_ISA`` names, else the last of ``cpu_isas()``.

    The variable is read when it is first needed. Raises InvalidArgument when it names no set, or one that the processor lacks.
    """

def cpu_isas() -> list[str]:
    """Instruction sets this processor can run the host kernels with, narrowest first: of portable, avx2, avx512, avx512_bf16."""

def linear(
    x: tuple[int, int, int],
    rows: int,
    weight: tuple[int, int, int],
    outputs: int,
    inputs: int,
    out: tuple[int, int, int],
    dtype: str,
    bias: tuple[int, int, int] | None = None,
    threads: int = 1,
) -> None:
    """``out = x W^T + bias`` on the host, with a weight as it is stored. ``x`` ``[rows, inputs]``, ``weight`` ``[outputs, inputs]``, ``bias``
    ``[outputs]`` and ``out`` ``[rows, outputs]`` are of ``dtype``, "float32" or "bfloat16"; sums are f32 and rounded once.

    Arrays are given as (address, row stride, head stride) in elements, as for ``paged_attention``; the caller keeps them alive, and ``out``
    overlaps nothing else. A row's result depends on that row alone, bit for bit.
    """

def swiglu(gate_up: tuple[int, int, int], rows: int, width: int, out: tuple[int, int, int], threads: int = 1) -> None:
    """``out = silu(gate) * up`` on the host. ``gate_up`` f32 ``[rows, 2 * width]`` is gate, then up; ``out`` f32 ``[rows, width]``.

    Arrays are given as (address, row stride, head stride) in elements, as for ``paged_attention``; the caller keeps them alive.
    """

@final
class DeltaRule:
    """A layer with the gated delta rule behind a causal convolution, on the host.

    ``weight`` f32 ``[taps, C]``, ``decay`` and ``dt_bias`` f32 ``[Hv]``; ``C = 2 * key_heads * key_dim + Hv * value_dim``. A token's decay is
    ``exp(decay * softplus(a + dt_bias))``, its beta ``beta_scale * sigmoid(b)``.
    """

    def __new__(
        cls,
        weight: NDArray[np.float32],
        decay: NDArray[np.float32],
        dt_bias: NDArray[np.float32],
        key_heads: int,
        key_dim: int,
        value_dim: int,
        beta_scale: float = 1.0,
    ) -> DeltaRule: ...
    def run(
        self,
        pending: NDArray[np.int32],
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        fresh: NDArray[np.int32],
        slots: int,
        block: int,
        memory: tuple[int, int, int],
        window: tuple[int, int, int],
        kept: tuple[int, int, int],
        kept_gates: tuple[int, int, int],
        mixed: tuple[int, int, int],
        gates: tuple[int, int, int],
        out: tuple[int, int, int],
        end_memory: tuple[int, int, int],
        end_window: tuple[int, int, int],
        dtype: str,
        threads: int = 1,
    ) -> None:
        """One layer of a pass: folds in what was kept, runs the new tokens from there without moving the states, keeps what they fed in.

        Request r has packed tokens ``starts[r] .. starts[r + 1]`` (int32 ``[R + 1]``) and the slot ``rows[r]`` (int32 ``[R]``); where ``fresh[r]``
        is not 0 its text begins with them. ``pending`` int32 ``[rows]``, 0 afterwards for these rows: tokens of ``kept`` to fold in. Arrays of
        ``dtype``, except states, which are f32, given as (address, row stride, head stride) in elements; the caller keeps them alive:
        ``memory`` ``[slots, Hv, key_dim * value_dim]``, ``window`` ``[slots, taps - 1, C]``, ``kept`` ``[rows, block, C]``, ``kept_gates``
        ``[rows, block, 2 * Hv]`` (b, then a), ``mixed`` ``[T, 1, C]``, ``gates`` ``[T, 1, 2 * Hv]``, ``out`` ``[T, Hv, value_dim]``, and for the
        L requests of more than ``block`` tokens ``end_memory`` ``[L, Hv, key_dim * value_dim]`` and ``end_window`` ``[L, taps - 1, C]``.
        """

@final
class PackedWeight:
    """A weight f32 ``[N, K]`` (C-contiguous), and a bias f32 ``[N]``, packed for products with few rows on the host.

    A weight whose values are all bfloat16 values is stored in two bytes each; the arithmetic is f32 in any case.
    ``precision`` "highest" multiplies inputs and weights as they are, "medium" rounds both to bfloat16 first and takes them two by
    two; sums are f32.
    """

    def __new__(
        cls, weight: NDArray[np.float32], bias: NDArray[np.float32] | None = None, precision: str = "highest"
    ) -> PackedWeight: ...
    @property
    def bytes(self) -> int:
        """Bytes it takes."""

    def product(
        self,
        x: tuple[int, int, int],
        rows: int,
        out: tuple[int, int, int],
        residual: tuple[int, int, int] | None = None,
        threads: int = 1,
    ) -> None:
        """``out = x W^T + bias + residual``, f32. ``x`` ``[rows, K]``, ``out`` and ``residual`` ``[rows, N]``.

        Arrays are given as (address, row stride, head stride) in elements, as for ``paged_attention``; the caller keeps them
        alive, and ``out`` overlaps nothing else. A row's result depends on that row alone, bit for bit.
        """

@final
class Experts:
    """The experts of one layer, packed for few rows on the host.

    ``gate_up`` ``[count, 2 * inner, hidden]`` (gate, then up; up alone, ``[count, inner, hidden]``, unless ``gated``) and ``down`` ``[count, hidden, inner]`` are contiguous and of ``dtype``, "float32"
    or "bfloat16", and given as (address, first stride, second stride) in elements; they are read by ``threads`` threads and not needed
    afterwards. ``precision`` is that of ``PackedWeight``. Biases, both or neither, are f32 ``[count, rows of gate_up]`` and ``[count, hidden]``.

    Between the products stands ``activation(gate) * up``, or ``activation(up)`` without a gate; ``activation`` is "silu", "gelu", "gelu_tanh" or
    "relu2". With ``clamped`` (alpha, limit) it is ``gate * sigmoid(alpha * gate) * (up + 1)`` of a gate cut at limit and an up cut at +-limit.

    With ``router`` f32 ``[count, hidden]`` rows may choose for themselves: the ``top_k`` largest of the softmax of ``router x``, divided by their
    sum if ``normalised``. With ``shared_gate_up`` f32 ``[2 * shared, hidden]``, ``shared_down`` ``[hidden, shared]`` and ``shared_gate`` ``[hidden]``
    every such row meets one expert more, weighed by the sigmoid of ``shared_gate x``.
    """

    def __new__(
        cls,
        gate_up: tuple[int, int, int],
        down: tuple[int, int, int],
        count: int,
        hidden: int,
        inner: int,
        dtype: str,
        precision: str = "highest",
        threads: int = 1,
        *,
        activation: str = "silu",
        gated: bool = True,
        clamped: tuple[float, float] | None = None,
        gate_up_bias: NDArray[np.float32] | None = None,
        down_bias: NDArray[np.float32] | None = None,
        router: NDArray[np.float32] | None = None,
        top_k: int = 0,
        normalised: bool = True,
        shared_gate_up: NDArray[np.float32] | None = None,
        shared_down: NDArray[np.float32] | None = None,
        shared_gate: NDArray[np.float32] | None = None,
    ) -> Experts: ...
    @property
    def bytes(self) -> int:
        """Bytes they take: two per weight of an expert whose weights are all bfloat16 values, or in medium precision, else four."""

    def run(
        self,
        x: tuple[int, int, int],
        rows: int,
        out: tuple[int, int, int],
        indices: NDArray[np.int64] | None = None,
        weights: NDArray[np.float32] | None = None,
        threads: int = 1,
    ) -> None:
        """``out``: the rows ``x``, both f32 ``[rows, hidden]``, through their experts.

        Row r goes to the experts ``indices[r]``, which count as much as ``weights[r]``, both ``[rows, top_k]``; ``count`` stands for none. Without
        them the router chooses. Those of experts with a shared one have to be left to the router. Arrays as for ``PackedWeight.product``. A
        row's result depends on that row and its experts alone, bit for bit.
        """

@final
class HostDecoder:
    """Decoder layers (RMSNorm, rotary attention, SwiGLU) and a head whose passes run in one call on the host, in f32.

    Arrays are given as (address, row stride, head stride) in elements, as for ``paged_attention``; the caller keeps them alive.
    ``embedding`` and ``rotary`` come with their number of rows: ``[V, hidden]``, and cos and signed sin ``[P, 2, head_dim]``.
    ``caches``: (K, V) ``[num_slots, kv_heads, head_dim]`` of every layer. A row's result depends on its own token, position and
    visible keys alone, bit for bit.
    """

    def __new__(cls, norm: NDArray[np.float32], head: PackedWeight, eps: float) -> HostDecoder: ...
    def add_layer(
        self,
        *,
        attention_norm: NDArray[np.float32],
        qkv: PackedWeight,
        out: PackedWeight,
        mlp_norm: NDArray[np.float32],
        gate_up: PackedWeight,
        down: PackedWeight,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        mask: str,
        window: int | None = None,
        query_norm: NDArray[np.float32] | None = None,
        key_norm: NDArray[np.float32] | None = None,
        attention_conv: HostConv | None = None,
        mlp_conv: HostConv | None = None,
    ) -> None:
        """Appends a layer. ``qkv`` stacks queries, keys, values; ``gate_up`` gate and up. ``mask``: ``causal`` or ``block``."""

    def forward(
        self,
        batch: AttentionBatch,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        embedding: tuple[tuple[int, int, int], int],
        rotary: tuple[tuple[int, int, int], int],
        caches: Sequence[tuple[tuple[int, int, int], tuple[int, int, int]]],
        logit_rows: NDArray[np.int64],
        logits: tuple[int, int, int],
        taps: Sequence[int],
        features: tuple[int, int, int],
        threads: int = 1,
    ) -> None:
        """A pass: ``logits`` ``[N, 1, V]`` of the rows ``logit_rows``, and ``features`` ``[T, taps, hidden]``.

        ``taps``: layers whose outputs are wanted, from 0; the number of layers stands for what the head reads, behind the last norm. Keys and
        values go to the batch's slots.
        """

    def draft(
        self,
        batch: AttentionBatch,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        embedding: tuple[tuple[int, int, int], int],
        rotary: tuple[tuple[int, int, int], int],
        caches: Sequence[tuple[tuple[int, int, int], tuple[int, int, int]]],
        block: int,
        never: int | None = None,
        k: int = 1,
        threads: int = 1,
        selector: HostSelector | None = None,
        codebooks: tuple[tuple[tuple[int, int, int], int], tuple[tuple[int, int, int], int]] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ``k`` likeliest tokens of rows 1.. of every block of ``block`` tokens, ``[n, block - 1, k]``, and their probabilities, falling.

        ``never`` is a token that is not proposed, the mask. With a ``selector`` and its ``codebooks`` ``[V, rank]`` (of the token before, of a
        candidate), the likeliest along the path that it takes; both then come with their number of rows, like ``embedding``.
        """

@final
class HostConv:
    """The two convolutions around a sublayer of a DFlash 2, over the tokens of a block, for ``HostDecoder.add_layer``.

    ``base`` ``[2 * taps * hidden]``: of what goes in, then of what comes out, the own token first. ``deltas``: ``[2 * taps * groups, hidden]``.
    """

    def __new__(cls, base: NDArray[np.float32], deltas: PackedWeight, taps: int) -> HostConv: ...

@final
class HostSelector:
    """What chooses the drafts of a DFlash 2 among the ``top_k`` likeliest of every place, for ``HostDecoder.draft``.

    ``projection`` ``[rank, hidden]``; ``names``: tokens of the head's rows, where it is of a part of the vocabulary.
    """

    def __new__(cls, projection: PackedWeight, top_k: int, names: NDArray[np.int64] | None = None) -> HostSelector: ...

@final
class HostInjector:
    """Writes the draft context of committed tokens into the caches of all drafter layers, in one call on the host, in f32.

    Arrays are given as for ``HostDecoder``.
    """

    def __new__(
        cls,
        *,
        fc: PackedWeight,
        norm: NDArray[np.float32],
        key_values: PackedWeight,
        key_norms: Sequence[NDArray[np.float32] | None],
        kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> HostInjector: ...
    def inject(
        self,
        features: tuple[int, int, int],
        feature_rows: int,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        rotary: tuple[tuple[int, int, int], int],
        caches: Sequence[tuple[tuple[int, int, int], tuple[int, int, int]]],
        num_slots: int,
        threads: int = 1,
    ) -> None:
        """Token ``i`` is row ``rows[i]`` of ``features``, at ``positions[i]``; its K and V go to ``slots[i]``."""

@final
class Planner:
    """Decides how much to draft and how much of it to verify: most expected tokens per time.

    Costs are curves, pairs of packed tokens and time in any one unit: of a target pass, and of a drafter pass with what follows
    from it. Straight between the points, flat before the first, beyond the last as between the last two. With one of them alone
    target passes take 1, drafter passes nothing. ``context`` is what a token of context adds to a target pass. With none of them there is nothing
    to weigh: whole blocks, whole trees.

    A width is the number of a request's tokens that a step verifies, the anchor counted. How often drafts are accepted, and what the
    drafter's probabilities are worth, is learnt from what is recorded, for a few bands of temperatures.
    """

    def __new__(
        cls,
        block_size: int,
        *,
        target: list[tuple[float, float]] | None = None,
        draft: list[tuple[float, float]] | None = None,
        context: float | None = None,
        tree_nodes: int = 0,
    ) -> Planner: ...
    def decide(
        self,
        temperatures: NDArray[np.float32],
        others: int = 0,
        *,
        context: int = 0,
        widths: list[int] = [],
        room: int = 0,
    ) -> tuple[int, int, bool]:
        """How much to draft in the next step: the largest width, the tokens of the drafter's block, and whether to draft trees.

        ``temperatures`` ``[n]``: those of the requests that could draft; ``others`` tokens run beside them; ``context`` tokens of context they have together.
        (1, 1, False) is a plain step.
        ``widths``, rising, are for trees on a device that is not asked between drafting and verifying: one of them is taken, with which the
        step has at most ``room`` tokens, and whole blocks. Elsewhere what is drafted can still be cut by ``admit`` and ``admit_trees``.
        """

    def admit(
        self,
        probabilities: NDArray[np.float32],
        temperatures: NDArray[np.float32],
        most: NDArray[np.int32],
        others: int = 0,
        *,
        plan: StepPlan | None = None,
        tokens: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int32]:
        """The width of each request, ``[n]``, at most ``most`` ``[n]``: chains are cut where more would not pay.

        ``probabilities`` ``[n, depth]``: the drafter's own of what it drafted, where what is no number counts as 0; ``temperatures`` ``[n]``.
        With the ``plan`` of the step, whose ``draft_rows`` they are, ``record_step`` learns what the probabilities are worth; with the drafts'
        ``tokens`` ``[n, depth]``, too, whether the first that is not verified would have been right.
        """

    def ask(self, plan: StepPlan, chances: NDArray[np.float32], block: int) -> NDArray[np.int32]:
        """Which of ``plan.draft_rows`` the drafter is asked for, ``[m]``, for blocks of ``block`` tokens: those whose own texts promise less.

        ``chances`` ``[n, width]``: of what ``Engine.look_up`` found there.
        """

    def admit_either(
        self,
        plan: StepPlan,
        looked_up: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]],
        own: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]] | None = None,
    ) -> None:
        """Fills a step in with the drafts that pay, of each request those that promise more.

        ``looked_up``: what ``Engine.look_up`` found for this step. ``own``: the rows ``[m]`` that the drafter was asked for, and its chains, tokens
        and probabilities ``[m, depth]``. Raises ``InvalidArgument`` for rows that do not draft.
        """

    def admit_trees(
        self,
        anchors: NDArray[np.int64],
        tokens: NDArray[np.int64],
        probabilities: NDArray[np.float32],
        temperatures: NDArray[np.float32],
        most: NDArray[np.int32],
        others: int = 0,
        *,
        plan: StepPlan | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """The trees to verify, for ``StepPlan.set_trees``: drafts are admitted best first over all requests, while that pays.

        ``anchors`` ``[n]``; ``tokens`` and ``probabilities`` ``[n, depth, k]``: candidates per place, the likeliest first; the rest as for ``admit``.
        Returns tokens and parents ``[n, w]`` and the width of each request ``[n]``.
        """

    def record_step(self, plan: StepPlan, accepted: Accepted) -> None:
        """Books a step: what each request verified and which of it was accepted."""

    def observe(
        self, target_rows: int, target_time: float, draft_rows: int = 0, draft_time: float = 0.0, *, context: int = 0
    ) -> None:
        """What a step took: rows and time of its target pass, and of its drafter pass with what follows from it (0 rows: none). Its requests had
        ``context`` tokens together.

        The costs follow, more slowly up than down; those of rows that were not seen keep their place among the others.
        """

    def observe_step(self, plan: StepPlan, target_time: float, draft_rows: int = 0, draft_time: float = 0.0) -> None:
        """``observe`` of a step of the engine; one with tokens of prompts of which no logits are wanted says nothing."""

    @property
    def rests(self) -> bool:
        """Whether the drafter will not be asked for a while: the last two looks at what it drafts did not pay, and the next is more than 32 steps off."""

    @property
    def costs(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]], float] | None:
        """Costs in use: the curves of target and drafter, and what a token of context adds. None where there are none."""

    def record(
        self,
        drafted: int,
        accepted: int,
        temperature: float = 1.0,
        probabilities: NDArray[np.float32] | None = None,
    ) -> None:
        """Books one request's chain: ``drafted`` drafts verified, ``accepted`` of them kept, and the drafter's ``probabilities`` of them,
        ``[>= drafted]``, if they are to be learnt from."""

    def acceptance(self, temperature: float = 1.0) -> list[float]:
        """Chance that the draft at each position is accepted when all before it were, for requests at this temperature."""

    def exponent(self, temperature: float = 1.0) -> float:
        """What makes a chance of acceptance of the drafter's probability, ``probability ** exponent``, for requests at this temperature."""

@final
class WidthPlanner:
    """Chooses one block length for a whole batch: most expected tokens per second, judged by what steps were seen to take.

    For an engine whose steps cannot be timed in parts. Times are kept per width, size of the batch and length of its contexts, acceptance
    per band of temperatures; a width never tried is tried where it might be the best, and old times are renewed, at most at the cost of about
    one step in 256 for each width.

    With ``tree_depth`` the largest width is a tree: so many nodes, of which a path of at most that many drafts is accepted.

    Raises ``InvalidArgument`` for widths that do not rise from 1 to at most 4096, or a tree deeper than it has nodes.
    """

    def __new__(cls, widths: list[int], *, tree_depth: int | None = None) -> WidthPlanner: ...
    def choose(self, requests: int, context: int = 0, temperatures: Sequence[float] = ...) -> int:
        """The width of the next step, of ``requests`` requests with ``context`` tokens together; 1 is a plain step.

        ``temperatures``: of each request, 0 is greedy; none are greedy ones.
        """

    def observe(self, requests: int, width: int, seconds: float, context: int = 0) -> None:
        """A step of ``requests`` requests with ``context`` tokens together and this width took ``seconds``.

        Widths not to choose from are ignored.
        """

    def record(self, width: int, accepted: list[int], temperatures: Sequence[float] = ...) -> None:
        """Books a step: drafts accepted by each request when ``width`` tokens of each were verified; ``temperatures`` as for ``choose``.

        Raises ``InvalidArgument`` when more were accepted than verified.
        """

    def times(self, requests: int, context: int = 0) -> list[float | None]:
        """What a step of ``requests`` requests with ``context`` tokens together takes, in seconds, with each of the widths.

        None where it is not known.
        """

    @property
    def widths(self) -> list[int]:
        """The widths to choose from."""

    def acceptance(self, temperature: float = 0.0) -> list[float]:
        """Chance that the draft at each position of a request at this temperature is accepted when all before it were."""

@final
class Lookup:
    """A text that grows, and drafts looked up in it: see ``LLM(draft="lookup")``, which keeps one for each request."""

    def __new__(cls) -> Lookup: ...
    def extend(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Appends tokens."""

    def propose(self, count: int) -> NDArray[np.int64]:
        """Up to ``count`` tokens that followed the latest earlier occurrence of the longest ending of the text; none without one."""

    @property
    def matched(self) -> int:
        """Tokens of the longest ending of the text that occurred before."""

    def __len__(self) -> int: ...

@final
class PagePool:
    """Reference-counted KV pages with a free list; every operation is O(1) per page.

    Raises ``InvalidArgument`` for ``num_pages`` of 0.
    """

    def __new__(cls, num_pages: int) -> PagePool: ...
    def alloc(self, count: int = 1) -> NDArray[np.int32]:
        """Takes ``count`` free pages, one owner each. Raises ``OutOfPages`` and takes none when there are fewer."""

    def retain(self, pages: Sequence[int] | NDArray[np.integer]) -> None:
        """Adds an owner to each page. All or nothing; a free or unknown page is an ``InvalidArgument``."""

    def release(self, pages: Sequence[int] | NDArray[np.integer]) -> None:
        """Removes an owner from each page; a page without owners is free. All or nothing; a second free is an
        ``InvalidArgument``."""

    def owners(self, page: int) -> int:
        """Owners of a page, 0 when it is free."""

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""

    @property
    def num_pages(self) -> int:
        """Pages in all."""

# --- serving ----------------------------------------------------------------------------------------------------------

def plan_decode(
    requests: list[object],
    ahead: int,
    page_size: int,
    committed: NDArray[np.int64],
    allocated: NDArray[np.int32],
    next: NDArray[np.int32],
) -> tuple[int, int, int]:
    """See ``dflash_rs.serving.plan_decode``."""

# --- verification -----------------------------------------------------------------------------------------------------

@final
class DraftTree:
    """A prefix-closed tree of drafts below an anchor (node 0), parents before children.

    ``n`` = ``len(tree)`` nodes, the anchor counted. Position of a node = position of the anchor + depth. Absent nodes are -1.
    """

    @staticmethod
    def build(anchor: int, tokens: NDArray[np.int64], log_probs: NDArray[np.float32], nodes: int) -> DraftTree:
        """The ``nodes`` likeliest prefixes (arXiv 2604.12989), the anchor not counted.

        ``tokens`` i64 and ``log_probs`` f32 (nats) are the drafter's top-K per depth, ``[L, K]``, each row falling. Ties: the
        shallower, then the earlier parent, then the better rank. Raises ``InvalidArgument`` for a log-probability above 0, NaN
        or out of order.
        """

    @staticmethod
    def from_log_probs(anchor: int, log_probs: NDArray[np.float32], nodes: int) -> DraftTree:
        """``build`` from whole rows, f32 ``[L, V]``; among equals the lowest id is the likelier."""

    @staticmethod
    def chain(anchor: int, drafts: NDArray[np.int64], log_probs: NDArray[np.float32]) -> DraftTree:
        """One child per node: ``drafts`` i64 ``[g]``, ``log_probs`` f32 ``[g]``."""

    @staticmethod
    def from_parents(tokens: NDArray[np.int64], parents: NDArray[np.int32]) -> DraftTree:
        """A tree built elsewhere: ``tokens`` i64 ``[n]``, ``parents`` i32 ``[n]`` with ``parents[i] < i``; scores are 0."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """``[n]``: tokens, the anchor first."""

    @property
    def parents(self) -> NDArray[np.int32]:
        """``[n]``: parent of each node."""

    @property
    def depths(self) -> NDArray[np.int32]:
        """``[n]``: depth, 0 for the anchor."""

    @property
    def scores(self) -> NDArray[np.float32]:
        """``[n]``: log-probability of the path, nats."""

    @property
    def first_child(self) -> NDArray[np.int32]:
        """``[n]``: likeliest child."""

    @property
    def next_sibling(self) -> NDArray[np.int32]:
        """``[n]``: next sibling by falling probability."""

    @property
    def masks(self) -> NDArray[np.uint64]:
        """``[n, ceil(n / 64)]``: bit ``j % 64`` of word ``j // 64`` is set iff ``j`` is the node itself or an ancestor."""

    def attention_mask(self) -> NDArray[np.bool_]:
        """``[n, n]``: ``masks`` unpacked; the prefix is visible to all nodes and not part of it."""

    def path_tokens(self, node: int) -> NDArray[np.int64]:
        """Drafts from depth 1 down to ``node``."""

    def walk(self, sampled: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
        """Accepted nodes from depth 1 down and the bonus token, for tokens drawn at every node, i64 ``[n]``."""

    def __len__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

def walk(
    drafts: NDArray[np.int64], sampled: NDArray[np.int64], lengths: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """See ``dflash_rs.verify.walk``."""

def verify_token(
    p: NDArray[np.floating],
    q: NDArray[np.floating],
    drafts: NDArray[np.int64],
    *,
    seeds: NDArray[np.uint64] | None = None,
    round_starts: NDArray[np.uint64] | None = None,
    accept_coins: NDArray[np.float64] | None = None,
    last_coins: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """See ``dflash_rs.verify.token``."""

def verify_block(
    p: NDArray[np.floating],
    q: NDArray[np.floating],
    drafts: NDArray[np.int64],
    *,
    seeds: NDArray[np.uint64] | None = None,
    round_starts: NDArray[np.uint64] | None = None,
    accept_coins: NDArray[np.float64] | None = None,
    last_coins: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """See ``dflash_rs.verify.block``."""

def sample_rows(
    logits: NDArray[np.float32],
    positions: NDArray[np.uint64],
    seeds: NDArray[np.uint64],
    transform: dict[str, Any],
    *,
    prompt: Sequence[int] = ...,
    output: Sequence[int] = ...,
    paths: Sequence[Sequence[int]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """See ``dflash_rs.verify.sample_rows``."""

def top_logprobs(logits: NDArray[np.float32], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """See ``dflash_rs.verify.top_logprobs``."""

def couple(
    tokens: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    positions: NDArray[np.int64],
    temperatures: NDArray[np.float32],
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of candidates ``[n, depth, K]`` of ``n`` requests, the ``k`` of every place that the target's own random numbers favour, the best first.

    A token is drawn as the one with the largest log-probability over the temperature plus a number of its seed and position; a draft is the
    candidate with the largest such sum by the drafter's ``probabilities`` ``[n, depth, K]``, falling. What comes back with it is its share in the
    sums (softmax). ``positions`` ``[n]`` are those of the first places in their texts; rows of temperature 0 keep their likeliest candidates.
    Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024.
    """

def gumbel(seed: int, position: int, columns: int, domain: str = "draw") -> NDArray[np.float32]:
    """See ``dflash_rs.verify.gumbel``."""

# --- host kernels -----------------------------------------------------------------------------------------------------

@final
class AttentionBatch:
    """The indices of one step, checked once for all its layers.

    ``query_starts`` i32 ``[R+1]``, ``context_lens`` and ``row_ids`` i32 ``[R]``, ``page_table`` i32 ``[rows, pages]``; ``slots`` i64
    ``[T]``, where this step's keys and values are written (None: nowhere); ``valid_from`` i32 ``[R]``, keys before it are not
    seen; ``ancestors`` u64 ``[T, words]``, bit j set where a token sees token j of its own request's step. All C-contiguous.

    Raises ``InvalidArgument`` for an index out of range or a length that does not fit.
    """

    def __new__(
        cls,
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        page_table: NDArray[np.int32],
        row_ids: NDArray[np.int32],
        page_size: int,
        num_slots: int,
        slots: NDArray[np.int64] | None = None,
        valid_from: NDArray[np.int32] | None = None,
        ancestors: NDArray[np.uint64] | None = None,
    ) -> AttentionBatch: ...
    @property
    def tokens(self) -> int:
        """Packed tokens of the step."""

def paged_attention(
    batch: AttentionBatch,
    q: tuple[int, int, int],
    k: tuple[int, int, int],
    v: tuple[int, int, int],
    k_cache: tuple[int, int, int],
    v_cache: tuple[int, int, int],
    out: tuple[int, int, int],
    dtype: str,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    mask: str = "causal",
    window: int | None = None,
    threads: int = 1,
    softcap: float | None = None,
    sinks: NDArray[np.float32] | None = None,
) -> None:
    """One layer's attention, with this step's K and V written to the cache first.

    An array is (address, row stride, head stride), strides in elements: ``q`` and ``out`` ``[T, num_q_heads, head_dim]``, ``k`` and
    ``v`` ``[T, num_kv_heads, head_dim]``, caches ``[num_slots, num_kv_heads, head_dim]``. The caller keeps them alive and as large
    as they are said to be. ``dtype``: "float32" or "bfloat16"; ``mask``: "causal", "block" or "ancestors". With a ``softcap`` c a score s
    becomes c * tanh(s / c); ``sinks`` f32 ``[num_q_heads]`` are scores of one more key per head, whose value is zero.

    Raises ``InvalidArgument`` for a null or misaligned address, strides that make heads overlap, or memory that overlaps
    what is written.
    """

"""From options to an engine: models are loaded, sizes chosen, memory taken, the backend picked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from .. import _core, cuda, known_models
from ..arguments import bad, integer
from ..config import LOOKUP, EngineConfig
from ..errors import InvalidArgument, warn
from ..models.checkpoint import load_tokenizer, readable
from ..models.loader import describe_draft, load_draft
from ..models.lookup import BLOCK as LOOKUP_BLOCK
from ..models.lookup import LookUp
from ..models.target import TargetModel
from ..models.target.load import describe
from ..options import StepOptions
from ..recurrent import DELTA_KEY_DIMS
from ..text import Detokenizer, token_bytes, with_special_tokens
from ..threads import while_loading
from .costs import measure
from .device import ahead
from .device.step import DeviceBackend, serves
from .host import HostBackend
from .loop import Loop
from .policy import Policy
from .requests import Requests

# Page tables beyond this are a mistake, not a plan.
_MOST_TABLE_BYTES = 1 << 30
_MOST_NODES = 1023
# Copies of a target's state that the prefix cache may hold, for every request that may run.
_COPIES_PER_REQUEST = 2


@dataclass(frozen=True)
class Models:
    """A target, a drafter that is bound to it (None decodes plainly), the target's tokenizer, and the bytes of each token (None where a
    tokenizer's tokens have none of their own)."""

    target: Any
    draft: Any | None
    tokenizer: Any
    bytes: list[bytes] | None

    @classmethod
    def load(cls, model: Any, draft: Any | None, *, device: torch.device, dtype: torch.dtype, precision: str) -> Models:
        """From folders or hub names; a `draft` of LOOKUP has neither. What can be refused by the files' headers is, before any weight is
        read."""
        files = None if draft == LOOKUP else draft
        with while_loading():
            with known_models.repaired_by(model):
                about = describe(model)
                tokenizer = load_tokenizer(model)
            text = about.config.get_text_config()
            with readable(model, "tokenizer"):
                table = token_bytes(tokenizer, text.vocab_size)
            if files is not None:
                describe_draft(files, text)
            target = TargetModel.load(about, device=str(device), dtype=dtype, matmul_precision=precision)
            drafter: Any = LookUp() if draft == LOOKUP else None
            if files is not None:
                drafter = load_draft(files, target, matmul_precision=precision)
        if target.vocab_size != text.vocab_size:  # a head with more rows than there are tokens
            with readable(model, "tokenizer"):
                table = token_bytes(tokenizer, target.vocab_size)
        return cls(target, drafter, tokenizer, table)


@dataclass(frozen=True)
class Sizes:
    """What an engine is built for: tokens of a block with its anchor, most drafts of a tree, most tokens of a request."""

    block_size: int
    tree_nodes: int
    max_context: int
    # Most tokens of a block that is looked up beside a drafter, its anchor counted; 0 looks nothing up.
    look_up: int = 0

    @classmethod
    def choose(cls, models: Models, config: EngineConfig, options: StepOptions) -> Sizes:
        """Of what was asked for, within what the models take."""
        plain, draft = models.draft is None, models.draft
        expected = "0 without a drafter" if plain else None
        block = _block(draft, options.block_size)
        chains = draft is None or draft.from_text
        if chains and not plain:
            expected = "0 with a look-up, which drafts chains"
        nodes = integer("tree_nodes", options.tree_nodes, 0, 0 if chains else _MOST_NODES, expected=expected)
        if nodes and models.target.state is not None:
            raise InvalidArgument(
                f"tree_nodes: got {nodes}, expected 0 with a target that keeps state: a state runs over one path, not over a tree"
            )
        asked, limit = config.max_context, models.target.max_context
        if asked > limit:
            raise InvalidArgument(f"max_context: got {asked}, expected at most {limit}, the target's own limit")
        return cls(block, nodes, asked or limit, _look_up(models, block, nodes, options))

    @property
    def row(self) -> int:
        """Most tokens of a decoding row."""
        return max(self.block_size, self.tree_nodes + 1, self.look_up)


def _look_up(models: Models, block: int, nodes: int, options: StepOptions) -> int:
    """Most tokens of a block that is looked up beside the drafter, 0 where none is."""
    draft, why = models.draft, ""
    if options.lookup is False:
        return 0
    if draft is None:
        why = "there is no drafter to look up beside; draft='lookup' looks up alone"
    elif draft.from_text:
        why = "the drafter looks up already"
    elif nodes:
        why = f"tree_nodes is {nodes}, and what is looked up is a chain"
    elif models.target.device.type != "cpu" or cuda.available(models.target.device):
        why = f"steps are taken on {models.target.device}, and what stays there does not know the texts"
    if options.lookup is None and (why or options.overlap):
        return 0
    if why:
        raise InvalidArgument(f"lookup: got True, expected False: {why}")
    return max(LOOKUP_BLOCK, block)


def _block(draft: Any | None, asked: int | None) -> int:
    if draft is None:
        if asked is not None:
            integer("block_size", asked, 1, 1, expected="None or 1 without a drafter")
        return 1
    own = draft.block_size
    if asked is None:
        return own
    why = "of a look-up" if draft.from_text else f"the drafter was trained with {own}"
    return integer("block_size", asked, 2, own, expected=f"2..{own} ({why})")


def build(
    models: Models,
    config: EngineConfig,
    sizes: Sizes,
    options: StepOptions,
) -> Loop:
    """An engine of `models`: takes the memory, and measures what steps cost unless the options say it or nobody asks (`adaptive`)."""
    target, draft = models.target, models.draft
    if draft is not None:
        target.set_taps(draft.taps)
    # Where cached text may be gone on from, of a target that keeps state.
    copies = None if target.state is None else _COPIES_PER_REQUEST * config.max_running * config.prefix_cache
    state_bytes = _state_bytes(target, config, sizes, copies)
    room = _host_memory() if target.device.type == "cpu" else math.inf
    if state_bytes > room:
        raise _too_many_states(config, copies, state_bytes)
    pages = _take_memory(models, config, sizes, state_bytes, room)
    on_device = serves(target, draft)
    overlap = _overlap(options.overlap, target, draft, on_device, sizes.look_up > 0)
    core = _core.Engine(
        num_pages=pages,
        page_size=config.page_size,
        max_running=config.max_running,
        max_context=sizes.max_context,
        block_size=sizes.row,
        max_batch_tokens=max(config.max_batch_tokens, config.max_running),
        vocab_size=target.vocab_size,
        eos_ids=list(target.eos_token_ids),
        prefix_cache=config.prefix_cache,
        depth=int(overlap),
        state_checkpoints=copies,
        vocabulary=models.bytes,
        special_vocabulary=None if models.bytes is None else with_special_tokens(models.tokenizer, models.bytes),
    )
    if copies is not None:
        state = target.state.on_device() if on_device else target.state
        _take_states(state, core, config, sizes, copies, state_bytes)
    requests = Requests(
        core, None if models.bytes is not None else lambda skip: Detokenizer(models.tokenizer, None, skip)
    )
    if on_device:
        device = DeviceBackend(
            core,
            target,
            draft,
            config,
            block_size=sizes.block_size,
            max_context=sizes.max_context,
            tree_nodes=sizes.tree_nodes,
            constrained=requests.constrained,
            graphs=options.cuda_graphs,
        )
        policy = _policy(models, core, config, sizes, options, device)
        loop = Loop(core, device, policy, requests, overlap=overlap, state_bytes=state_bytes)
        if options.capture_ahead:
            loop.captured_ahead = ahead.capture(device, options.capture_ahead)._asdict()
        return loop
    if options.capture_ahead:
        raise bad("capture_ahead", options.capture_ahead, "0 where steps do not stay on a GPU: there are no graphs")
    policy = _policy(models, core, config, sizes, options, None)
    host = HostBackend(
        core,
        target,
        draft,
        policy,
        page_size=config.page_size,
        constrained=requests.constrained,
        draws_there=_kernels_here(models),
    )
    return Loop(core, host, policy, requests, overlap=overlap, state_bytes=state_bytes)


def _policy(
    models: Models,
    core: _core.Engine,
    config: EngineConfig,
    sizes: Sizes,
    options: StepOptions,
    device: DeviceBackend | None,
) -> Policy:
    target, draft, costs = models.target, models.draft, options.costs
    adapts = draft is not None and options.adaptive
    if draft is not None and adapts and costs is None:
        found = measure(target, draft, sizes.block_size, core.page_table.shape[0]) if device is None else device.costs()
    else:
        found = costs if adapts else None
    return Policy(
        core,
        block_size=sizes.block_size,
        tree_nodes=sizes.tree_nodes,
        costs=found,
        # Measured in a busy moment they are too high; what steps take corrects that. On a GPU the clock here sees launches only.
        observes=adapts and costs is None and target.device.type == "cpu",
        max_running=config.max_running,
        max_batch_tokens=config.max_batch_tokens,
        asks_host=device is None,
        widths=[] if device is None else device.widths,
        from_text=draft is not None and draft.from_text,
        look_up=sizes.look_up,
    )


def _state_bytes(target: Any, config: EngineConfig, sizes: Sizes, copies: int | None) -> int:
    """Memory of states: one for each running request with what its last row fed in, and `copies`."""
    if copies is None:
        return 0
    per_request = target.state.bytes_per_slot + sizes.row * target.state.bytes_per_token
    return config.max_running * per_request + copies * target.state.bytes_per_slot


def _take_states(
    state: Any, core: _core.Engine, config: EngineConfig, sizes: Sizes, copies: int, state_bytes: int
) -> None:
    try:
        state.alloc(core.page_table.shape[0], copies, sizes.row)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise _too_many_states(config, copies, state_bytes) from error


def _host_memory() -> float:
    """Bytes of the machine's memory, without end where the system does not say. A system that gives more than it has, as most do, gives no error:
    it ends the process when that is written to."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_many_states(config: EngineConfig, copies: int | None, state_bytes: int) -> InvalidArgument:
    return InvalidArgument(
        f"max_running: got {config.max_running}, expected as many as the memory has room for: their states"
        f"{' and copies of them' if copies else ''} take {state_bytes / 2**30:,.1f} GiB"
    )


def _overlap(asked: bool | None, target: Any, draft: Any, on_device: bool, looks_up: bool) -> bool:
    """Whether steps are launched ahead."""
    if target.state is not None:
        if asked:
            raise InvalidArgument(
                "overlap: got True, expected None or False: this target keeps state that moves on with what is accepted"
            )
        return False
    if looks_up or (draft is not None and draft.from_text):
        if asked:
            raise InvalidArgument(
                "overlap: got True, expected None or False: what is looked up hangs on the tokens of the step before"
            )
        return False
    # A CPU computes one thing at a time: nothing would run beside the host's part.
    return on_device if asked is None else asked


def _take_memory(models: Models, config: EngineConfig, sizes: Sizes, state_bytes: int, room: float) -> int:
    """Allocates the KV of both models and returns the number of pages; beside it there are `state_bytes` of state, of `room` bytes in all."""
    target, draft, page = models.target, models.draft, config.page_size
    table = config.max_running * -(-(sizes.max_context + sizes.row) // page) * 4
    if table > _MOST_TABLE_BYTES:
        raise InvalidArgument(
            f"max_running: got {config.max_running}, expected at most {config.max_running * _MOST_TABLE_BYTES // table}: page tables of so "
            f"many requests would take {table / 2**30:,.1f} GiB"
        )
    bytes_per_token = target.kv_bytes_per_token + (draft.kv_bytes_per_token if draft else 0)
    pages = config.pages(bytes_per_token, sizes.max_context, sizes.row, state_bytes)
    slots = pages * page
    # A size that torch cannot even express, or that the system does not give.
    too_much = InvalidArgument(
        f"num_pages, page_size: got {pages} pages of {page} tokens, expected a cache that fits the memory; this one takes "
        f"{slots * bytes_per_token / 2**30:,.1f} GiB{f' beside {state_bytes / 2**30:,.1f} GiB of state' if state_bytes else ''}"
    )
    if slots >= 2**31 or slots * bytes_per_token + state_bytes > room:
        raise too_much
    try:
        target.alloc_kv(slots)
        if draft is not None:
            draft.alloc_kv(slots)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise too_much from error
    return pages


def _kernels_here(models: Models) -> bool:
    """Whether at least the draws can be made on the GPU; on one, says why nothing else is."""
    target, draft = models.target, models.draft
    if target.device.type != "cuda":
        return False
    heads = {kv.key_dim for kv in target.kv_layers.values()}
    heads |= set() if draft is None else set(draft.key_dims)
    if draft is not None and draft.on_device() is None and serves(target, None):
        warn(
            f"steps go through torch: got a drafter of the kind {draft.kind}, which has no part in steps that stay on the GPU"
        )
        cuda.load(target.device)
        return True
    if target.state is not None and target.kernel and target.state.on_device() is None:
        warn(
            "steps go through torch: got recurrent layers that no kernel serves, expected the gated delta rule with keys of "
            f"{', '.join(map(str, DELTA_KEY_DIMS))} elements"
        )
        cuda.load(target.device)
        return True
    warn(
        f"steps go through torch: got {target.dtype}, key heads of {', '.join(map(str, sorted(heads)))} elements and {target.device}, "
        f"expected bfloat16, heads of {', '.join(map(str, cuda.HEAD_DIMS))} in both models and a build with kernels for this GPU "
        "(dflash-rs doctor tells)"
    )
    # Loading may allocate, which a captured graph must not.
    found = cuda.available(target.device) and target.dtype in (torch.bfloat16, torch.float32)
    if found:
        cuda.load(target.device)
    return found

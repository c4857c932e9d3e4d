"""What SGLang asks of a speculative algorithm, answered as DFLASH does wherever the two are alike.

SGLang checks at registration that the ``is_*`` and ``supports_*`` questions have an answer; it asks others too. ``missing_answers``
compares with all of them, and a test calls it for every supported version.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo, get_spec

from dflash_rs.errors import DflashError, InvalidArgument
from dflash_rs.sglang import ALGORITHM, compat, config, disaggregation, probe

logger = logging.getLogger(__name__)

# Asked of DFLASH itself, so that a version of SGLang that changes its mind changes ours. Not every version asks all of them.
AS_DFLASH = tuple(
    name
    for name in (
        "is_some",
        "is_none",
        "is_speculative",
        "is_eagle",
        "is_eagle3",
        "is_frozen_kv_mtp",
        "is_dflash",
        "is_uno",
        "is_dspark",
        "is_dflash_family",
        "is_standalone",
        "is_ngram",
        "supports_target_verify_for_draft",
        "supports_prefill_shared_read_done",
        "supports_ragged_verify",
        "supports_grammar_overlap",
        "has_draft_kv",
        "carries_draft_hidden_states",
        "create_future_map",
        "need_topk",
        "resolve_max_speculative_num_draft_tokens",
        "get_num_tokens_per_req_for_target_verify",
        "get_num_tokens_per_bs_for_target_verify",
    )
    if hasattr(SpeculativeAlgorithm, name)
)
# Class methods, and the answers given below.
OWN = (
    "from_string",
    "register",
    "handle_server_args",
    "get_platform_worker_cls",
    "create_worker",
    "supports_mixed_chunk",
    "build_disagg_draft_input",
)


class DflashRsAlgorithm(CustomSpecAlgo):
    """``DFLASH_RS``: DFLASH's draft model and KV layout, our verification and bookkeeping."""

    def get_platform_worker_cls(self) -> None:
        """The worker is the same on every platform."""
        return None

    def supports_mixed_chunk(self) -> bool:
        """No: a decoding request in a batch of prompts is sampled by SGLang, whose penalties are not fed when it speculates."""
        return False

    def build_disagg_draft_input(self, batch: Any, *given: Any) -> Any:
        """What the first step gets of requests that a prefill server has prefilled: SGLang's, and who they are."""
        from dflash_rs.sglang import planning  # it needs more of SGLang than there is while plugins are loaded

        for req in batch.reqs:
            disaggregation.arrive(req)
        return planning.arrived(SpeculativeAlgorithm.DFLASH.build_disagg_draft_input(batch, *given), batch.reqs)

    def create_worker(self, server_args: Any) -> type:
        """The worker class; refuses SGLang versions it does not fit."""
        compat.check(config.load().allow_untested_sglang)
        return super().create_worker(server_args)

    def handle_server_args(self, server_args: Any) -> None:
        """Fills in what DFLASH would; contradictory flags are errors that name them."""
        options = config.load()
        block = fill_in(server_args, options.tree_nodes)
        options.widths_of(block)
        if options.probe:
            probe.ask_for(server_args)


def _as_dflash(name: str):
    def answer(self, *args, **kwargs):
        return getattr(SpeculativeAlgorithm.DFLASH, name)(*args, **kwargs)

    answer.__name__ = name
    answer.__doc__ = f"As DFLASH: see ``SpeculativeAlgorithm.{name}``."
    return answer


for _name in AS_DFLASH:
    setattr(DflashRsAlgorithm, _name, _as_dflash(_name))


def missing_answers() -> list[str]:
    """Methods of SGLang's enum that ``DflashRsAlgorithm`` neither delegates nor answers itself."""
    asked = {
        name
        for name, value in vars(SpeculativeAlgorithm).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, classmethod)) and name.islower()
    }
    return sorted(asked - set(AS_DFLASH) - set(OWN))


def require_registered() -> None:
    """Raises unless the registry holds this algorithm and the request check is in place."""
    spec = get_spec(ALGORITHM)
    if not isinstance(spec, DflashRsAlgorithm):
        raise DflashError(
            f"{ALGORITHM}: SGLang's registry holds {spec!r}; the plugin of dflash-rs failed to load (see the log above), or "
            "SGLANG_PLUGINS leaves it out"
        )
    if lost := compat.not_hooked():
        raise DflashError(
            f"{ALGORITHM}: {', '.join(lost)} could not be hooked, so what cannot be honoured would be neither refused nor put right"
        )


def fill_in(args: Any, tree_nodes: int = 0) -> int:
    """Server arguments that DFLASH needs, on anything with ServerArgs' attributes; plain assignments only. Returns the tokens of a block.

    With trees SGLang makes room for `tree_nodes` drafts and the anchor, and the block's own length stands in `speculative_dflash_block_size`.
    """
    if args.speculative_draft_model_path is None:
        raise InvalidArgument(f"--speculative-draft-model-path: not given, expected a DFlash drafter for {ALGORITHM}")
    if args.pp_size != 1:
        raise InvalidArgument(f"--pp-size: got {args.pp_size}, expected 1 with {ALGORITHM}")
    if (answer := compat.installed().refused(args)) is not None:
        raise InvalidArgument(f"{answer} and {ALGORITHM}")

    block, named = args.speculative_num_draft_tokens, args.speculative_dflash_block_size
    if tree_nodes and named is not None and block == tree_nodes + 1:
        block = named  # filled in before
    if block is not None and named is not None and int(block) != int(named):
        raise InvalidArgument(
            f"--speculative-num-draft-tokens: got {block}, but --speculative-dflash-block-size is {named}; give one, or the same"
        )
    block = named if block is None else block
    if block is None:
        block = drafter_block_size(args)
    if int(block) < 2:
        raise InvalidArgument(
            f"--speculative-num-draft-tokens: got {block}, expected at least 2 (the anchor and a draft)"
        )
    args.speculative_num_draft_tokens = int(block)
    if tree_nodes:
        args.speculative_num_draft_tokens, args.speculative_dflash_block_size = tree_nodes + 1, int(block)

    # SGLang sizes KV by steps and branches as well; a block is one step of one branch.
    for name in ("speculative_num_steps", "speculative_eagle_topk"):
        if getattr(args, name) not in (None, 1):
            logger.warning("%s: %s=%s has no meaning here, 1 is used", ALGORITHM, name, getattr(args, name))
        setattr(args, name, 1)

    window = args.speculative_draft_window_size
    if window is not None and int(window) < int(block):
        raise InvalidArgument(f"--speculative-draft-window-size: got {window}, expected at least the block, {block}")
    if args.speculative_draft_attention_backend is None:
        args.speculative_draft_attention_backend = platform_draft_backend()
    if args.max_running_requests is None:
        args.max_running_requests = 48
        logger.warning("%s: --max-running-requests is not set, 48 is used", ALGORITHM)
    return int(block)


def drafter_block_size(args: Any) -> int:
    """The block size in the drafter's config.json."""
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from sglang.srt.utils.hf_transformers_utils import get_config

    path = args.speculative_draft_model_path
    try:
        loaded = get_config(
            path, trust_remote_code=args.trust_remote_code, revision=args.speculative_draft_model_revision
        )
    except Exception as error:
        raise InvalidArgument(
            f"--speculative-draft-model-path: {path}: its configuration cannot be read ({error})"
        ) from error
    block = parse_dflash_draft_config(draft_hf_config=loaded).resolve_block_size(default=None)
    if block is None:
        raise InvalidArgument(
            f"--speculative-num-draft-tokens: not given, and {path}/config.json has no block_size; give the block size"
        )
    return int(block)


def platform_draft_backend() -> str | None:
    """The drafter's attention backend where an out-of-tree platform has one of its own; None lets SGLang choose."""
    from sglang.srt.platforms import current_platform

    if not current_platform.is_out_of_tree():
        return None
    ask = getattr(current_platform, "get_default_speculative_draft_attention_backend", None)
    return None if ask is None else ask("DFLASH")

"""Everything here depends on SGLang's version: which ones are known to fit, and the names they are reached by.

The worker overrides private methods of SGLang's DFLASH worker, so a version counts as supported only after the tests have run on
it. ``check`` compares the version and every name the worker leans on, and says what is wrong before a model is loaded.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

from dflash_rs.errors import DflashError

TESTED = ("0.5.23",)

# Methods of DFlashWorkerV2 that are overridden, and the parameters that are relied on.
SEAMS = {
    "__init__": ("server_args", "gpu_id", "nccl_port", "target_worker"),
    "forward_batch_generation": ("batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    "_can_skip_verify_logits": ("batch", "sampling_info"),
    "_accept_block": (
        "candidates",
        "next_token_logits",
        "sampling_info",
        "draft_input",
        "prefix_lens",
        "bs",
        "target_predict",
    ),
    "_validate_phase1_sampling_support": ("batch",),
    "_make_next_draft_input_prefill": ("bonus_tokens", "seq_lens"),
    "_make_next_draft_input_decode": ("bonus_tokens", "new_seq_lens"),
    "on_verify_complete_cpu": ("num_correct_drafts_per_req", "batch_size"),
}

# Where the scheduler asks whether a request can be served; answered by `requests.refusal`.
REQUEST_CHECK = "sglang.srt.managers.scheduler.validate_dflash_request"


class UnsupportedSGLang(DflashError):
    """This SGLang is not one the worker is known to fit."""


def version() -> str | None:
    """SGLang's version, or None where it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def worker_class() -> type:
    """SGLang's own DFLASH worker."""
    from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

    return DFlashWorkerV2


def draft_input_class() -> type:
    """What SGLang's DFLASH worker hands from one step to the next."""
    from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2

    return DFlashDraftInputV2


def problems() -> list[str]:
    """What the installed SGLang lacks of what the worker leans on, in words; empty when it fits."""
    if version() is None:
        return ["sglang: not installed, expected one of " + ", ".join(TESTED)]
    try:
        worker = worker_class()
        draft_input_class()
    except ImportError as error:
        return [f"sglang {version()}: its DFLASH worker cannot be imported ({error})"]
    found = []
    for name, expected in SEAMS.items():
        method = getattr(worker, name, None)
        if method is None:
            found.append(f"DFlashWorkerV2.{name}: not there")
            continue
        missing = [p for p in expected if p not in inspect.signature(method).parameters]
        if missing:
            found.append(f"DFlashWorkerV2.{name}: no parameter {', '.join(missing)}")
    return found


def check(allow_untested: bool) -> None:
    """Raises UnsupportedSGLang unless this version was tested, or fits and `allow_untested` is set."""
    have = version()
    if have not in TESTED and not allow_untested:
        raise UnsupportedSGLang(
            f"sglang: got version {have}, tested with {', '.join(TESTED)}; install one of those, or set "
            '"allow_untested_sglang": true in DFLASH_RS_CONFIG'
        )
    if found := problems():
        raise UnsupportedSGLang(f"sglang {have} does not fit DFLASH_RS: " + "; ".join(found))


def request_check_in_place() -> bool:
    """Whether SGLang managed to apply that hook; it logs and goes on when it does not."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return REQUEST_CHECK in HookRegistry._patched


def resolved(server_args: Any) -> Any:
    """Server arguments with everything filled in."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def metrics_enabled(server_args: Any) -> bool:
    """Whether the server exports metrics."""
    return bool(resolved(server_args).enable_metrics)


def served_model_name(server_args: Any) -> str:
    """The model's name, as SGLang's own metrics label it."""
    return str(resolved(server_args).served_model_name)


def draft_model_path(server_args: Any) -> str:
    """Where the drafter is."""
    return str(resolved(server_args).speculative_draft_model_path)


def simulates_acceptance() -> bool:
    """Whether SGLANG_SIMULATE_ACC_LEN asks for made-up accept lengths, for measuring; the text is then meaningless."""
    from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN

    return SIMULATE_ACC_LEN > 0


def same_on_all_ranks(worker: Any, tokens: Any, drawn: bool) -> Any:
    """Tokens of rank 0 on every rank of the tensor-parallel group, as SGLANG_SPEC_TP_SYNC asks for `drawn` ones or others."""
    from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

    site = SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE if drawn else SpecTpSyncSite.DFLASH_ACCEPT_GREEDY
    return worker._tp_sync.sync(site, tokens.contiguous())


def hook_request_check(refusal: Any) -> None:
    """Has the scheduler ask `refusal(req, enable_overlap)` first; a text refuses that request."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def ask(original, req, enable_overlap):
        return refusal(req, enable_overlap) or original(req, enable_overlap)

    HookRegistry.register(REQUEST_CHECK, ask, HookType.AROUND)

"""Registers the attention backend and the torch kernels; runs in every SGLang process."""

import multiprocessing
import os

from sglang_host.platform import ATTENTION

ALLOCATION = "sglang.srt.mem_cache.allocation"
PENALTIES = "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator"


def register() -> None:
    """The entry point."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_host import counting, cuda, graphs, interpreted, kernels, older, shadow, steered, transfer

    cuda.emulate()
    if interpreted.on():
        interpreted.prepare()
    if os.environ.get("SGLANG_HOST_FORK") == "1":
        _fork()
    if transfer.on():
        transfer.provide()

    if older.is_it():
        from sglang.srt import server_args as choices

        older.register(ATTENTION)
    else:
        from sglang.srt.arg_groups import choices
        from sglang.srt.layers import dp_attention
        from sglang.srt.mem_cache.pool_host import common, mha

        dp_attention.memcpy_func = dp_attention.memcpy_cpu
        mha.transfer_kv_direct = kernels.transfer
        common._cuda_host_register = lambda buffer, granularity=None: None
        choices.add_draft_attention_backend_choices([ATTENTION])
    for add in (
        choices.add_attention_backend_choices,
        choices.add_deterministic_attention_backend_choices,
        choices.add_radix_supported_deterministic_attention_backend_choices,
    ):
        add([ATTENTION])

    @register_attention_backend(ATTENTION)
    def attention(runner):
        from sglang_host.attention import HostAttention

        return HostAttention(runner)

    replaced = {
        f"{ALLOCATION}.assign_req_to_token_pool_func": kernels.assign_req_to_token_pool,
        f"{ALLOCATION}.get_last_loc": kernels.get_last_loc,
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor": kernels.all_gather_into_tensor,
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": (
            kernels.no_batch_invariant_kernels
        ),
        "sglang.srt.layers.sampler.murmur_hash32": kernels.murmur_hash32,
        f"{PENALTIES}.apply": kernels.penalties_in_order,
    }
    around = {
        "sglang.srt.models.dflash.DFlashAttention.forward": kernels.drafter_attention,
        "sglang.srt.models.dflash.DFlashDraftModel.forward": kernels.drafter_forward,
    }
    if interpreted.on():
        more_replaced, more_around = interpreted.hooks()
        replaced, around = replaced | more_replaced, around | more_around
    if steered.on():
        around |= steered.hooks()
    if transfer.on():
        around |= transfer.hooks()
    if shadow.on():
        around |= shadow.hooks()
    more = [module.hooks() for module in (graphs, counting) if module.on()]
    for functions, kind in ((replaced, HookType.REPLACE), *((hooks, HookType.AROUND) for hooks in (around, *more))):
        for target, function in functions.items():
            HookRegistry.register(target, function, kind)


def _fork() -> None:
    """Has a server's processes begin as copies of the one that starts them: what SGLang imports takes each longer than all the rest.

    SGLang asks for processes that begin anew, just before it starts them.
    """
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose(
        "fork" if method == "spawn" else method, force
    )

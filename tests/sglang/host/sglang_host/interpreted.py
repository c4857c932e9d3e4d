"""SGLang's own Triton kernels on Triton's interpreter, for targets with recurrent layers: what stands in their way on a host.

On with ``TRITON_INTERPRET=1``, which has to be in the environment before Triton is imported. The kernels are SGLang's, line by line;
nothing of what they compute is written here again.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch

KERNELS = "sglang.kernels.ops"
SCATTER = f"{KERNELS}.mamba.mamba_state_scatter_triton"


def on() -> bool:
    """Whether this process interprets Triton's kernels."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def prepare() -> None:
    """To be called before SGLang's kernels are imported; they keep what they find then."""
    from triton.runtime.autotuner import Autotuner

    # SGLang's kernels enter the device of their tensors, which torch has for other devices only.
    torch.cpu.device = lambda index=None: contextlib.nullcontext()
    Autotuner.run = first_configuration
    speak_numpy()


def first_configuration(self, *args, **kwargs):
    """Autotuning measures on a device. Here one configuration is as good as another."""
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def speak_numpy() -> None:
    """Gives Triton's language the interpreter's meaning for good.

    The interpreter does so at every launch and undoes it after, and does it again in every function that a kernel calls, all of which
    takes longer than a small kernel. Nothing is compiled here, so it can stay. What kernels know by another name, like SGLang's
    ``exp = tl.exp``, is then the interpreter's as well, which would otherwise not be found.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    stays = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: stays


def as_on_a_gpu(original, *args, **kwargs):
    """For functions that refuse the tensors of a host before they launch a kernel."""
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        return original(*args, **kwargs)


def chunks_in_float32(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    initial_state_indices=None,
    cu_seqlens=None,
    head_first=False,
    use_qk_l2norm_in_kernel=False,
    inplace_update=True,
):
    """SGLang's function for prompts, which asks for a narrower type than float32 before it launches kernels that know both."""
    from sglang.kernels.ops.attention.fla.chunk import ChunkGatedDeltaRuleFunction

    assert not head_first
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    states = (initial_state, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, inplace_update)
    out, chunks = ChunkGatedDeltaRuleFunction.apply(q, k, v, g, beta, scale, *states)
    return out, None, chunks


def hooks():
    """What is replaced in SGLang and what stands around it, by name."""
    replaced = {
        # How many processors a device has decides which rows share a block, and nothing else.
        f"{KERNELS}.attention.fla.layernorm_gated._get_sm_count": lambda device: 1,
        f"{SCATTER}._num_sms": lambda device_index: 1,
        f"{KERNELS}.attention.fla.chunk.chunk_gated_delta_rule": chunks_in_float32,
    }
    around = dict.fromkeys(
        (f"{SCATTER}.fused_mamba_state_scatter_with_mask", f"{SCATTER}.fused_conv_window_scatter_with_mask"),
        as_on_a_gpu,
    )
    return replaced, around

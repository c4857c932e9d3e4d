"""What a target's states have to be like, and narrower blocks in memory made for whole ones, by SGLang's kernel; without a server (those: `test_hybrids`)."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_rs.errors import InvalidArgument
from dflash_rs.sglang import compat, states

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("inputs", "kept", "model"),
    [([], [], BF16), ([F32], [F32], F32), ([BF16], [F32], BF16), ([F32, F32], [F32], BF16), ([BF16], [], BF16)],
)
def test_states_that_nothing_is_rounded_for_are_taken(inputs: list, kept: list, model: torch.dtype) -> None:
    states.check(inputs, kept, model)


@pytest.mark.parametrize(
    ("inputs", "kept", "model", "named"),
    [
        ([BF16], [F32], F32, "SGLANG_MAMBA_CONV_DTYPE: got bfloat16, expected float32"),
        ([BF16], [F32], F16, "SGLANG_MAMBA_CONV_DTYPE: got bfloat16, expected float16"),
        ([F32, BF16], [F32], F32, "SGLANG_MAMBA_CONV_DTYPE: got bfloat16, expected float32"),
        ([F32], [BF16], F32, "--mamba-ssm-dtype: got bfloat16, expected float32"),
        ([BF16], [F16], BF16, "--mamba-ssm-dtype: got float16, expected float32"),
    ],
)
def test_states_that_would_be_rounded_are_refused(inputs: list, kept: list, model: torch.dtype, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        states.check(inputs, kept, model)


def target(layers: Any, written: torch.Tensor | None) -> SimpleNamespace:
    """A worker as far as its target's states are concerned."""
    kept = SimpleNamespace(conv=[torch.zeros(2, 3)], temporal=torch.zeros(0, dtype=BF16), intermediate_ssm=written)
    pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=kept))
    if layers is not None:
        layers.req_to_token_pool = pool
    runner = SimpleNamespace(attn_backend=SimpleNamespace(linear_attn_backend=layers), req_to_token_pool=pool)
    return SimpleNamespace(_need_mamba_verify_commit=True, model_runner=runner, device="cuda:1")


def test_types_are_those_of_states_that_there_are() -> None:
    worker = target(None, None)
    assert compat.installed().state_types(worker) == ([F32], [])
    worker._need_mamba_verify_commit = False
    assert compat.installed().state_types(worker) == ([], [])


class GDNAttnBackend:
    """A stand-in for SGLang's class of this name."""

    def __init__(self, kernel: type):
        self.kernel_dispatcher = SimpleNamespace(verify_kernel=kernel())


class TritonGDNKernel:
    """Likewise."""


class OtherKernel:
    """Nobody has tried it."""


def test_only_known_kernels_verify_narrower_blocks() -> None:
    ask, room = compat.installed().states_of_whole_blocks, torch.zeros(2, 3, 8, 1, 4, 4)
    assert ask(target(GDNAttnBackend(TritonGDNKernel), room)) is None
    assert "GDNAttnBackend with OtherKernel" in (ask(target(GDNAttnBackend(OtherKernel), room)) or "")
    assert "NoneType with NoneType" in (ask(target(None, room)) or "")
    elsewhere = target(GDNAttnBackend(TritonGDNKernel), room)
    elsewhere.device = "xpu"
    assert "recurrent layers on xpu" in (ask(elsewhere) or "")
    assert "--enable-linear-replayssm-spec" in (ask(target(GDNAttnBackend(TritonGDNKernel), None)) or "")


# Run by a Python that interprets Triton's kernels: two requests' blocks of three, verified with room for six. Prints whether the states
# of the second request are where those of a block of six would be, by what the memory was made for and not by how many tokens are verified.
KERNEL = """
import torch
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel

rows, width, block, heads, size = 2, 3, 6, 2, 16
torch.manual_seed(0)
q, k = torch.randn(2, 1, rows * width, 1, size)
v = torch.randn(1, rows * width, heads, size)
a, b = torch.randn(2, rows * width, heads)
decay, bias = torch.randn(2, heads)
before = torch.randn(rows + 1, heads, size, size)


def verify(first, count, steps):
    kept, now = torch.zeros(rows + 1, block, heads, size, size), slice(first * width, (first + count) * width)
    TritonGDNKernel().target_verify(
        decay, bias, q[:, now], k[:, now], v[:, now], a[now], b[now],
        ssm_states=before[first:], cache_indices=torch.arange(count, dtype=torch.int32),
        query_start_loc=torch.arange(0, count * width + 1, width, dtype=torch.int32), intermediate_states_buffer=kept,
        intermediate_state_indices=torch.arange(count, dtype=torch.int32), cache_steps=steps, retrieve_parent_token=None,
    )
    return kept


alone = verify(1, 1, block)[0, :width]
assert alone.abs().sum() > 0
print(*(torch.equal(verify(0, 2, steps)[1, :width], alone) for steps in (block, width)))
"""


@pytest.mark.long
def test_sglangs_kernel_writes_states_of_narrower_blocks_where_those_of_whole_ones_go() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "SGLANG_PLATFORM": "host"}
    found = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-2:] == ["True", "True"]

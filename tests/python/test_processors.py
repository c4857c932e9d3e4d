"""What depends on the processor's instructions. `make test-processors` runs this, and more, with what lesser processors have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dflash_rs import _core, doctor, threads
from dflash_rs.errors import InvalidArgument
from dflash_rs.models import linear

SETS = ["portable", "avx2", "avx512", "avx512_bf16"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process of its own: the variables are read once."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize("name", SETS)
def test_the_kernels_use_the_set_that_is_named(name):
    done = python("from dflash_rs import _core; print(_core.cpu_isa(), _core.multiplies_bf16())", DFLASH_CPU_ISA=name)
    if name in _core.cpu_isas():
        assert done.stdout.split() == [name, str(name == "avx512_bf16")], done.stderr
    else:
        assert f'DFLASH_CPU_ISA: got "{name}" on a processor without it, expected ' in done.stderr


def test_without_a_name_it_is_the_widest_of_this_processor():
    environment = {name: value for name, value in os.environ.items() if name != "DFLASH_CPU_ISA"}
    code = "from dflash_rs import _core; print(_core.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == _core.cpu_isas()[-1]
    assert _core.cpu_isas() == SETS[: len(_core.cpu_isas())]
    assert _core.cpu_isa() == os.environ.get("DFLASH_CPU_ISA", _core.cpu_isas()[-1])


@pytest.mark.parametrize("name", ["neon", "AVX2", ""])
def test_a_set_that_nobody_knows_is_refused(name):
    done = python("from dflash_rs import _core; _core.cpu_isa()", DFLASH_CPU_ISA=name)
    expected = f'DFLASH_CPU_ISA: got "{name}", expected {" or ".join(_core.cpu_isas())}'
    assert done.stderr.endswith(f"dflash_rs.errors.InvalidArgument: {expected}\n")


def test_the_command_refuses_it_in_one_line():
    code = "import sys; from dflash_rs import cli; sys.exit(cli.main(['generate', 'import', '--max-tokens', '2']))"
    done = python(code, DFLASH_CPU_ISA="neon")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('dflash-rs: error: DFLASH_CPU_ISA: got "neon"') and done.stderr.count("\n") == 1


def test_doctor_says_what_the_kernels_use_and_what_the_processor_has():
    widest = _core.cpu_isas()[-1]
    done = python("from dflash_rs import doctor; print(doctor._cpu())", DFLASH_CPU_ISA="portable")
    assert done.returncode == 0, done.stderr
    assert "kernels for portable" in done.stdout
    assert (f"(DFLASH_CPU_ISA; the processor has {widest})" in done.stdout) == (widest != "portable")
    done = python("from dflash_rs import doctor; print(doctor._cpu())", DFLASH_CPU_ISA="sse")
    assert "status='broken'" in done.stdout and 'DFLASH_CPU_ISA: got "sse"' in done.stdout
    assert f"kernels for {_core.cpu_isa()}" in doctor._cpu().detail


def test_bfloat16_runs_on_a_processor_without_instructions_for_it():
    """AVX2 and no more, for oneDNN and torch. It was a crash."""
    code = """
from dflash_rs import LLM, SamplingParams
with LLM(device="cpu", dtype="bfloat16", adaptive=False) as llm:
    texts = [llm.generate("def f(", SamplingParams(max_tokens=8), draft=draft)[0].text for draft in (True, False)]
print(texts[0] == texts[1], len(texts[0]) > 0)
"""
    done = python(code, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("limit", [0, 1 << 25], ids=["read where they are", "packed where that is"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_modules_and_of_its_row(monkeypatch, dtype, limit):
    monkeypatch.setattr(linear, "COPY_LIMIT", limit)
    modules = [nn.Linear(48, n, bias=n == 32).to(dtype) for n in (32, 24)]
    x, residual = (torch.randn(17, n).to(dtype) for n in (48, 56))
    with torch.inference_mode():
        expected = torch.cat([F.linear(x, m.weight, m.bias) for m in modules], dim=1)
        product = linear.PackedLinear(modules)
        assert (product.host is not None) == (dtype == torch.float32 and limit > 0)
        for ours, own in ((product(x), expected), (product.plus(x, residual), expected + residual)):
            torch.testing.assert_close(ours.float(), own.float(), rtol=2e-2, atol=2e-2)
        if dtype != torch.float16:
            for wrong in (x.double(), x[:, :47]):
                with pytest.raises(InvalidArgument, match="^x: got torch"):
                    product(wrong)
        # The modules' weights are parts of the one that is multiplied: nothing is held twice.
        assert all(m.weight.data_ptr() != 0 and torch.equal(m(x), F.linear(x, m.weight, m.bias)) for m in modules)
        assert modules[1].weight.untyped_storage().data_ptr() == product.weight.untyped_storage().data_ptr()
        if dtype != torch.float16:
            assert all(torch.equal(product(x[row : row + 1])[0], product(x)[row]) for row in (0, 5, 16))


def test_stacked_modules_can_still_be_trained():
    modules = [nn.Linear(8, n) for n in (4, 2)]
    with torch.inference_mode():
        linear.PackedLinear(modules)
    x = torch.randn(3, 8)
    sum(m(x).sum() for m in modules).backward()
    assert all(m.weight.grad is not None and m.weight.requires_grad for m in modules)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("100 51 3\n", True), ("100 50 3\n", False), ("0 0 0\n", False), ("no numbers", False)]
)
def test_a_thread_that_waits_for_a_processor_half_as_long_as_it_had_one_is_on_a_crowded_machine(
    monkeypatch, tmp_path, schedule, expected
):
    monkeypatch.setattr(threads, "_SCHEDULE", tmp_path / "schedstat")
    assert not threads.crowded(), "a system that does not tell"
    (tmp_path / "schedstat").write_text(schedule)
    assert threads.crowded() is expected


@pytest.mark.parametrize("crowded", [True, False])
def test_loading_takes_one_thread_where_it_is_crowded_and_gives_the_others_back(monkeypatch, crowded):
    monkeypatch.setattr(threads, "crowded", lambda: crowded)
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError, match="no such model"), threads.while_loading():
            assert torch.get_num_threads() == (1 if crowded else 3)
            raise RuntimeError("no such model")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_torchs_threads_are_handed_over_and_given_back():
    torch.set_num_threads(3)

    def now():
        return torch.get_num_threads(), threads.of_the_extension()

    try:
        with threads.handed_over(when=False):
            assert now() == (3, 3)
        with pytest.raises(RuntimeError, match="in the middle"), threads.handed_over():
            assert now() == (1, 3)
            with threads.handed_over():
                assert now() == (1, 3)
            assert now() == (1, 3)
            raise RuntimeError("in the middle")
        assert now() == (3, 3)
    finally:
        torch.set_num_threads(1)
    assert now() == (1, 1)


def test_the_command_keeps_torchs_threads_from_waiting_awake_unless_told_otherwise(monkeypatch):
    from dflash_rs import cli

    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        cli.prepare_libraries()
        assert os.environ.get("GOMP_SPINCOUNT") == expected
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)

"""Products of targets on a CPU, which give a row the same bits in any company, and whose threads work meanwhile."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hybrid_models import KINDS, OTHERS, build
from models_helpers import VOCAB, Pages
from test_experts import LAYERS
from test_experts import made as experts_made
from test_models_target import FUSED as LLAMA_SHAPES
from test_models_target import gpt2

from dflash_rs.models import linear
from dflash_rs.models.target import TargetModel, products

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 48), (7, 1), (48, 48), (97, 33), (200, 2048)])
def test_a_product_is_that_of_torch_and_a_row_has_the_same_bits_in_any_company(dtype, outputs, inputs):
    x, weight = numbers(64, inputs).to(dtype), numbers(outputs, inputs, seed=1).to(dtype)
    bias = numbers(outputs, seed=2).to(dtype)
    together = products.linear(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert float((together.double() - expected).abs().max()) <= bound * float(expected.abs().max())
    # Rows beside each other, with gaps, and in a third dimension.
    wide = torch.cat((x, x), dim=1)[:, :inputs]
    assert torch.equal(products.linear(wide, weight, bias), together)
    assert torch.equal(products.linear(x.view(4, 16, inputs), weight, bias), together.view(4, 16, outputs))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for start, rows in ((0, 1), (63, 1), (5, 2), (9, 5), (20, 17), (0, 64)):
                assert torch.equal(
                    products.linear(x[start : start + rows], weight, bias), together[start : start + rows]
                )
        finally:
            torch.set_num_threads(1)
    assert products.linear(x[:0], weight).shape == (0, outputs)


def test_a_weight_multiplies_in_the_extension_and_is_a_parameter_for_everything_else(monkeypatch):
    calls = []
    real = products.linear
    monkeypatch.setattr(products, "linear", lambda *given: (calls.append(1), real(*given))[1])
    plain = numbers(24, 48).bfloat16()
    weight, x = products.Weight(plain, requires_grad=False), numbers(3, 48, seed=1).bfloat16()
    assert isinstance(weight, torch.nn.Parameter) and weight.data_ptr() == plain.data_ptr()
    F.linear(x, weight)
    F.linear(x.float(), weight.float())
    F.linear(x.float(), weight.type(torch.float32))
    F.linear(x, products.Weight(plain.view(2, 12, 48), requires_grad=False)[torch.tensor(1)])
    assert len(calls) == 4
    assert type(weight.detach()) is torch.Tensor and type(weight * 2) is torch.Tensor
    assert torch.equal(F.embedding(torch.tensor([3]), weight), plain[3:4])
    with pytest.raises(RuntimeError):
        F.linear(x.float(), weight)
    # Gradients are torch's.
    hidden = x.clone().requires_grad_()
    F.linear(hidden, weight).float().sum().backward()
    assert hidden.grad is not None and len(calls) == 4


def test_modules_of_a_real_width_give_a_row_the_same_bits_in_any_company():
    from transformers.activations import ACT2FN

    model = torch.nn.Sequential(torch.nn.Linear(2048, 512), ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"]).bfloat16()
    x = numbers(67, 2048).bfloat16()
    with torch.inference_mode():
        expected = model(x)
        products.place(model)
        together = model(x)
        torch.testing.assert_close(together.float(), expected.float(), rtol=2e-2, atol=2e-2)
        for rows in (1, 2, 5, 17):
            assert torch.equal(torch.cat([model(part) for part in x.split(rows)]), together)


def run(target: TargetModel, spans: list[tuple[int, int, list[int]]], pages: Pages) -> torch.Tensor:
    """Logits of spans that begin their requests."""
    target.alloc_kv(pages.num_slots)
    if target.state is not None:
        target.state.alloc(len(pages.table), 0, 64)
    return target.forward(pages.batch(spans))[0]


ROWS = (1, 2, 5, 17, 64)
TEXTS = [np.random.default_rng(rows).integers(2, VOCAB, rows).tolist() for rows in ROWS]


HYBRIDS = (*KINDS, *OTHERS)


LLAMA_SHAPED = {make.__name__: make for make in LLAMA_SHAPES}


def made(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    model = LLAMA_SHAPED[kind]() if kind in LLAMA_SHAPED else (build if kind in HYBRIDS else experts_made)(kind)
    return model.to(dtype)


@functools.cache
def target_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> TargetModel:
    return TargetModel(made(kind, dtype))


def differing(target: TargetModel) -> int:
    """Rows whose logits hang on how many rows there are in the pass or on threads."""
    found = 0
    pages = Pages(len(TEXTS), 64, 4)
    together = run(target, [(row, 0, text) for row, text in enumerate(TEXTS)], pages).split(ROWS)
    for row, text in enumerate(TEXTS):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                found += int((run(target, [(row, 0, text)], pages) != together[row]).any(1).sum())
            finally:
                torch.set_num_threads(1)
    # Token after token, as plain decoding has it.
    text = TEXTS[3]
    run(target, [(3, 0, text[:1])], pages)
    for at in range(1, len(text)):
        if target.state is not None:
            target.state.keep(np.array([3], dtype=np.int32), np.array([1], dtype=np.int32))
        found += int((target.forward(pages.batch([(3, at, text[at : at + 1])]))[0] != together[3][at]).any())
    return found


@pytest.mark.parametrize("kind", sorted({*HYBRIDS, *LAYERS, *LLAMA_SHAPED}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_target_have_the_same_bits_in_any_company(kind, dtype):
    target = target_of(kind, dtype)
    assert (target.path == "fused") == (kind in LLAMA_SHAPED)
    assert differing(target) == 0


@pytest.mark.parametrize("kind", LLAMA_SHAPED)
def test_rows_of_weights_too_large_to_be_packed_have_the_same_bits_in_any_company(monkeypatch, kind):
    monkeypatch.setattr(linear, "COPY_LIMIT", 0)
    target = TargetModel(made(kind, torch.float32))
    assert target.path == "fused" and target._fused.run is None
    assert differing(target) == 0


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (functools.partial(made, "dense"), set()),
        (functools.partial(made, "qwen3"), set()),
        (lambda dtype: gpt2().to(dtype), {"addmm"}),
    ],
    ids=["dense", "qwen3", "gpt2"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_keeps_its_threads_where_it_has_products_left(monkeypatch, make, others, dtype):
    monkeypatch.setattr(products, "_SMALL", 48 * 48 - 1)
    seen, real = [], products.Others
    monkeypatch.setattr(products, "Others", lambda: (seen.append(real()), seen[-1])[1])
    target = TargetModel(make(dtype=dtype))
    assert (target.path, seen[0].names, target.handed_over) == ("modules", others, not others)
    threads = []
    target.decoder_layers[0].register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        run(target, [(0, 0, TEXTS[2])], Pages(1, 8, 4))
        assert threads == [3 if others else 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)

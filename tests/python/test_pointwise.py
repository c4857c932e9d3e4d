"""Functions of single numbers that torch computes for a target on a CPU: a row's bits are its own, whatever the widths."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hybrid_models import Knowing, build
from models_helpers import VOCAB, Pages, randomise

from dflash_rs import LLM, SamplingParams
from dflash_rs.models.target import TargetModel
from dflash_rs.models.target.pointwise import _HANGING, Padded

DTYPES = [torch.float32, torch.bfloat16]
# Without vectors of its own torch has next to nothing that could hang on places.
VECTORS = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, but for what is no number."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.contiguous().view(bits) == b.contiguous().view(bits)) | (a.isnan() & b.isnan())).all())


# What decoders compute of single numbers: what is listed, and what need not be.
LISTED: dict[str, tuple[object, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": (F.gelu, F.gelu),
    "gelu_tanh": (F.gelu, functools.partial(F.gelu, approximate="tanh")),
    "softplus": (F.softplus, F.softplus),
    "softplus, scaled": (F.softplus, lambda x: F.softplus(x, 2.0, 10.0)),
    "silu": (F.silu, F.silu),
    "mish": (F.mish, F.mish),
    "elu": (F.elu, F.elu),
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "exp2": (torch.exp2, torch.exp2),
    "sinh": (torch.sinh, torch.sinh),
    "rsqrt": (torch.rsqrt, torch.rsqrt),
}
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "cube": lambda x: x.pow(3.0),
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "times": lambda x: x * 1.3,
    "over": lambda x: x / 1.3,
    "plus": lambda x: x + 0.3,
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "clamp": lambda x: x.clamp(-1, 1),
}


@functools.cache
def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of bfloat16; of float32 as many random ones, and random bits."""
    if dtype == torch.bfloat16:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(1 << 16, generator=generator) * 4
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 13,), generator=generator)
    some[: 1 << 13] = bits.to(torch.int32).view(torch.float32)
    return some


def hangs(function, dtype: torch.dtype) -> bool:
    """Whether a number has other bits in a row of 15, or alone, than among many."""
    x = numbers(dtype)
    together = function(x)
    rows = torch.cat([function(part) for part in x.split(15)])
    alone = torch.cat([function(part) for part in x[: 1 << 12].split(1)])
    return not (same(rows, together) and same(alone, together[: 1 << 12]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_functions_hang_on_places_is_known(dtype):
    """Of the installed torch, whichever it is."""
    listed = {name for name, (key, _) in LISTED.items() if dtype in _HANGING[key]}
    found = {name for name, (_, function) in LISTED.items() if hangs(function, dtype)}
    found |= {name for name, function in OTHERS.items() if hangs(function, dtype)}
    assert found <= listed
    if VECTORS and dtype == torch.float32:
        assert {"gelu", "silu", "sigmoid", "softplus"} <= found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LISTED)
def test_within_padded_a_row_has_the_same_bits_in_any_company(name, dtype):
    function = LISTED[name][1]
    x = numbers(dtype)[: 120 * 37 * 2]
    for width in (1, 7, 37, 100):
        rows = x[: x.numel() // width * width].view(-1, width)[:120]
        wide = torch.cat((rows, rows), dim=1)
        with Padded() as padded:
            together = function(rows)
            assert padded.needed == (dtype in _HANGING[LISTED[name][0]])
            assert all(
                same(torch.cat([function(part) for part in rows.split(count)]), together) for count in (1, 3, 50)
            )
            # With gaps between rows, between elements, and rows that stand upright.
            assert same(function(wide[:, :width]), together)
            assert same(function(rows.repeat_interleave(2, 1)[:, ::2]), together)
            assert same(function(rows.t()), together.t())
    with Padded():
        assert same(function(numbers(dtype)), function(numbers(dtype)))
        assert same(function(input=rows) if name == "gelu" else function(rows), together)
        assert function(x[:0]).shape == (0,)


def test_within_padded_what_is_done_in_place_is_done_there():
    x = numbers(torch.float32)[:74].view(2, 37)
    for function in (functools.partial(F.silu, inplace=True), torch.sigmoid_, torch.Tensor.sigmoid_):
        kept = x.clone()
        with Padded():
            found = function(kept)
        expected = torch.sigmoid(numbers(torch.float32)[:96])[:74] if "sigmoid" in str(function) else None
        assert found is kept
        assert expected is None or same(kept.flatten(), expected)
        assert not same(kept, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LISTED)
def test_rows_of_two_vectors_each_have_the_same_bits_in_any_company_without(name, dtype):
    """By one thread, as nothing is left over: what makes most models need nothing."""
    function, step = LISTED[name][1], 128 // dtype.itemsize
    for width in (step, 3 * step, 11 * step):
        rows = numbers(dtype)[: 67 * width].view(-1, width)
        together = function(rows)
        assert all(same(torch.cat([function(part) for part in rows.split(count)]), together) for count in (1, 2, 5, 17))
        wide = torch.cat((rows, rows), dim=1)[:, :width]
        # A GELU whose rows have gaps is another's than that of a single row.
        assert name == "gelu" or same(function(wide), together)
        with Padded() as padded:
            assert same(function(rows), together) and not padded.needed
            assert same(function(wide), together) and padded.needed == name.startswith("gelu")


# ---- targets ---------------------------------------------------------------------------------------------------------

_ODD = {"intermediate_size": 37, "head_dim": 10, "hidden_size": 44}
_DELTA = {"linear_key_head_dim": 7, "linear_value_head_dim": 11}
# By class: a dense model, hybrids, experts beside attention, experts in a hybrid; and one that needs nothing as all of it is the extension's.
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "granite": lambda: plain("Granite"),
    "gemma": lambda: plain("Gemma", hidden_activation="gelu_pytorch_tanh", intermediate_size=100),
    "glm4 moe": lambda: plain(
        "Glm4Moe", moe_intermediate_size=13, n_routed_experts=5, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
    "qwen3.5": lambda: build("dense", **_ODD, **_DELTA),
    "qwen3.5 moe": lambda: build("experts", **_ODD, **_DELTA, moe_intermediate_size=13, shared_expert_intermediate_size=21),
    "falcon h1": lambda: build("falcon", **_ODD, mamba_d_head=11, mamba_d_ssm=88),
    "llama": lambda: plain("Llama"),
}  # fmt: skip
PROMPTS = [np.random.default_rng(7 + n).integers(3, VOCAB, n).tolist() for n in (1, 2, 5, 17, 33)]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0),
    "seeded": SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True, logprobs=0),
}


def plain(name: str, **options) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": False,
        } | _ODD | options
    )  # fmt: skip
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config), 0).eval()


def said(outputs) -> list[tuple[list[int], list[float]]]:
    """Texts, and how likely each token was in every bit."""
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [(output.token_ids, [entry.logprob for entry in output.logprobs]) for output in outputs]


@pytest.mark.parametrize("kind", MODELS)
def test_odd_widths_in_float32_say_the_same_to_the_bit_drafted_and_plain_alone_and_together(kind):
    target = TargetModel(MODELS[kind]())
    assert (target._padded is None) == (kind == "llama")
    options = {
        "tokenizer": None, "token_bytes": [bytes([33 + token]) for token in range(VOCAB)], "page_size": 4, "max_context": 64, "adaptive": False,
        "lookup": False,
    }  # fmt: skip

    def differing() -> int:
        found = 0
        for params in PARAMS.values():
            with LLM.from_parts(target, None, max_running=1, prefix_cache=False, **options) as llm:
                alone = [said(llm.generate([prompt], params))[0] for prompt in PROMPTS]
            draft = Knowing(target)
            draft.texts = [prompt + text for prompt, (text, _) in zip(PROMPTS, alone, strict=True)]
            with LLM.from_parts(target, draft, max_running=4, max_batch_tokens=24, **options) as llm:
                together = said(llm.generate(PROMPTS, params, draft=False))
                drafted = said(llm.generate(PROMPTS, params))
                # From states and pages that are there.
                again = said(llm.generate(PROMPTS, params))
                assert llm.stats()["tau"] > 1.4
            found += sum(a != b for some in (together, drafted, again) for a, b in zip(alone, some, strict=True))
        return found

    assert differing() == 0
    if target._padded is not None and VECTORS:
        target._padded = None
        assert differing() > 0


def test_torch_has_one_thread_for_what_it_would_share_anywhere_in_a_row():
    """66,560 numbers in three shares: each ends within a row, where something is left over."""
    model = plain("Granite", hidden_act="gelu_pytorch_tanh", intermediate_size=1024, num_hidden_layers=6)
    target = TargetModel(model)
    assert target._padded is None and target.handed_over
    text = np.random.default_rng(0).integers(2, VOCAB, 65).tolist()

    def logits(*ends: int) -> torch.Tensor:
        pages = Pages(1, 65, 4)
        target.alloc_kv(pages.num_slots)
        spans = zip((0, *ends), (*ends, 65), strict=True)
        return torch.cat([target.forward(pages.batch([(0, start, text[start:end])]))[0] for start, end in spans])

    torch.set_num_threads(3)
    try:
        expected = logits(1, 5, 20, 40)
        assert same(logits(), expected)
        target.handed_over = False
        assert not (VECTORS and same(logits(), expected))
    finally:
        torch.set_num_threads(1)

"""Layers of experts in one call of the extension: what transformers' own code gives, the same bits for a row in any company."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hybrid_models import Knowing, build
from models_helpers import VOCAB, Pages, randomise

from dflash_rs import LLM, SamplingParams, _core
from dflash_rs.errors import InvalidArgument, UnsupportedModel
from dflash_rs.models.target import TargetModel
from dflash_rs.models.target import experts as module
from dflash_rs.models.target.experts import HostExperts

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
_MANY = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_MADE = {
    "qwen2": ("Qwen2Moe", _MANY | {"shared_expert_intermediate_size": 40, "use_sliding_window": True, "sliding_window": 64}),
    "qwen3": ("Qwen3Moe", _MANY),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 12}),
    "deepseek": (
        "DeepseekV3",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 2, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
            "v_head_dim": 16, "num_key_value_heads": 4,
        },
    ),
    "granite": ("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    # Biases, a clamped gate, gate and up in turn, transposed; without a gate; other activations; transposed.
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "nemotron": (
        "NemotronH",
        {
            "layers_block_type": ["attention", "moe", "attention", "moe"], "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40, "n_group": 1, "topk_group": 1,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24, "sliding_window": 64, "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "gelu": ("Qwen3Moe", _MANY | {"hidden_act": "gelu"}),
    "aria": ("Aria", {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1}),
}  # fmt: skip
# Those whose blocks are known: router and shared expert are in the call; those whose experts are, and the number of layers that have some.
BLOCKS = ("qwen2", "qwen3", "mixtral", "olmoe", "next", "experts", "gelu")
OTHERS = ("gpt-oss", "nemotron", "gemma4", "gelu", "aria")
LAYERS = (
    {"deepseek": 2, "granite": 3, "gpt-oss": 3, "nemotron": 2, "gemma4": 3, "aria": 3}
    | dict.fromkeys(BLOCKS, 3)
    | {"next": 4, "experts": 4}
)


def made(kind: str, seed: int = 0, **options):
    if kind in ("next", "experts"):
        return build(kind, seed)
    import transformers

    name, more = _MADE[kind]
    text = "TextConfig" if name in ("Gemma4", "Aria") else "Config"
    config = getattr(transformers, name + text)(**_TEXT | more | options)
    name += "Text" if name == "Aria" else ""
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config), seed).eval()


def logits(target: TargetModel, tokens: list[int]) -> torch.Tensor:
    pages = Pages(1, len(tokens), 8)
    target.alloc_kv(pages.num_slots)
    if target.state is not None:
        target.state.alloc(1, 0, 6)
    return target.forward(pages.batch([(0, 0, tokens)]))[0]


TOKENS = np.random.default_rng(3).integers(2, VOCAB, 30).tolist()


@pytest.mark.parametrize("kind", LAYERS)
def test_logits_are_those_of_transformers(kind):
    with torch.inference_mode():
        expected = made(kind)(torch.tensor([TOKENS])).logits[0]
    target = TargetModel(made(kind))
    assert (target.experts.layers, target.experts.against) == (LAYERS[kind], [])
    replaced = {type(part).__name__ for part, _ in target.experts._forwards}
    assert all(name.endswith("SparseMoeBlock" if kind in BLOCKS else "Experts") for name in replaced)
    got = logits(target, TOKENS)
    assert float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-4
    # Not by doing the same.
    target.experts.undo()
    own = logits(target, TOKENS)
    assert not torch.equal(own, got)
    target.experts.use()
    assert torch.equal(logits(target, TOKENS), got)


@pytest.mark.parametrize(("inner", "dtype"), [(17, torch.float32), (20, torch.bfloat16)])
def test_experts_of_odd_sizes_are_served_too(inner, dtype):
    # torch's grouped products, which transformers would give them to, refuse such rows.
    target = TargetModel(made("qwen3", moe_intermediate_size=inner).to(dtype))
    assert (target.experts.layers, target.experts.against) == (3, [])
    got = logits(target, TOKENS)
    target.experts.undo()
    errors = (got - logits(target, TOKENS)).float().norm(dim=-1) / got.float().norm(dim=-1)
    assert float(errors.median()) < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "deepseek", *OTHERS])
def test_a_row_has_the_same_bits_alone_together_and_with_any_number_of_threads(kind, dtype):
    forwards = TargetModel(made(kind).to(dtype)).experts._forwards
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    count = forwards[0][1].__self__.count
    indices = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(row))[:3] for row in range(40)]
    )
    weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        for part, forward in forwards:
            run = forward if part.__class__.__name__.endswith("Block") else None
            call = lambda rows, run=run, own=forward: (  # noqa: E731
                run(x[None, rows])[0] if run else own(x[rows], indices[rows], weights[rows])
            )
            together = call(slice(None))
            for rows in (slice(0, 1), slice(3, 11), slice(11, 40)):
                assert torch.equal(call(rows), together[rows])
            for threads in (2, 3):
                torch.set_num_threads(threads)
                try:
                    assert torch.equal(call(slice(None)), together)
                finally:
                    torch.set_num_threads(1)


BYTES = [bytes([33 + token]) for token in range(VOCAB)]
PROMPTS = [np.random.default_rng(7 + n).integers(3, VOCAB, n).tolist() for n in (1, 5, 17, 40)]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=24, ignore_eos=True),
}


@functools.cache
def target_of(kind: str) -> TargetModel:
    return TargetModel(made(kind))


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mixtral", "deepseek", *OTHERS])
def test_texts_are_the_same_alone_together_and_drafted(kind, name):
    target = target_of(kind)
    options = {
        "tokenizer": None,
        "token_bytes": BYTES,
        "page_size": 4,
        "max_context": 128,
        "adaptive": False,
        "lookup": False,
    }

    def ids(llm, prompts, **more):
        outputs = llm.generate(prompts, PARAMS[name], **more)
        assert [output.error for output in outputs] == [None] * len(outputs)
        return [output.token_ids for output in outputs]

    with LLM.from_parts(target, None, max_running=1, **options) as llm:
        alone = [ids(llm, [prompt])[0] for prompt in PROMPTS]
    draft = Knowing(target)
    draft.texts = [prompt + text for prompt, text in zip(PROMPTS, alone, strict=True)]
    with LLM.from_parts(target, draft, max_running=4, max_batch_tokens=24, **options) as llm:
        assert ids(llm, PROMPTS, draft=False) == alone
        assert ids(llm, PROMPTS) == alone
        assert llm.stats()["tau"] > 1.4
    if name == "greedy":
        model = made(kind)
        for prompt, text in zip(PROMPTS, alone, strict=True):
            given = torch.tensor([prompt])
            with torch.inference_mode():
                own = model.generate(
                    given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, min_new_tokens=24,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            assert own[0, len(prompt) :].tolist() == text


@pytest.mark.parametrize("kind", ["qwen2", "experts"])
def test_in_bfloat16_the_models_own_router_chooses(kind):
    target = TargetModel(made(kind).bfloat16())
    assert target.experts.layers == LAYERS[kind]
    assert all(type(part).__name__.endswith("Experts") for part, _ in target.experts._forwards)
    got = logits(target, TOKENS).float()
    target.experts.undo()
    own = logits(target, TOKENS).float()
    # Rows whose experts rounding changes are others altogether; most are not.
    errors = (got - own).norm(dim=-1) / own.norm(dim=-1)
    assert float(errors.median()) < 0.1


def with_hook(model):
    for part in model.modules():
        if type(part).__name__ == "Qwen3MoeExperts":
            part.register_forward_hook(lambda *_: None)
    return model


def with_bias(model):
    for part in model.modules():
        if type(part).__name__ == "Qwen3MoeExperts":
            part.register_parameter("gate_up_proj_bias", torch.nn.Parameter(torch.zeros(8, 48)))
    return model


UNFIT = {
    "activation": (lambda: made("qwen3", hidden_act="mish"), "Qwen3MoeExperts: act_fn is MishActivation"),
    "another gelu": (lambda: made("qwen3", hidden_act="quick_gelu"), "Qwen3MoeExperts: act_fn is QuickGELUActivation"),
    "half": (lambda: made("qwen3").half(), "Qwen3MoeExperts: weights are torch.float16"),
    "hook": (lambda: with_hook(made("qwen3")), "Qwen3MoeExperts has hooks"),
    "bias": (lambda: with_bias(made("qwen3")), "Qwen3MoeExperts has down_proj, gate_up_proj, gate_up_proj_bias"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_experts_of_another_kind_run_as_before_and_it_is_said_why(case):
    make, reason = UNFIT[case]
    target = TargetModel(make())
    assert target.experts is None
    with torch.inference_mode():
        found = HostExperts(make())
    assert found.layers == 0 and len(found.against) == 1 and found.against[0].startswith(reason)


def test_a_class_with_a_gate_of_its_own_runs_as_before(monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def clamped(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=0.1)) * up

    monkeypatch.setattr(Qwen3MoeExperts, "_apply_gate", clamped)
    with torch.inference_mode():
        assert HostExperts(made("qwen3")).against == ["Qwen3MoeExperts has a gate of its own"]


def test_a_clamp_counts_although_rows_of_the_comparison_may_not_reach_it(monkeypatch):
    """gpt-oss cuts at 7, where rows of random numbers hardly are; the gate is looked at for itself."""
    with torch.inference_mode():
        [experts, *_] = [part for part in made("gpt-oss").modules() if type(part).__name__ == "GptOssExperts"]
        assert module._between(experts) == module._Between("silu", clamped=(1.702, 1.5))
        experts.limit = 7.0
        assert module._between(experts) == module._Between("silu", clamped=(1.702, 7.0))
        monkeypatch.setattr(type(experts), "_apply_gate", lambda self, both: both[..., ::2] * both[..., 1::2].sigmoid())
        assert module._between(experts) is None


def test_a_router_whose_logits_are_wanted_stays_the_models_own():
    target = TargetModel(made("qwen3", output_router_logits=True))
    assert {type(part).__name__ for part, _ in target.experts._forwards} == {"Qwen3MoeExperts"}


@pytest.mark.parametrize("normalised", [True, False])
def test_weights_are_divided_by_their_sum_where_the_model_says_so(normalised):
    options = {"norm_topk_prob": normalised}
    target = TargetModel(made("qwen3", **options))
    assert {type(part).__name__ for part, _ in target.experts._forwards} == {"Qwen3MoeSparseMoeBlock"}
    with torch.inference_mode():
        expected = made("qwen3", **options)(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(target, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_differs_from_its_modules_is_left_to_them(monkeypatch):
    real = module._Layer.routed
    monkeypatch.setattr(module._Layer, "routed", lambda self, x: real(self, x) * 1.001)
    with torch.inference_mode():
        found = HostExperts(made("qwen3"))
    assert found.layers == 0 and found.against == ["Qwen3MoeExperts differs from its own forward"]


@pytest.mark.parametrize("large", [False, True])
def test_a_model_that_differs_with_them_is_run_without_them_or_refused(monkeypatch, large):
    real = module._Layer.routed
    monkeypatch.setattr(module._Layer, "routed", lambda self, x: real(self, x) * 1.1)
    monkeypatch.setattr(module, "_as_before", lambda *_: True)
    if large:
        monkeypatch.setattr(module, "_COPY_LIMIT", 0)
        with pytest.raises(UnsupportedModel, match="experts in one call.*differs from the model's own"):
            TargetModel(made("qwen3"))
        return
    target = TargetModel(made("qwen3"))
    assert target.experts is None
    with torch.inference_mode():
        expected = made("qwen3")(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(target, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek"])
def test_large_layers_give_their_own_weights_up(monkeypatch, kind):
    expected = logits(target_of(kind), TOKENS)
    assert all(part.numel() for name, part in target_of(kind).model.named_parameters() if "experts" in name)
    monkeypatch.setattr(module, "_COPY_LIMIT", 0)
    target = TargetModel(made(kind))
    assert target.experts.given_up and target.experts.layers == LAYERS[kind]
    held = [
        part.numel()
        for name, part in target.model.named_parameters()
        if name.endswith(("gate_up_proj", "experts.down_proj"))
    ]
    assert held == [0] * (2 * LAYERS[kind])
    assert torch.equal(logits(target, TOKENS), expected)
    with pytest.raises(AssertionError):
        target.experts.undo()


def place(x: np.ndarray) -> tuple[int, int, int]:
    return x.ctypes.data, x.strides[0] // x.itemsize, x.strides[1] // x.itemsize


def test_what_does_not_fit_is_refused_by_name():
    f32 = np.float32
    gate_up, down, x, out = (
        np.ones((2, 8, 6), f32),
        np.ones((2, 6, 4), f32),
        np.ones((3, 6), f32),
        np.zeros((3, 6), f32),
    )
    layer = _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32")
    assert layer.bytes == 2 * 2 * (6 * 32 + 4 * 32)
    ids, weights = np.zeros((3, 1), np.int64), np.ones((3, 1), f32)
    layer.run(place(x), 3, place(out), ids, weights)
    silu = 6 / (1 + np.exp(-6.0))
    np.testing.assert_allclose(out, 4 * silu * 6, rtol=1e-5)
    refused = [
        (lambda: layer.run(place(x), 3, place(out)), "experts: got no router, expected experts with a router"),
        (lambda: layer.run(place(x), 3, place(out), ids), "weights: got one of indices and weights, expected both or neither"),
        (lambda: layer.run(place(x), 2, place(out), ids, weights), r"indices: got shape \[3, 1\], expected shape \[2, 1\]"),
        (lambda: layer.run(place(x), 3, place(x), ids, weights), "out: .*x"),
        (lambda: layer.run(place(x), 3, place(out), ids + 3, weights), "indices: got 3, expected 0..2, or 2 for none"),
        (lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float16"), "dtype: got float16, expected 'float32' or 'bfloat16'"),
        (lambda: _core.Experts(place(gate_up[:, ::2]), place(down), 2, 6, 2, "float32"), "gate_up: got an array with gaps"),
        (
            lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", router=np.ones((2, 6), f32), top_k=3),
            r"top_k: got 3, expected 1..=2",
        ),
        (lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", activation="tanh"), "activation: got tanh, expected 'silu', 'gelu'"),
        (
            lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", activation="gelu", clamped=(1.0, 1.0)),
            "clamped: got numbers with activation \"gelu\", gated true, expected None, or 'silu' with a gate",
        ),
        (lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", clamped=(1.0, -1.0)), r"clamped: got \(1, -1\), expected a finite alpha"),
        (lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", clamped=3), r"clamped: got 3, expected \(alpha, limit\)"),
        (
            lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", gate_up_bias=np.ones((2, 8), f32)),
            "down_bias: got one of gate_up_bias and down_bias, expected both or neither",
        ),
        (
            lambda: _core.Experts(
                place(gate_up), place(down), 2, 6, 4, "float32", gate_up_bias=np.ones((2, 4), f32), down_bias=np.ones((2, 6), f32)
            ),
            r"gate_up_bias: got shape \[2, 4\], expected shape \[2, 8\]",
        ),
        (
            lambda: _core.Experts(place(gate_up), place(down), 2, 6, 4, "float32", shared_gate=np.ones(6, f32)),
            "shared_gate: got some of router, shared_gate_up",
        ),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(InvalidArgument, match=message):
            call()

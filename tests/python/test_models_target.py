"""The target adapter against the model's own forward."""

import numpy as np
import pytest
import torch
from models_helpers import VOCAB, Pages, qwen3_target, randomise

from dflash_rs.errors import InvalidArgument, UnsupportedModel
from dflash_rs.models.target import TargetModel


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=256, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config), 3)


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, sliding_window=5,
    )  # fmt: skip
    return randomise(MistralForCausalLM(config), 4)


def qwen2_partly_sliding():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    return randomise(Qwen2ForCausalLM(config), 5)


def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    return randomise(GPTNeoXForCausalLM(config), 6)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=256)
    return randomise(GPT2LMHeadModel(config), 7, std=0.1)


def qwen3_llama3_rope():
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return qwen3_target(8, rope_parameters=rope, tie_word_embeddings=True)


def phimoe_whose_window_is_in_the_mask_only():
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=256, sliding_window=7,
    )  # fmt: skip
    return randomise(PhimoeForCausalLM(config), 9, std=0.15)


def gemma2_with_soft_caps():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, sliding_window=6, attn_logit_softcapping=3.0, query_pre_attn_scalar=4,
    )  # fmt: skip
    return randomise(Gemma2ForCausalLM(config), 10)


def gpt_oss_with_sinks():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return randomise(GptOssForCausalLM(config), 11)


def gemma4_with_experts():
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, sliding_window=6, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return randomise(Gemma4ForCausalLM(config), 12)


FAMILIES = [
    qwen3_target, qwen3_llama3_rope, llama, mistral, qwen2_partly_sliding, gpt_neox, gpt2, phimoe_whose_window_is_in_the_mask_only,
    gemma2_with_soft_caps, gpt_oss_with_sinks, gemma4_with_experts,
]  # fmt: skip
FUSED = {qwen3_target, qwen3_llama3_rope, llama, mistral, qwen2_partly_sliding}


def own_forward(make, sequences, layer_ids=()):
    """Logits and tapped layer outputs of the untouched model, one sequence at a time."""
    model = make().eval()
    results = []
    with torch.inference_mode():
        for tokens in sequences:
            out = model(torch.tensor(tokens)[None], use_cache=False, output_hidden_states=True)
            taps = [out.hidden_states[k + 1][0] for k in layer_ids]
            results.append((out.logits[0], torch.cat(taps, -1) if taps else None))
    return results


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_ragged_chunked_batches_give_the_models_own_logits_and_features(make, page_size, fused):
    rng = np.random.default_rng(11)
    sequences = [rng.integers(0, VOCAB, n).tolist() for n in (37, 5, 18)]
    taps = (0, 1)
    expected = own_forward(make, sequences, taps)
    target = TargetModel(make(), fused=fused)
    assert target.path == ("fused" if fused and make in FUSED else "modules")
    target.set_taps(taps)
    pages = Pages(3, 40, page_size)
    target.alloc_kv(pages.num_slots)
    logits, features = [[], [], []], [[], [], []]
    # Prefill chunks, single decode rows and blocks of several requests share the steps.
    for step in ([(0, 0, 16), (1, 0, 2)], [(0, 16, 30), (2, 0, 10), (1, 2, 3)], [(2, 10, 18), (0, 30, 37), (1, 3, 5)]):
        batch = pages.batch([(r, a, sequences[r][a:b]) for r, a, b in step])
        got_logits, got_features = target.forward(batch)
        for (r, _, _), start, end in zip(step, batch.query_starts[:-1], batch.query_starts[1:], strict=True):
            logits[r].append(got_logits[start:end])
            features[r].append(got_features[start:end])
    for r, (want_logits, want_features) in enumerate(expected):
        torch.testing.assert_close(torch.cat(logits[r]), want_logits, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(torch.cat(features[r]), want_features, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_is_as_close_to_the_exact_logits_as_the_models_own_forward(fused):
    tokens = list(range(2, 30))
    model = qwen3_target().to(torch.bfloat16)
    exact = qwen3_target()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        own = model(torch.tensor(tokens)[None], use_cache=False).logits[0].float()
        exact = exact(torch.tensor(tokens)[None], use_cache=False).logits[0]
    target = TargetModel(qwen3_target().to(torch.bfloat16), fused=fused)
    assert target.path == ("fused" if fused else "modules")
    pages = Pages(1, 32, 4)
    target.alloc_kv(pages.num_slots)
    logits, features = target.forward(pages.batch([(0, 0, tokens)]))
    assert features is None
    assert float((logits.float() - exact).norm()) <= 1.25 * float((own - exact).norm())


@pytest.mark.parametrize("make", [qwen3_target, gpt_neox], ids=lambda make: make.__name__)
def test_only_the_asked_rows_reach_the_head(make):
    tokens = list(range(10))
    [(expected, _)] = own_forward(make, [tokens])
    target = TargetModel(make())
    pages = Pages(1, 16, 4)
    target.alloc_kv(pages.num_slots)
    logits, _ = target.forward(pages.batch([(0, 0, tokens)], logit_rows=[9, 3]))
    torch.testing.assert_close(logits, expected[[9, 3]], atol=2e-4, rtol=2e-4)


def test_a_rejected_tail_leaves_no_trace_once_its_slots_are_written_again():
    tokens = list(range(20, 40))
    [(expected, _)] = own_forward(qwen3_target, [tokens])
    target = TargetModel(qwen3_target())
    pages = Pages(1, 32, 4)
    target.alloc_kv(pages.num_slots)
    target.forward(pages.batch([(0, 0, tokens[:10])]))
    target.forward(pages.batch([(0, 10, [3, 3, 3, 3, 3])]))
    logits, _ = target.forward(pages.batch([(0, 10, tokens[10:])]))
    torch.testing.assert_close(logits, expected[10:], atol=2e-4, rtol=2e-4)


def test_bytes_per_token_count_both_kinds_in_every_layer():
    assert TargetModel(qwen3_target()).kv_bytes_per_token == 6 * 2 * 2 * 16 * 4


def test_the_last_layer_and_layers_out_of_range_cannot_be_tapped():
    target = TargetModel(qwen3_target())
    for layer in (5, 6, -1):
        with pytest.raises(InvalidArgument, match=f"target_layer_ids: got {layer}, expected 0..4"):
            target.set_taps([layer])


@pytest.mark.parametrize("fused", [True, False])
def test_twins_share_weights_and_nothing_else(fused):
    texts = ([5, 9, 3, 40, 7], [8, 1, 22, 6, 30])
    own = TargetModel(qwen3_target(), fused=fused)
    twin = own.twin()
    assert twin.path == own.path and twin.embedding.weight is own.embedding.weight
    pages = Pages(1, 12, 4)
    found = []
    for target, taps in ((own, (1,)), (twin, (0, 3))):
        target.set_taps(taps)
        target.alloc_kv(pages.num_slots)
    for start, end in ((0, 3), (3, 5)):  # in turns, over the same slots
        found.append([t.forward(pages.batch([(0, start, text[start:end])])) for t, text in zip((own, twin), texts)])
    for i, taps in enumerate(((1,), (0, 3))):
        alone = TargetModel(qwen3_target(), fused=fused)
        alone.set_taps(taps)
        alone.alloc_kv(pages.num_slots)
        for (start, end), step in zip(((0, 3), (3, 5)), found):
            want = alone.forward(pages.batch([(0, start, texts[i][start:end])]))
            assert torch.equal(step[i][0], want[0]) and torch.equal(step[i][1], want[1])
    twin.free()
    assert own.num_slots == pages.num_slots and own.caches


def test_a_target_with_state_has_no_twin():
    target = TargetModel(qwen3_target())
    target.state = object()
    with pytest.raises(UnsupportedModel, match="keeps state beside pages"):
        target.twin()


def test_a_forward_without_a_cache_says_what_to_call():
    target = TargetModel(qwen3_target())
    with pytest.raises(InvalidArgument, match="alloc_kv"):
        target.forward(Pages(1, 8, 4).batch([(0, 0, [1, 2])]))


def test_models_with_state_outside_pages_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaForCausalLM

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        TargetModel(t5)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModel):
        TargetModel(mamba)


def test_layers_that_share_keys_are_refused():
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="num_kv_shared_layers = 2"):
        TargetModel(Gemma4ForCausalLM(config))


def test_rope_that_depends_on_the_batch_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="rope_type: got 'dynamic'"):
        TargetModel(qwen3_target(rope_parameters=rope))


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_forward_that_disagrees_with_the_model_is_refused(monkeypatch, factor):
    """The self-check is what guards an architecture whose attention does more than it passes on."""
    import dflash_rs.models.target.probe as module

    real = module.Step.attend_layer
    monkeypatch.setattr(module.Step, "attend_layer", lambda self, *args: real(self, *args) * factor)
    with pytest.raises(UnsupportedModel, match="differs from the model's own"):
        TargetModel(gpt_neox())


def test_a_window_that_the_mask_does_not_share_is_refused():
    model = qwen2_partly_sliding()
    model.model.layers[3].self_attn.sliding_window = 3
    with pytest.raises(UnsupportedModel, match="sliding_window is 3, but its mask has 4"):
        TargetModel(model)


def test_a_mask_that_a_layer_made_itself_is_refused(monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    real = Qwen2Attention.forward

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        mask = None if attention_mask is None else attention_mask & True
        return real(self, hidden_states, position_embeddings, mask, **kwargs)

    monkeypatch.setattr(Qwen2Attention, "forward", forward)
    with pytest.raises(
        UnsupportedModel, match="Qwen2Attention: attention gets a mask that the layer or the model made"
    ):
        TargetModel(qwen2_partly_sliding())


@pytest.mark.parametrize("limit", [100, 131072])
def test_windows_of_masks_are_found_at_any_length(limit):
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    from dflash_rs.models.target.probe import Recorder

    def window(function):
        recorder = Recorder(limit)
        found = recorder.mask(mask_function=function, batch_size=1, q_length=4, kv_length=4, device="cpu")
        assert torch.equal(found[0, 0], function(0, 0, torch.arange(4)[:, None], torch.arange(4)))
        return recorder._masks[0][2]

    assert window(causal_mask_function) is None
    for width in (1, 2, 3, 50, 99):
        assert window(sliding_window_causal_mask_function(width)) == width
    assert window(sliding_window_causal_mask_function(limit)) is None, "it never binds"


def test_masks_that_are_no_causal_windows_are_refused():
    from transformers.masking_utils import chunked_causal_mask_function

    from dflash_rs.models.target.probe import Recorder

    masks = {
        "chunks": chunked_causal_mask_function(4096, torch.zeros(1, dtype=torch.int64)),
        "both ways": lambda b, h, q, k: (k >= 0) & (q >= 0),
        "every other": lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
        "a prefix for all": lambda b, h, q, k: (k <= q) | (k < 2),
    }
    for function in masks.values():
        recorder = Recorder(8192)
        mask = recorder.mask(mask_function=function, batch_size=1, q_length=4, kv_length=4, device="cpu")
        # Once a layer gets it: a model may make masks that none of its layers does.
        with pytest.raises(UnsupportedModel, match="its attention mask lets position"):
            recorder._window_of(mask, None, "Attention")
    tokens = torch.zeros(1, 4)
    with pytest.raises(UnsupportedModel, match="depends on more than positions"):
        Recorder(8192).mask(
            mask_function=lambda b, h, q, k: (k <= q) & (tokens[b, k] == 0),
            batch_size=1,
            q_length=4,
            kv_length=4,
            device="cpu",
        )


def test_a_rotation_that_changes_with_the_longest_request_is_seen_without_such_a_request(monkeypatch):
    import dflash_rs.models.target.probe as module

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    }  # fmt: skip
    with pytest.raises(UnsupportedModel, match="rope_type: got 'longrope'"):
        TargetModel(qwen3_target(rope_parameters=rope))
    monkeypatch.setattr(module, "STATIC_ROPE", ("default", "longrope"))
    with pytest.raises(UnsupportedModel, match="differs from the model's own"):
        TargetModel(qwen3_target(rope_parameters=rope))


def test_a_scale_that_changes_with_what_a_cache_holds_is_seen_without_filling_one(monkeypatch):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    real = Qwen3Attention.forward

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        long = past_key_values is not None and past_key_values.get_seq_length() > 200
        return real(self, hidden_states * (1.5 if long else 1.0), *args, past_key_values=past_key_values, **kwargs)

    assert TargetModel(qwen3_target()).path == "fused"
    monkeypatch.setattr(Qwen3Attention, "forward", forward)
    with pytest.raises(UnsupportedModel, match="differs from the model's own"):
        TargetModel(qwen3_target())


def qwen3_moe(seed: int):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    return randomise(Qwen3MoeForCausalLM(config), seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_that_rounding_chooses_are_no_error(dtype):
    for seed in range(8):
        assert TargetModel(qwen3_moe(seed).to(dtype)).path == "modules"


@pytest.mark.parametrize("fault", ["scale", "window", "positions", "keys"])
def test_faults_of_a_target_with_experts_in_bfloat16_are_seen(monkeypatch, fault):
    import dflash_rs.models.target.probe as module

    real, run = module.Step.attend_layer, TargetModel.run

    def attend(self, index, q, k, v, scale, *rest):
        if fault == "scale":
            scale *= 1.5
        elif fault == "window":
            self.windows = dict.fromkeys(self.windows, 2)
        elif fault == "keys":
            k = k.roll(1, dims=2)
        return real(self, index, q, k, v, scale, *rest)

    def shifted(self, token_ids, positions, *rest):
        return run(self, token_ids, positions // 2 if fault == "positions" else positions, *rest)

    monkeypatch.setattr(module.Step, "attend_layer", attend)
    monkeypatch.setattr(TargetModel, "run", shifted)
    with pytest.raises(UnsupportedModel, match="differs from the model's own"):
        TargetModel(qwen3_moe(0).to(torch.bfloat16))

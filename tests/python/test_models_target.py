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


FAMILIES = [qwen3_target, qwen3_llama3_rope, llama, mistral, qwen2_partly_sliding, gpt_neox, gpt2]
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


def test_softcapped_attention_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="attn_logit_softcapping"):
        TargetModel(Gemma2ForCausalLM(config))


def test_rope_that_depends_on_the_batch_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="rope_type 'dynamic'"):
        TargetModel(qwen3_target(rope_parameters=rope))


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_forward_that_disagrees_with_the_model_is_refused(monkeypatch, factor):
    """The self-check is what guards an architecture whose attention does more than it passes on."""
    import dflash_rs.models.target as module

    real = module._Step.attend_layer
    monkeypatch.setattr(module._Step, "attend_layer", lambda self, *args: real(self, *args) * factor)
    with pytest.raises(UnsupportedModel, match="differs from the model's own"):
        TargetModel(gpt_neox())

"""Training of a hybrid target, by itself and out of a plain one, and of its drafter: what is taken over, and texts with and without drafts."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs import LLM, SamplingParams  # noqa: E402
from dflash_rs.models.dflash import DFlashDraft  # noqa: E402
from dflash_rs.train import corpus, hybrid, responses  # noqa: E402
from dflash_rs.train import drafter as drafter_training  # noqa: E402
from dflash_rs.train import target as target_training  # noqa: E402
from dflash_rs.train.common import Optimizers  # noqa: E402
from dflash_rs.train.warm_start import scale_of, sources, warm_start  # noqa: E402

PLAIN = target_training.TargetTraining(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16,
    tokens=6 * 4 * 32, seq_len=32, batch_size=4, warmup_steps=2, max_position_embeddings=128,
)  # fmt: skip
HYBRID = replace(
    PLAIN, shape="qwen3_5_moe", num_layers=4, linear_key_heads=1, linear_value_heads=2, linear_head_dim=8, num_experts=4,
    expert_size=8, shared_expert_size=16, tokens=8 * 4 * 32,
)  # fmt: skip
DRAFT = drafter_training.DrafterTraining(
    taps="0,1,2", num_layers=1, block_size=4, train_block_sizes="4", steps=4, batch_size=4, anchors=6, seq_len=32
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("source")
    for i in range(60):
        body = "\n".join(f"    total_{j} = values[{j}] + {i * j}" for j in range(12))
        (root / f"module_{i}.py").write_text(f"import os\n\n\ndef work_{i}(values):\n{body}\n    return total_0\n")
    return root


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("plain")
    corpus.prepare(folder, [data], vocab_size=300, held_out_percent=20)
    target_training.train(PLAIN, folder, out, device="cpu")
    return out


@pytest.fixture(scope="module")
def prepared(data, plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid-corpus")
    corpus.prepare(out, [data], 300, 20, plain)
    return out


@pytest.fixture(scope="module")
def taught(prepared, plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid")
    settings = replace(HYBRID, teacher=str(plain), start_from=str(plain))
    target_training.train(settings, prepared, out, device="cpu", save_every=4)
    return out


def test_a_hybrid_and_its_drafter_are_trained_end_to_end_and_drafts_change_no_text(prepared, taught, tmp_path):
    own, out = tmp_path / "own", tmp_path / "draft"
    settings = responses.ResponseSettings(sequences=8, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    responses.generate(taught, responses.from_corpus(prepared), own, settings)
    report = drafter_training.train(DRAFT, taught, own, prepared, out, device="cpu")
    assert report["steps"] == DRAFT.steps
    prompts = ["def work_3(values):\n", "import os\n", "    total_1 = values"]
    with LLM(model=taught, draft=out, adaptive=False, max_context=96) as llm:
        assert llm._target.state is not None
        for temperature in (0.0, 0.8):
            params = [SamplingParams(temperature=temperature, seed=i, max_tokens=24, ignore_eos=True) for i in range(3)]
            drafted, plainly = llm.generate(prompts, params), llm.generate(prompts, params, draft=False)
            assert [o.token_ids for o in drafted] == [o.token_ids for o in plainly]
            assert all(o.metrics["steps"] < 24 for o in drafted) or temperature


def test_a_teacher_lowers_the_held_out_loss_and_the_tokenizer_is_its_own(prepared, plain, taught):
    import json

    history = json.loads((taught / "training.json").read_text())["report"]["history"]
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"] < 6
    assert (taught / "tokenizer.json").read_text() == (plain / "tokenizer.json").read_text()


def test_another_tokenizer_than_the_corpus_has_is_refused(data, prepared, plain, tmp_path):
    other = tmp_path / "other"
    corpus.prepare(other, [data], 280, 20)
    with pytest.raises(ValueError, match="has 280 entries, expected at most vocab_size=270"):
        corpus.prepare(tmp_path / "new", [data], 270, 20, other / "tokenizer")
    (data / "more.py").write_text("def qqqqq(zzzzz):\n    return zzzzz\n" * 50)
    corpus.prepare(tmp_path / "more", [data], 300, 20)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        corpus.prepare(tmp_path / "more", [data], 300, 20, plain)


def test_an_interrupted_hybrid_run_resumes_to_the_same_weights(prepared, plain, tmp_path, monkeypatch):
    settings = replace(HYBRID, tokens=4 * 4 * 32, teacher=str(plain))
    target_training.train(settings, prepared, tmp_path / "whole", device="cpu", save_every=2)
    save, loss = target_training.save_checkpoint, target_training.training_loss
    saved = []

    def stop(*given):
        if saved:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(target_training, "save_checkpoint", lambda *given: (save(*given), saved.append(1)))
    monkeypatch.setattr(target_training, "training_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        target_training.train(settings, prepared, tmp_path / "halves", device="cpu", save_every=2)
    monkeypatch.undo()
    target_training.train(settings, prepared, tmp_path / "halves", device="cpu", save_every=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert weights[0] == weights[1]


def test_what_is_taken_over_of_a_plain_target_does_what_it_did_there():
    # All experts are chosen, routers and gates say nothing: what is left is the plain MLP.
    settings = replace(HYBRID, num_experts=2, expert_size=16, shared_expert_size=16)
    source, model = target_training.build(PLAIN, 4), target_training.build(settings, 4)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        hybrid.start_from(model, source)
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.shared_expert_gate.weight.zero_()
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    hidden = torch.randn(1, 1, 32)
    angles = source.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
    for i, (own, given) in enumerate(zip(model.model.layers, source.model.layers, strict=True)):
        assert torch.allclose(own.input_layernorm(hidden), given.input_layernorm(hidden), atol=1e-5)
        assert torch.allclose(own.mlp(hidden), given.mlp(hidden), atol=1e-4)
        if i == 3:
            found = own.self_attn(hidden, (angles[0][..., :4], angles[1][..., :4]), None)[0]
            assert torch.allclose(found, given.self_attn(hidden, angles, None)[0], atol=1e-4)
    with pytest.raises(ValueError, match="start_from: hidden_size: got a model with 32, expected 64"):
        hybrid.start_from(target_training.build(replace(settings, hidden_size=64), 4), source)


def test_a_drafter_begins_from_the_layers_that_attend_with_gates_and_experts_as_they_are_on_average(capsys):
    settings = replace(HYBRID, num_layers=8, num_experts=2, expert_size=16)
    model = target_training.build(settings, 8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.shared_expert_gate.weight.zero_()
            layer.input_layernorm.weight.fill_(0.5)
            if hasattr(layer, "self_attn"):
                layer.self_attn.q_proj.weight.view(2, 2, 16, 32)[:, 1] = 0
    draft = DFlashDraft(drafter_training.draft_config(model.config, replace(DRAFT, num_layers=3, intermediate_size=48)))
    assert "partial_rotary_factor" not in draft.config.rope_parameters
    warm_start(draft, model, torch.randint(2, 300, (2, 16)))
    assert sources(model, 3) == [3, 3, 7] and "begins from layers 3, 3, 7 of the target" in capsys.readouterr().err
    hidden = torch.randn(1, 5, 32)
    for own, index in zip(draft.layers, (3, 3, 7), strict=True):
        given = model.model.layers[index]
        query = given.self_attn.q_proj.weight.view(2, 2, 16, 32)[:, 0].flatten(0, 1)
        assert torch.equal(own.self_attn.q_proj.weight, query)
        assert torch.allclose(own.self_attn.o_proj.weight, given.self_attn.o_proj.weight / 2)
        assert torch.allclose(own.mlp(hidden), given.mlp(hidden), atol=1e-5)
        assert float(own.input_layernorm.weight.detach().mean()) == pytest.approx(1.5)
    # Fewer units than there are: the heaviest ones. More: what is too much begins as nothing.
    for size in (20, 60):
        other = DFlashDraft(drafter_training.draft_config(model.config, replace(DRAFT, intermediate_size=size)))
        warm_start(other, model, torch.randint(2, 300, (2, 16)))
        found, expected = other.layers[0].mlp(hidden), model.model.layers[7].mlp(hidden)
        assert torch.allclose(found, expected, atol=1e-5) == (size == 60)
    assert drafter_training.draft_config(model.config, DRAFT).intermediate_size == 16 + 2 * 16


def test_the_scale_of_a_norm_is_what_it_multiplies_by():
    model = target_training.build(HYBRID, 4)
    norms = (model.model.norm, target_training.build(PLAIN, 2).model.norm, torch.nn.LayerNorm(32))
    for norm, more in zip(norms, (1, 0, 0), strict=True):
        weight = torch.rand(32)
        with torch.no_grad():
            norm.weight.copy_(weight)
        assert torch.allclose(scale_of(norm), weight + more, atol=1e-4)


def test_the_matrices_of_experts_are_moved_as_matrices_of_their_own():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 6)
    together, alone = torch.nn.Module(), torch.nn.Module()
    together.experts = torch.nn.Parameter(stack.clone())
    for i in range(3):
        alone.register_parameter(f"expert_{i}", torch.nn.Parameter(stack[i].clone()))
    found = [Optimizers(module, 1e-2, 0.0, ()) for module in (together, alone)]
    for _ in range(3):
        gradient = torch.randn(3, 8, 6)
        together.experts.grad = gradient.clone()
        for parameter, part in zip(alone.parameters(), gradient, strict=True):
            parameter.grad = part.clone()
        for optimizers in found:
            optimizers.step(1.0)
    assert torch.equal(together.experts, torch.stack(list(alone.parameters()))) and not torch.equal(
        together.experts, stack
    )


def test_imbalance_is_one_where_experts_are_used_alike_and_grows_to_their_number():
    even, all_to_one = 5 * torch.eye(4).repeat(8, 1), torch.tensor([[50.0, 0, 0, 0]]).repeat(32, 1)
    assert float(hybrid.imbalance((even, even), 1)) == pytest.approx(1)
    assert float(hybrid.imbalance((all_to_one,), 1)) == pytest.approx(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "mamba"}, "shape: got 'mamba', expected qwen3 or qwen3_5_moe"),
        ({"start_layers": 2}, "start_layers: got 2, expected 0"),
        ({"num_layers": 3}, "num_layers: got 3, expected at least 4"),
        ({"experts_per_token": 5}, r"experts_per_token: got 5, expected 1\.\.4"),
        ({"linear_key_heads": 4}, "linear_value_heads: got 2, expected a multiple"),
        ({"balance": -1.0}, "balance: got -1.0"),
        ({"teacher_share": 2.0}, "teacher_share: got 2.0"),
        ({"start_from": "a", "init_from": "b"}, "start_from: got 'a' beside"),
        ({"start_from": "a", "shape": "qwen3"}, "start_from: got 'a' with shape='qwen3'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HYBRID, **change).check()

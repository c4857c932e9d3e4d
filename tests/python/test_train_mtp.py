"""Training of MTP heads: runs that resume to the same weights, checkpoints that the engine loads, labels in their places."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_helpers import randomise  # noqa: E402
from test_train import data, interrupted, own, same, target, weights  # noqa: E402, F401

from dflash_rs.train import mtp as mtp_training  # noqa: E402
from dflash_rs.train.drafter import Batch, Teacher  # noqa: E402

TINY = mtp_training.MtpTraining(block_size=4, steps=6, batch_size=4, anchors=6, seq_len=32)


def test_an_interrupted_run_resumes_to_the_same_weights(data, target, own, tmp_path, monkeypatch):  # noqa: F811
    def run(name):
        return mtp_training.train(TINY, target, own, data, tmp_path / name, device="cpu", save_every=3)

    run("whole")
    interrupted(monkeypatch, lambda: run("cut"))
    run("cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    with pytest.raises(ValueError, match="other settings"):
        mtp_training.train(replace(TINY, seed=9), target, own, data, tmp_path / "cut", device="cpu")


def test_a_trained_head_drafts_and_its_loss_falls(data, target, own, tmp_path):  # noqa: F811
    from dflash_rs import LLM, SamplingParams

    settings = replace(TINY, steps=60)
    report = mtp_training.train(settings, target, own, None, tmp_path, device="cpu", save_every=20)
    losses = [entry["loss"] for entry in report["history"]]
    assert losses[-1] < losses[0]
    with LLM(model=target, draft=tmp_path, device="cpu", adaptive=False) as llm:
        assert llm.draft_kind == "mtp" and llm.block_size == 4
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        output = llm.generate([[5, 6, 7]], params)[0]
        assert output.token_ids == llm.generate([[5, 6, 7]], params, draft=False)[0].token_ids


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_head_begins_as_the_last_layer_of_its_target(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)), 3)
    draft = mtp_training.begin(model, TINY, torch.zeros(1, 4, dtype=torch.int64))
    source, own_layer = model.model.layers[-1].state_dict(), draft.layers[0].state_dict()
    assert draft.config.qk_norm == (family == "qwen3") and draft.config.attention_bias == (family == "qwen2")
    for name, value in own_layer.items():
        expected = source.get(name, torch.zeros_like(value))
        assert torch.equal(value, expected), name
    assert torch.equal(draft.norm.weight, model.model.norm.weight)
    assert draft.config.num_target_layers == 3 and draft.config.block_size == 4


def test_a_target_of_another_form_cannot_be_begun_from():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(ValueError, match=r"target: GPT2LMHeadModel has no model\.layers"):
        mtp_training.begin(model, TINY, torch.zeros(1, 4, dtype=torch.int64))


def test_the_soft_loss_is_the_expectation_of_the_hard_one(target):  # noqa: F811
    """Averaged over the target's own law of a step's token, the cross-entropy on tokens is the cross-entropy with the law."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    settings = replace(TINY, block_size=3)
    torch.manual_seed(0)
    draft = mtp_training.begin(model, settings, torch.zeros(1, 4, dtype=torch.int64))
    draft.bind_target(model.get_input_embeddings(), model.get_output_embeddings())
    teacher = Teacher(model, (), None)
    tokens, anchors = torch.randint(2, 300, (1, 20)), torch.tensor([[11]])

    def loss(share: float) -> torch.Tensor:
        return mtp_training.head_loss(
            draft, teacher, Batch.whole(tokens, anchors, 3), replace(settings, soft_labels=share)
        )[0]

    # The last step's token is an input of nothing.
    soft, hard = loss(1.0), torch.zeros(())
    first = teacher.logits(teacher(tokens)[1])[0, 11].softmax(-1)
    second = teacher.logits(teacher(tokens)[1])[0, 12].softmax(-1)
    weight = torch.tensor([1.0, 1.0]).mul(torch.exp(-torch.arange(2) / settings.gamma))
    with torch.no_grad():
        rows = mtp_training_rows(draft, teacher, tokens, anchors)
        logs = teacher.logits(rows).log_softmax(-1)
        hard = -(first @ logs[0] * weight[0] + second @ logs[1] * weight[1]) / weight.sum()
    torch.testing.assert_close(soft.detach(), hard, rtol=1e-4, atol=1e-5)
    token_loss = -(logs[0, tokens[0, 12]] * weight[0] + logs[1, tokens[0, 13]] * weight[1]) / weight.sum()
    torch.testing.assert_close(loss(0.0).detach(), token_loss, rtol=1e-4, atol=1e-5)


def mtp_training_rows(draft, teacher, tokens, anchors):
    from dflash_rs.models.mtp import unrolled_hidden

    return unrolled_hidden(draft, teacher(tokens)[1], tokens, anchors, 2)[0, 0]


def test_documents_in_one_row_do_not_see_each_other(target):  # noqa: F811
    from transformers import AutoModelForCausalLM

    from dflash_rs.models.mtp import unrolled_hidden

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draft = mtp_training.begin(model, TINY, torch.zeros(1, 4, dtype=torch.int64))
    draft.bind_target(model.get_input_embeddings(), model.get_output_embeddings())
    teacher = Teacher(model, (), None)
    tokens = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    position = torch.cat((torch.arange(10), torch.arange(14)))[None]
    document = (torch.arange(24) >= 10).long()[None]
    with torch.no_grad():
        _, last = teacher(tokens, position)
        together = unrolled_hidden(draft, last, tokens, torch.tensor([[4, 10, 15]]), 3, document, position)[0]
        alone = unrolled_hidden(draft, teacher(tokens[:, 10:])[1], tokens[:, 10:], torch.tensor([[0, 5]]), 3)[0]
        first = unrolled_hidden(draft, teacher(tokens[:, :10])[1], tokens[:, :10], torch.tensor([[4]]), 3)[0]
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[:1], first, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size: got 1"),
        ({"anchors": 0}, "anchors: got 0"),
        ({"gamma": 0.0}, "gamma: got 0.0"),
        ({"soft_labels": 1.5}, "soft_labels: got 1.5, expected a share"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change).check(4, 300)

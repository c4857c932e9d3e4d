"""Training of a DFlash 2: what its selector learns, what it goes on from, that its checkpoints draft what training says."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_train import TINY_DRAFT, data, interrupted, own, same, target, weights  # noqa: E402, F401

from dflash_rs.models.dflash2 import DFlash2Draft  # noqa: E402
from dflash_rs.models.loader import load_draft  # noqa: E402
from dflash_rs.train import drafter as drafter_training  # noqa: E402
from dflash_rs.train.losses import Likeliest, selector_loss  # noqa: E402

SECOND = replace(TINY_DRAFT, selector_rank=8, selector_top_k=6, conv_group_size=8)


def test_it_trains_resumes_and_drafts_in_an_engine(data, target, own, tmp_path, monkeypatch):  # noqa: F811
    from dflash_rs import LLM, SamplingParams

    settings = replace(SECOND, steps=60, draft_vocab=200, sampled_vocab=20)

    def run(name):
        return drafter_training.train(settings, target, own, data, tmp_path / name, device="cpu", save_every=30)

    history = run("whole")["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    interrupted(monkeypatch, lambda: run("cut"))
    run("cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))

    draft = load_draft(tmp_path / "whole")
    assert isinstance(draft, DFlash2Draft) and draft.config.selector_rank == 8 and draft.config.conv_kernel_size == 2
    codebook, kernel = draft.candidate_selector.successor_codebook, draft.layers[0].mlp_conv.base_kernel
    assert float(codebook.detach().abs().max()) > 0 and float(kernel.detach()[:, 1].abs().max()) > 0
    with LLM(model=target, draft=tmp_path / "whole", device="cpu", adaptive=False, lookup=False) as llm:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        output = llm.generate([[5, 6, 7]], params)[0]
        assert output.token_ids == llm.generate([[5, 6, 7]], params, draft=False)[0].token_ids


@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_a_selector_learns_what_follows_what(soft):
    """Two slots whose rows are the same: only the token before tells which of two candidates comes."""
    torch.manual_seed(0)
    config = drafter_training.draft_config(_Shape(), replace(SECOND, selector_top_k=2))
    selector = DFlash2Draft(config).candidate_selector
    torch.nn.init.normal_(selector.predecessor_codebook)
    hidden, last = torch.randn(1, 32).repeat(2, 1), torch.tensor([3, 4])
    tokens = torch.tensor([[10, 11], [10, 11]])
    label = torch.tensor([[0.9, 0.1], [0.2, 0.7]]) if soft else torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    likeliest = Likeliest(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.0], [0.5, 0.0]]), label)
    weight = torch.tensor([1.0, 0.5])
    loss, taken = selector_loss(selector, hidden, last, likeliest, tokens, weight)
    at_first = -(label * likeliest.logits.log_softmax(-1)).sum(-1) @ weight
    assert float(loss.detach()) == pytest.approx(float(at_first)) and taken.tolist() == [0, 0]
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss, taken = selector_loss(selector, hidden, last, likeliest, tokens, weight)
        loss.backward()
        optimizer.step()
    law = selector.scores(selector.hidden_projection(hidden), last, tokens, likeliest.logits).softmax(-1)
    assert taken.tolist() == [0, 1]
    torch.testing.assert_close(law, label / label.sum(-1, keepdim=True), atol=0.05, rtol=0)


class _Shape:
    """The configuration of a tiny target, as far as a drafter's shape hangs on it."""

    hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size = 32, 2, 1, 16, 48
    vocab_size, num_hidden_layers, rms_norm_eps, max_position_embeddings = 300, 4, 1e-6, 128


@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_tau_of_training_is_that_of_a_chain_along_the_selectors_path(target, soft):  # noqa: F811
    from dflash_rs.models.checkpoint import load_causal_lm
    from dflash_rs.models.dflash.training import training_hidden

    model = load_causal_lm(target, torch.float32)[0]
    settings = replace(SECOND, soft_labels=soft)
    draft = DFlash2Draft(drafter_training.draft_config(model.config, settings))
    draft.bind_target(model.get_input_embeddings(), model.get_output_embeddings())
    teacher = drafter_training.Teacher(model, settings.tap_ids, settings.mask_token_id)
    generator, swayed = torch.Generator().manual_seed(4), 0
    with torch.no_grad():
        drafter_training.warm_start(draft, model, torch.randint(2, 300, (2, 20), generator=generator))
        draft.candidate_selector.successor_codebook.normal_(std=0.3, generator=generator)
    for right in [0, 1, 2, 3] * 5:
        tokens = torch.randint(2, 300, (1, 24), generator=generator)
        batch = drafter_training.Batch.whole(tokens, torch.tensor([[17]]), 4)
        features, _ = teacher.of(batch)
        with torch.no_grad():
            # A block does not see what comes behind its anchor.
            rows = training_hidden(draft, features, tokens, batch.anchors, 4)[:, 0, 1:]
            logits = teacher.logits(rows)
            path = draft.candidate_selector(rows, logits, tokens[:, 17], 1)[0][0, :, 0]
        swayed += int((path != logits.argmax(-1)[0]).any())
        tokens[0, 18:21] = (path + 1) % 290 + 2
        tokens[0, 18 : 18 + right] = path[:right]
        _, tau = drafter_training.block_loss(draft, teacher, batch, settings)
        assert tau == 1 + right
    assert swayed > 5, "the selector changed what is drafted"


def test_a_share_of_a_batch_that_teaches_nothing_has_a_gradient_for_every_weight(target):  # noqa: F811
    """Processes that share a batch average what they have, so each has to have all of it."""
    from dflash_rs.models.checkpoint import load_causal_lm

    model = load_causal_lm(target, torch.float32)[0]
    draft = DFlash2Draft(drafter_training.draft_config(model.config, SECOND))
    draft.bind_target(model.get_input_embeddings(), model.get_output_embeddings())
    teacher = drafter_training.Teacher(model, SECOND.tap_ids, SECOND.mask_token_id)
    batch = drafter_training.Batch.whole(torch.randint(2, 300, (1, 24)), torch.tensor([[9]]), 4)
    loss, _ = drafter_training.block_loss(draft, teacher, batch._replace(own=torch.zeros_like(batch.own)), SECOND)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in draft.parameters())


def test_it_goes_on_from_a_dflash_and_drafts_as_that_did(data, target, own, tmp_path):  # noqa: F811
    drafter_training.train(TINY_DRAFT, target, own, data, tmp_path / "first", device="cpu", save_every=6)
    settings = replace(SECOND, init_from=str(tmp_path / "first"), steps=1, lr=1e-12)
    drafter_training.train(settings, target, own, data, tmp_path / "second", device="cpu", save_every=1)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first) and len(second) > len(first)
    assert float(second["candidate_selector.predecessor_codebook"].abs().max()) > 0
    # The other way something would be lost.
    with pytest.raises(ValueError, match="init_from: got a DFlash2DraftModel, expected a DFlashDraftModel"):
        drafter_training.train(
            replace(TINY_DRAFT, init_from=str(tmp_path / "second")), target, own, data, tmp_path / "third", device="cpu"
        )


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"selector_rank": -1}, "selector_rank: got -1, expected 0"),
        ({"selector_top_k": 1}, r"selector_top_k: got 1, expected 2\.\.299"),
        ({"selector_top_k": 90, "draft_vocab": 80}, r"selector_top_k: got 90, expected 2\.\.80"),
        ({"conv_kernel_size": 0}, "conv_kernel_size: got 0"),
        ({"conv_group_size": 7}, "conv_group_size: got 7, expected a divisor of the target's hidden_size 32"),
    ],
)
def test_a_setting_that_cannot_be_is_named(data, target, own, tmp_path, wrong, told):  # noqa: F811
    with pytest.raises(ValueError, match=told):
        drafter_training.train(replace(SECOND, **wrong), target, own, data, tmp_path, device="cpu")

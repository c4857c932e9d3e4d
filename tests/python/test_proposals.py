"""Drafting over a part of the target's vocabulary, and training for it."""

import json
import math

import numpy as np
import pytest
import torch
from models_helpers import HIDDEN, MASK, VOCAB, Pages, greedy_loop, qwen3_target, random_draft
from test_mtp import bound, random_mtp
from test_train_chats import documents, tiny_target

from dflash_rs.errors import CheckpointError, InvalidArgument
from dflash_rs.models import proposals
from dflash_rs.models.dflash import DFlashDraft
from dflash_rs.models.loader import describe_draft, load_draft, save_draft
from dflash_rs.models.target import TargetModel
from dflash_rs.train import drafter as drafter_training
from dflash_rs.train.settings import DrafterTraining, MtpTraining
from dflash_rs.train.vocabulary import Columns, Narrowed

SOME = torch.tensor([3, 4, 7, 20, 21, 40, 66, 90])


SECOND = {"conv_kernel_size": 4, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}


def drafter(kind: str):
    return random_mtp() if kind == "mtp" else random_draft(**(SECOND if kind == "dflash 2" else {}))


def candidates(draft, size=5, k=4, *, told=12, in_torch=False):
    """What it proposes for two requests after random features."""
    pages = Pages(2, 40, 4)
    draft.alloc_kv(pages.num_slots)
    if in_torch:
        draft.runtime.run = None
    generator = torch.Generator().manual_seed(9)
    width = len(draft.taps) * HIDDEN
    for row in range(2):
        places = np.arange(told)
        extra = {}
        if draft.reads_tokens:
            extra = {
                "token_ids": np.arange(told) + 2, "before": np.where(places > 0, pages.slots(row, np.maximum(places - 1, 0)), -1)
            }  # fmt: skip
        draft.inject(torch.randn(told, width, generator=generator), places, pages.slots(row, places), **extra)
    return draft.candidates([5, 9], np.array([told, told]), pages.table, page_size=4, block_size=size, k=k)


@pytest.mark.parametrize("kind", ["dflash", "dflash in torch", "mtp"])
def test_candidates_are_the_likeliest_of_the_part(kind):
    draft, in_torch = bound(drafter(kind)), kind == "dflash in torch"
    # Of every token, in falling order.
    everything, chances = candidates(draft, 2, VOCAB - 1, in_torch=in_torch)
    draft.vocabulary = SOME
    assert draft.branches == min(draft.config.branches, len(SOME))
    tokens, narrowed = candidates(draft, 2, 4, in_torch=in_torch)
    for r in range(2):
        inside = [(t, p) for t, p in zip(everything[r, 0], chances[r, 0], strict=True) if t in SOME]
        assert tokens[r, 0].tolist() == [t for t, _ in inside[:4]]
        share = sum(p for _, p in inside)
        np.testing.assert_allclose(narrowed[r, 0], [p / share for _, p in inside[:4]], rtol=1e-4)


@pytest.mark.parametrize("kind", ["dflash", "dflash 2", "mtp"])
def test_a_chain_goes_on_from_the_tokens_of_the_part(kind):
    """Every place of a longer block, not the first alone: an MTP head is fed with what it proposed."""
    draft = bound(drafter(kind))
    everything, whole = candidates(draft, k=1)
    # All but one that is not drafted anyway, so that columns behind it are of other tokens than their numbers; a DFlash never drafts its mask.
    spare = MASK if kind != "mtp" else next(t for t in range(VOCAB) if t not in everything)
    assert everything.max() > spare
    draft.vocabulary = torch.tensor([t for t in range(VOCAB) if t != spare])
    tokens, chances = candidates(draft, k=1)
    assert np.array_equal(tokens, everything)
    assert (chances >= whole * (1 - 1e-5)).all() and np.allclose(chances, whole, rtol=0.1)


@pytest.mark.parametrize("kind", ["dflash", "dflash 2"])
def test_the_text_is_the_targets_own_whatever_is_proposed(kind):
    target = TargetModel(qwen3_target())
    plain, _ = greedy_loop(target, None, [5, 6, 7, 8], 24, 4, 6)
    draft = drafter(kind).bind_target(target.embedding, target.lm_head)
    draft.vocabulary = SOME
    text, drafts = greedy_loop(target, draft, [5, 6, 7, 8], 24, 4, 6)
    assert text == plain
    assert set(sum(drafts, [])) <= set(SOME.tolist()) and drafts


def test_a_head_that_is_no_linear_has_no_rows_to_take():
    draft = random_draft()
    model = qwen3_target()
    draft.bind_target(model.get_input_embeddings(), torch.nn.Sequential(model.lm_head))
    draft.vocabulary = SOME
    with pytest.raises(InvalidArgument, match="draft_vocab: the target's head is a Sequential"):
        draft.alloc_kv(8)


def test_the_rows_of_a_head_with_a_bias_keep_it():
    head = torch.nn.Linear(4, 9)
    x = torch.randn(3, 4)
    torch.testing.assert_close(proposals.rows_of(head, torch.tensor([2, 5]))(x), head(x)[:, [2, 5]])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_is_proposed_is_part_of_a_checkpoint(tmp_path):
    draft = random_draft()
    draft.vocabulary = SOME
    save_draft(draft, tmp_path)
    assert torch.equal(load_draft(tmp_path).vocabulary, SOME)
    draft.vocabulary = None
    save_draft(draft, tmp_path)
    assert load_draft(tmp_path).vocabulary is None and not (tmp_path / proposals.FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[3, 4", "damaged"),
        ('{"a": 1}', "got .*a.*, expected a list"),
        ("[3]", "expected a list of at least two"),
        ("[3, 3]", "got 3 behind 3"),
        ("[3, true]", "got True behind 3"),
        ("[3, 2.5]", "got 2.5 behind 3"),
        ("[-1, 3]", "got -1 behind -1"),
        (f"[3, {VOCAB}]", f"got {VOCAB} behind 3, expected token ids that rise, below {VOCAB}"),
        (f"[0, {MASK}, 5]", "the mask token, which is never proposed"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    save_draft(random_draft(), tmp_path)
    (tmp_path / proposals.FILE).write_text(content)
    for read in (load_draft, describe_draft):
        with pytest.raises(CheckpointError, match=f"draft_vocab.json: .*{message}|draft_vocab.json: {message}"):
            read(tmp_path)


def test_a_second_dflash_proposes_at_least_what_it_selects_among(tmp_path):
    save_draft(random_draft(**SECOND), tmp_path)
    (tmp_path / proposals.FILE).write_text("[3, 4, 5, 6]")
    with pytest.raises(CheckpointError, match="got 4 tokens, expected at least 5, the drafter's selector_top_k"):
        load_draft(tmp_path)
    (tmp_path / proposals.FILE).write_text("[3, 4, 5, 6, 9]")
    assert load_draft(tmp_path).vocabulary.tolist() == [3, 4, 5, 6, 9]


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_most_frequent_of_equals_the_smaller_ids_first():
    tokens = np.array([5, 5, 5, 2, 2, 9, 7, 1, 1, 1, 1])
    assert proposals.most_frequent(tokens, 3, 12, [1]).tolist() == [2, 5, 7]
    assert proposals.most_frequent(tokens, 11, 12, [1]).tolist() == [0, *range(2, 12)]
    for count in (1, 12):
        with pytest.raises(ValueError, match=r"draft_vocab: got .*, expected 0 for all, or 2..11"):
            proposals.most_frequent(tokens, count, 12, [1])


def learner(**options):
    target = tiny_target()
    settings = DrafterTraining(
        taps="0,1,2",
        num_layers=2,
        block_size=4,
        train_block_sizes="4",
        anchors=9,
        seq_len=48,
        mask_token_id=1,
        **options,
    )
    draft = DFlashDraft(drafter_training.draft_config(target.config, settings))
    with torch.no_grad():
        drafter_training.warm_start(draft, target, torch.randint(2, 64, (2, 40)))
    draft.bind_target(target.get_input_embeddings(), target.get_output_embeddings())
    teacher = drafter_training.Teacher(target, settings.tap_ids, settings.mask_token_id)
    return target, draft, teacher, settings


def loss_of(draft, teacher, settings):
    torch.manual_seed(3)
    tokens = torch.randint(2, 64, (2, 48))
    anchors = torch.arange(3, 39, 4).repeat(2, 1)
    draft.zero_grad()
    loss, tau = drafter_training.block_loss(draft, teacher, drafter_training.Batch.whole(tokens, anchors, 4), settings)
    loss.backward()
    return float(loss.detach()), tau, draft.fc.weight.grad.clone()


@pytest.mark.parametrize("soft", [1.0, 0.4, 0.0])
def test_a_part_that_is_everything_is_the_whole_loss(soft):
    target, draft, teacher, settings = learner(soft_labels=soft)
    loss, tau, slope = loss_of(draft, teacher, settings)
    everything = torch.tensor([t for t in range(64) if t != 1])
    teacher.columns = Columns(target.get_output_embeddings(), everything, torch.empty(0, dtype=torch.int64), 0)
    again, same, narrowed = loss_of(draft, teacher, settings)
    assert again == pytest.approx(loss, rel=1e-5) and same == tau
    torch.testing.assert_close(narrowed, slope, rtol=1e-4, atol=1e-7)


def test_slots_behind_a_token_that_is_not_proposed_are_not_learnt():
    target, draft, teacher, settings = learner(soft_labels=0.0)
    tokens = torch.arange(2, 50)[None]
    # Of the block behind 10 its second token, 12, is none: 13 behind it never counts, whatever it is.
    proposed = torch.tensor([t for t in range(2, 64) if t != tokens[0, 12]])
    teacher.columns = Columns(target.get_output_embeddings(), proposed, torch.empty(0, dtype=torch.int64), 0)
    batch = drafter_training.Batch.whole(tokens, torch.tensor([[10]]), 4)
    loss, tau = drafter_training.block_loss(draft, teacher, batch, settings)
    changed = batch._replace(tokens=tokens.clone())
    changed.tokens[0, 13] = 3
    again, _ = drafter_training.block_loss(draft, teacher, changed, settings)
    assert float(loss.detach()) == pytest.approx(float(again.detach()), rel=1e-6) and tau <= 2
    before = batch._replace(tokens=tokens.clone())
    before.tokens[0, 11] = 3
    assert float(drafter_training.block_loss(draft, teacher, before, settings)[0].detach()) != pytest.approx(
        float(loss.detach())
    )


def test_sampled_tokens_stand_for_all_that_are_not_proposed():
    """The sum over a vocabulary is right on average over the draws."""
    target, _, teacher, settings = learner(draft_vocab=10, sampled_vocab=6)
    narrowed = Narrowed(target, documents(40, 30), settings, torch.device("cpu"))
    hidden = torch.randn(1, 32)
    logits = teacher.logits(hidden)[0].double()
    expected = float(logits.exp().sum())
    sums = []
    for step in range(1500):
        columns = narrowed.at(step)
        assert columns.proposed == 10 and len(columns.tokens.unique()) == 16 and 1 not in columns.tokens
        assert torch.equal(columns.tokens[:10], narrowed.tokens)
        sums.append(float(columns.scores(hidden).double().exp().sum()))
    error = np.std(sums) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - expected) < 5 * error
    # Without the weight of the others the sum would be far from it.
    few = float(logits[columns.tokens].exp().sum())
    assert abs(few - expected) > 20 * error
    assert torch.equal(narrowed.at(3).tokens, narrowed.at(3).tokens)
    assert not torch.equal(narrowed.at(3).tokens, narrowed.at(4).tokens)


@pytest.mark.parametrize("kind", ["drafter", "mtp"])
def test_a_drafter_is_trained_to_propose_the_most_frequent_tokens(tmp_path, kind, capsys):
    from dflash_rs.train import mtp

    tiny_target().save_pretrained(tmp_path / "target")
    (tmp_path / "responses").mkdir()
    documents(*range(8, 40), seed=5).save(tmp_path / "responses" / "shard-00000.npz")
    common = {
        "block_size": 4,
        "anchors": 5,
        "seq_len": 48,
        "steps": 4,
        "batch_size": 2,
        "draft_vocab": 20,
        "sampled_vocab": 8,
    }
    if kind == "mtp":
        settings, train = MtpTraining(**common), mtp.train
    else:
        settings = DrafterTraining(taps="0,1,2", num_layers=1, train_block_sizes="4", mask_token_id=1, **common)
        train = drafter_training.train
    report = train(settings, tmp_path / "target", tmp_path / "responses", None, tmp_path / "out", "cpu", 1, False)
    assert "the drafter proposes 20 tokens" in capsys.readouterr().err
    assert all(math.isfinite(entry["loss"]) for entry in report["history"])
    listed = json.loads((tmp_path / "out" / proposals.FILE).read_text())
    own, _ = drafter_training.responses.load(tmp_path / "responses").split()
    counts = np.bincount(own.tokens[own.own], minlength=64)
    if kind == "drafter":
        counts[1] = 0
    assert len(listed) == 20 and counts[listed].min() >= np.delete(counts, listed).max()
    # Gone on from, with another part.
    more = type(settings)(**{**settings.__dict__, "init_from": str(tmp_path / "out"), "draft_vocab": 30})
    train(more, tmp_path / "target", tmp_path / "responses", None, tmp_path / "more", "cpu", 1, False)
    assert len(json.loads((tmp_path / "more" / proposals.FILE).read_text())) == 30
    whole = type(settings)(**{**settings.__dict__, "init_from": str(tmp_path / "more"), "draft_vocab": 0})
    train(whole, tmp_path / "target", tmp_path / "responses", None, tmp_path / "whole", "cpu", 1, False)
    assert not (tmp_path / "whole" / proposals.FILE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_vocab": 1}, "draft_vocab: got 1, expected 0 for all, or 2..63"),
        ({"draft_vocab": 64}, "draft_vocab: got 64, expected 0 for all, or 2..63"),
        ({"draft_vocab": 10, "sampled_vocab": -1}, "sampled_vocab: got -1"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change, message):
    target, _, _, settings = learner(**change)
    with pytest.raises(ValueError, match=message):
        Narrowed(target, documents(40, 30), settings, torch.device("cpu"))

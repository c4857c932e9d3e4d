"""Training: splits that hold, runs that resume to the same weights, checkpoints that the engine loads."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs.config import assets  # noqa: E402
from dflash_rs.train import corpus, responses  # noqa: E402
from dflash_rs.train import drafter as drafter_training  # noqa: E402
from dflash_rs.train import target as target_training  # noqa: E402
from dflash_rs.train.common import windows, write_first  # noqa: E402
from dflash_rs.train.prompts import held_out_prompts  # noqa: E402

TINY = target_training.TargetTraining(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16,
    tokens=8 * 4 * 32, seq_len=32, batch_size=4, warmup_steps=2, max_position_embeddings=128,
)  # fmt: skip
TINY_DRAFT = drafter_training.DrafterTraining(
    taps="0,1,2", num_layers=1, block_size=4, train_block_sizes="4", steps=6, batch_size=4, anchors=6, seq_len=32
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of small generated programs, prepared once."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("source")
    for i in range(60):
        body = "\n".join(f"    total_{j} = values[{j}] + {i * j}" for j in range(12))
        (root / f"module_{i}.py").write_text(f"import os\n\n\ndef work_{i}(values):\n{body}\n    return total_0\n")
    (root / "encodings").mkdir()
    (root / "encodings" / "table.py").write_text("table = {}\n")
    (root / "broken.py").write_text("def (:\n")
    out = tmp_path_factory.mktemp("corpus")
    corpus.prepare(out, [root], vocab_size=300, held_out_percent=20)
    return out


@pytest.fixture(scope="module")
def target(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("target")
    target_training.train(TINY, data, out, device="cpu", save_every=4)
    return out


@pytest.fixture(scope="module")
def own(data, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    settings = responses.ResponseSettings(sequences=8, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    responses.generate(target, responses.from_corpus(data), out, settings)
    return out


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupted(monkeypatch, run, training=drafter_training) -> None:
    """Runs what ends behind its first checkpoint, as by Ctrl-C; `training`: the module that saves."""
    save = training.save_checkpoint

    def dies(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", dies)
        run()


def test_a_file_is_held_out_by_its_name_alone(data):
    manifest = json.loads((data / "manifest.json").read_text())
    names = {f["name"]: f["held_out"] for f in manifest["files"]}
    assert "broken.py" not in names and not any(n.startswith("encodings/") for n in names)
    assert any(names.values()) and not all(names.values())
    assert all(corpus.is_held_out(name, 20) == held_out for name, held_out in names.items())
    kept = {f["name"] for f in json.loads((data / "held_out.json").read_text())}
    assert kept == {name for name, held_out in names.items() if held_out}


def test_the_tokenizer_gives_back_every_text_and_reserves_its_two_ids(data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    text = "def naïve(x):\n\treturn x  # 日本\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_tokens_to_ids([corpus.END_OF_TEXT, corpus.MASK]) == [0, 1]
    assert tokenizer.eos_token_id == 0


def test_windows_resume_where_they_stopped():
    tokens = np.arange(1000, dtype=np.uint16)
    whole = list(itertools.islice(windows(tokens, 16, seed=3), 200))
    resumed = list(itertools.islice(windows(tokens, 16, seed=3, start=77), 123))
    assert all((a == b).all() for a, b in zip(whole[77:], resumed, strict=True))
    assert len({int(w[0]) for w in whole[:60]}) == 60, "an epoch shows no window twice"


@pytest.mark.parametrize("start_layers", [0, 2])
def test_an_interrupted_target_run_resumes_to_the_same_weights(data, tmp_path, monkeypatch, start_layers):
    settings = replace(TINY, start_layers=start_layers)

    def run(name):
        target_training.train(settings, data, tmp_path / name, device="cpu", save_every=3)

    run("whole")
    interrupted(monkeypatch, lambda: run("cut"), target_training)
    run("cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_training_lowers_the_held_out_loss(target):
    history = json.loads((target / "training.json").read_text())["report"]["history"]
    assert history[-1]["held_out_loss"] < np.log(TINY.vocab_size) - 0.3


def test_growing_does_not_change_the_function():
    settings = replace(TINY, start_layers=2)
    small = target_training.build(settings, 2).eval()
    large = target_training.grow(small, settings).eval()
    tokens = torch.arange(24)[None]
    assert len(large.model.layers) == 4
    torch.testing.assert_close(large(input_ids=tokens).logits, small(input_ids=tokens).logits)


def test_other_settings_never_continue_a_run(data, target):
    with pytest.raises(ValueError, match="other settings: seed was .*init_from"):
        target_training.train(replace(TINY, seed=9), data, target, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 10}, "tokens"), ({"start_layers": 3}, "start_layers"), ({"grow_at": 1.0}, "grow_at"), ({"num_kv_heads": 3}, "num_kv_heads")],
)  # fmt: skip
def test_a_target_setting_that_cannot_work_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change).check()


def test_responses_continue_their_prompts_and_depend_on_the_seed_only(data, target, own, tmp_path):
    written = responses.load(own)
    assert len(written) == 8 and written.lengths().tolist() == [32] * 8 and written.tokens.max() < 300
    assert 4 <= (~written.own_of(0)).sum() <= 8 and not written.own_of(0)[:4].any() and written.own_of(0)[8:].all()
    settings = responses.ResponseSettings(sequences=8, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    source = responses.from_corpus(data)
    responses.generate(target, source, tmp_path / "again", settings)
    again = responses.load(tmp_path / "again")
    assert (again.tokens == written.tokens).all() and (again.own == written.own).all()
    pieces = [responses.generate(target, source, tmp_path / "pieces", settings, minutes=0) for _ in range(3)]
    assert pieces == [1, 0, 0] and (responses.load(tmp_path / "pieces").tokens == written.tokens).all()
    with pytest.raises(ValueError, match="other settings: seed was .* same settings$"):
        responses.generate(target, source, own, replace(settings, seed=5))
    with pytest.raises(ValueError, match="temperatures"):
        replace(settings, temperatures="0,1").check()


def test_a_folder_of_responses_holds_those_of_one_target_and_one_source(data, target, own, tmp_path):
    settings = responses.ResponseSettings(sequences=8, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    with pytest.raises(ValueError, match=f"target was {target}, now it is .*other"):
        responses.generate(tmp_path / "other", responses.from_corpus(data), own, settings)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "import os"}\n')
    with pytest.raises(
        ValueError, match="source was corpus train.npy, sha256 .{12}, now it is prompts prompts.jsonl, sha256"
    ):
        responses.generate(target, responses.from_file(prompts), own, settings)
    # A folder that was begun before settings told of target and source goes on.
    old = json.loads((own / "settings.json").read_text())
    del old["target"], old["source"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text(json.dumps(old))
    assert responses.generate(target, responses.from_corpus(data), tmp_path / "old", settings) == 0
    (tmp_path / "old" / "settings.json").write_text("{x")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        responses.generate(target, responses.from_corpus(data), tmp_path / "old", settings)


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"openings": "nofile"}, {}, "openings: nofile cannot be read"),
        ({"seq_len": 4096}, {}, "seq_len: got 4096, expected at most 128, the target's own limit"),
        ({}, {"device": "foo"}, "device: got 'foo'"),
        ({}, {"dtype": "bar"}, "dtype: got 'bar'"),
    ],
)
def test_what_cannot_be_written_leaves_a_folder_as_it_was(data, target, own, tmp_path, settings, options, told):
    usual = responses.ResponseSettings(sequences=8, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    with pytest.raises(ValueError, match=told):
        responses.generate(target, responses.from_corpus(data), tmp_path / "new", replace(usual, **settings), **options)
    assert not (tmp_path / "new").exists()
    if options:  # though nothing is left to be written
        with pytest.raises(ValueError, match=told):
            responses.generate(target, responses.from_corpus(data), own, usual, **options)


def test_prompts_that_give_no_text_are_told(target, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "import os" * 40}) + "\n" + json.dumps({"text": "def"}) + "\n")
    settings = responses.ResponseSettings(sequences=4, seq_len=32, min_prompt=4, max_prompt=8, batch_size=4)
    responses.generate(target, responses.from_file(prompts), tmp_path / "out", settings)
    assert "2 of 4 gave no text: a prompt that leaves no room" in capsys.readouterr().err
    assert len(responses.load(tmp_path / "out")) == 2


def _writes_first(path: Path, value: dict, go, found) -> None:
    go.wait()
    found.put(write_first(path, value))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no hard links"])
def test_of_processes_that_start_at_once_one_says_what_a_folder_holds(tmp_path, links, monkeypatch):
    # `go` is passed by all in the same moment, and again and again: a file that is half written would not be JSON.
    context = multiprocessing.get_context("fork")
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    for again in range(10):
        go, found = context.Barrier(4), context.Queue()
        values = [{"seed": seed if links else 7, "long": "x" * 100_000} for seed in range(4)]
        at_once = [
            context.Process(target=_writes_first, args=(tmp_path / f"{again}.json", value, go, found))
            for value in values
        ]
        for process in at_once:
            process.start()
        seen = [found.get(timeout=60) for _ in at_once]
        for process in at_once:
            process.join()
        assert seen[0] in values and seen == [seen[0]] * 4
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": "0,a"}, "taps: got '0,a', expected whole numbers"),
        ({"train_block_sizes": ","}, "train_block_sizes: got ',', expected whole numbers"),
        ({"train_block_sizes": "1"}, r"train_block_sizes: got 1, expected 2\.\.4 each"),
        ({"train_block_sizes": "4,5"}, r"train_block_sizes: got 4,5, expected 2\.\.4 each"),
        ({"taps": "1,2,1"}, "taps: got 1,2,1, expected every layer once"),
        ({"num_layers": 0}, r"num_layers: got 0, expected 1\.\.4"),
        ({"num_layers": 5}, r"num_layers: got 5, expected 1\.\.4"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size: got -1, expected at least 1"),
        ({"anchors": 0}, "anchors: got 0, expected at least 1"),
        ({"gamma": 0.0}, "gamma: got 0.0, expected a finite number above 0"),
        ({"seq_len": 4}, "seq_len: got 4, expected more than block_size 4"),
        ({"soft_labels": 1.5}, r"soft_labels: got 1.5, expected a share in \[0, 1\]"),
        ({"warmup": -0.1}, "warmup: got -0.1"),
        ({"block_size": 1}, "block_size: got 1, expected at least 2"),
        ({"lr": -1.0}, "lr: got -1.0, expected a finite number above 0"),
        ({"lr": float("nan")}, "lr: got nan"),
    ],
)
def test_a_drafter_setting_that_cannot_work_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_DRAFT, **change).check(4, 300)
    with pytest.raises(ValueError, match="temperatures: got 'a', expected numbers"):
        responses.ResponseSettings(temperatures="a").check()


def test_an_interrupted_drafter_run_resumes_to_the_same_weights(data, target, own, tmp_path, monkeypatch):
    def run(name):
        return drafter_training.train(TINY_DRAFT, target, own, data, tmp_path / name, device="cpu", save_every=3)

    run("whole")
    interrupted(monkeypatch, lambda: run("cut"))
    run("cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_drafter_made_in_pieces_has_the_weights_of_one_made_at_once(data, target, own, tmp_path):
    def run(name, minutes):
        return drafter_training.train(
            TINY_DRAFT, target, own, data, tmp_path / name, device="cpu", save_every=3, minutes=minutes
        )

    assert run("whole", 60)["steps"] == TINY_DRAFT.steps
    for done in range(1, TINY_DRAFT.steps + 1):
        assert run("pieces", 0)["steps"] == done
        assert json.loads((tmp_path / "pieces" / "training.json").read_text())["report"]["steps"] == done
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "pieces")) == (done == TINY_DRAFT.steps)
    with pytest.raises(ValueError, match="minutes: got -1"):
        run("pieces", -1)


def test_a_trained_drafter_drafts_and_its_loss_falls(data, target, own, tmp_path):
    from dflash_rs import LLM, SamplingParams

    settings = replace(TINY_DRAFT, steps=60)
    report = drafter_training.train(settings, target, own, data, tmp_path, device="cpu", save_every=20)
    losses = [h["loss"] for h in report["history"]]
    assert losses[-1] < losses[0]
    with LLM(model=target, draft=tmp_path, device="cpu") as llm:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        output = llm.generate([[5, 6, 7]], params)[0]
        plain = llm.generate([[5, 6, 7]], params, draft=False)[0]
    assert output.token_ids == plain.token_ids
    assert corpus.MASK_ID not in output.token_ids or corpus.MASK_ID in plain.token_ids


def test_the_soft_loss_is_the_expectation_of_the_hard_one(data, target):
    """Averaged over the target's own law of a slot, the cross-entropy on tokens is the cross-entropy with the law."""
    from transformers import AutoModelForCausalLM

    from dflash_rs.models.dflash import DFlashDraft

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    settings = replace(TINY_DRAFT, block_size=2, train_block_sizes="2")
    torch.manual_seed(0)
    draft = DFlashDraft(drafter_training.draft_config(model.config, settings))
    draft.bind_target(model.get_input_embeddings(), model.get_output_embeddings())
    teacher = drafter_training.Teacher(model, settings.tap_ids, settings.mask_token_id)
    tokens, anchors = torch.randint(2, 300, (1, 20)), torch.tensor([[11]])
    soft, _ = drafter_training.block_loss(draft, teacher, drafter_training.Batch.whole(tokens, anchors, 2), settings)
    law = teacher.logits(teacher(tokens)[1])[0, 11].softmax(-1)
    hard = torch.zeros(())
    for token in range(300):
        if law[token] > 0:
            tokens[0, 12] = token
            batch = drafter_training.Batch.whole(tokens, anchors, 2)
            loss, _ = drafter_training.block_loss(draft, teacher, batch, replace(settings, soft_labels=0.0))
            hard = hard + law[token] * loss
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", ["0,9", "3"])
def test_a_tap_outside_the_target_is_refused(taps):
    with pytest.raises(ValueError, match="taps"):
        replace(TINY_DRAFT, taps=taps).check(4, 300)


def test_prompts_come_from_held_out_files_only():
    prompts = json.loads((assets() / "prompts.json").read_text())
    assert all(corpus.is_held_out(p["source"], 2.0) for p in prompts)
    assert len({p["prompt"] for p in prompts}) == len(prompts)


def test_asking_for_more_prompts_than_there_are_is_an_error(data):
    with pytest.raises(ValueError, match="count"):
        held_out_prompts(data, 10_000)

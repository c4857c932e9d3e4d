"""Training on chats: prompts from files and from the target itself, several documents in a row, losses on the target's tokens only."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs import InvalidArgument, SamplingParams  # noqa: E402
from dflash_rs.models.dflash import DFlashDraft  # noqa: E402
from dflash_rs.train import chats, losses, responses  # noqa: E402
from dflash_rs.train import drafter as drafter_training  # noqa: E402
from dflash_rs.train.common import Group  # noqa: E402
from dflash_rs.train.documents import Documents, Rows, Text, rows_of  # noqa: E402
from dflash_rs.train.features import StoredFeatures  # noqa: E402
from dflash_rs.train.settings import DrafterTraining, ResponseSettings  # noqa: E402

TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


class Words:
    """A tokenizer of characters, with a chat template."""

    chat_template = TEMPLATE

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        shown = "".join(f"<{m['role'][0]}>{m['content']};" for m in messages)
        return shown + ("<a>" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens=True):
        return type("Ids", (), {"input_ids": [ord(c) for c in text]})()


class Parrot:
    """An engine that ends every message at once, and says what it was asked for."""

    tokenizer, model_dir = Words(), "parrot"

    def __init__(self):
        self.prompts: list[str] = []

    def encode(self, text):
        return [ord(c) for c in text]

    def generate(self, prompts, params):
        outputs = []
        for prompt, p in zip(prompts, params, strict=True):
            assert isinstance(p, SamplingParams) and p.temperature > 0
            self.prompts.append("".join(map(chr, prompt)))
            text = f"says {len(prompt)} things"
            asks = bool(p.stop_token_ids)
            ids = [ord(c) for c in text + ";"][: p.max_tokens]
            outputs.append(
                type("Output", (), {"text": text, "token_ids": ids, "finish_reason": "stop" if asks else "length"})()
            )
        return outputs


def write(engine, source, **settings):
    return responses.write_shard(engine, source, ResponseSettings(seq_len=256, batch_size=6, **settings), 0)


def text(documents, i):
    return "".join(map(chr, documents.tokens_of(i)))


def own_text(documents, i):
    return "".join(map(chr, documents.tokens_of(i)[documents.own_of(i)]))


def test_a_target_writes_its_own_prompts_and_every_category_has_its_share():
    engine = Parrot()
    found = write(engine, responses.from_target())
    assert set(found.categories) == {"code", "math", "prose"}
    for i in range(len(found)):
        assert text(found, i).startswith("<u>") and ";<a>says" in text(found, i)
        assert own_text(found, i).startswith("says") and "<" not in own_text(found, i)


def test_every_turn_of_a_chat_is_answered_and_only_answers_are_marked(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        json.dumps({"category": "talk", "turns": ["one", "two"]}) + "\n" + json.dumps({"prompt": "single"}) + "\n\n"
    )
    found = write(Parrot(), responses.from_file(file))
    by_text = {text(found, i): own_text(found, i) for i in range(len(found))}
    long = "<u>one;<a>says 10 things;<u>two;<a>says 35 things;"
    assert by_text[long] == "says 10 things;says 35 things;"
    assert by_text["<u>single;<a>says 13 things;"] == "says 13 things;"


def test_with_several_turns_the_target_goes_on_asking():
    found = write(Parrot(), responses.from_target(), turns=2)
    assert all(own_text(found, i).count("says") == 2 and text(found, i).count("<u>") == 2 for i in range(len(found)))


def test_texts_are_continued_without_a_template_and_chats_as_they_are(tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    file.write_text(json.dumps({"text": "Once "}) + "\n" + json.dumps({"messages": chat}) + "\n")
    engine = Parrot()
    write(engine, responses.from_file(file))
    assert {"Once ", "<s>x;<u>y;<a>"} == set(engine.prompts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: got .*expected an object with one of messages, prompt, text, turns"),
        ('{"prompt": "a", "text": "b"}', "line 2: got"),
        ('{"prompt": 3}', "line 2: prompt: got 3"),
        ('{"turns": []}', "line 2: turns: got"),
        ('{"turns": ["a", ""]}', r"line 2: turns\[1\]: got ''"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\].content: got None"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: messages: the last one is the assistant's"),
        ('{"prompt": "a", "category": 1}', "line 2: category: got 1"),
    ],
)
def test_a_broken_line_of_a_prompts_file_is_named_by_its_number(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(InvalidArgument, match=message):
        chats.read_prompts(file)


def test_a_target_without_a_template_cannot_chat():
    tokenizer = Words()
    tokenizer.chat_template = None
    with pytest.raises(InvalidArgument, match="target: parrot has no chat template"):
        chats.Template(tokenizer, "parrot")


def documents(*lengths, vocab=64, seed=0):
    """Texts of these lengths; the first three tokens of each are a prompt."""
    rng = np.random.default_rng(seed)
    texts = [
        (rng.integers(2, vocab, n), np.arange(n) >= 3, "even" if i % 2 == 0 else "odd") for i, n in enumerate(lengths)
    ]
    return Documents.of(texts)


def test_shards_come_back_as_they_were_and_equal_texts_once(tmp_path):
    one = documents(9, 14, 30)
    one.save(tmp_path / "shard-00000.npz")
    one.only([1]).save(tmp_path / "shard-00001.npz")
    back = Documents.load(tmp_path)
    assert len(back) == 3 and back.categories == ("even", "odd", "even")
    assert (back.tokens == one.tokens).all() and (back.own == one.own).all()
    (tmp_path / "shard-00001.npz").write_bytes((tmp_path / "shard-00000.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="shard-00001.npz is damaged"):
        Documents.load(tmp_path)


def test_what_is_held_out_hangs_on_the_prompt_alone():
    many = documents(*[12] * 400)
    train, kept = many.split()
    assert 0 < len(kept) < 40 and len(train) + len(kept) == 400
    other_answers = Documents.of(
        [(np.r_[kept.tokens_of(i)[:3], [5, 6]], np.arange(5) >= 3, "") for i in range(len(kept))]
    )
    assert all(other_answers.held_out(i) for i in range(len(kept)))


def test_rows_hold_every_document_once_an_epoch_and_never_more_than_fits():
    all_of = documents(9, 14, 30, 7, 8, 21, 5, 40)
    source = rows_of(all_of, 32, seed=1, whole_rows=False)
    rows, seen = [], 0
    while seen < len(all_of):
        rows.append(next(source))
        seen += len(rows[-1])
    assert seen == len(all_of) and len(rows) < len(all_of)
    assert all(sum(len(text.tokens) for text in row) <= 32 for row in rows)
    first = sorted(tuple(text.tokens.tolist()) for row in rows for text in row)
    assert all((all_of.tokens[t.place : t.place + len(t.tokens)] == t.tokens).all() for row in rows for t in row)
    assert first == sorted(tuple(all_of.tokens_of(i)[:32].tolist()) for i in range(len(all_of)))
    alone = list(itertools.islice(rows_of(all_of, 32, seed=1, whole_rows=True), 8))
    assert all(len(row) == 1 for row in alone)


def test_texts_without_a_token_of_the_target_are_refused_instead_of_searched_for_ever():
    late = Documents.of([([1, 2, 3, 4], [False, False, False, True], "")])
    with pytest.raises(ValueError, match="responses: got no document with a token of the target among its first 3"):
        next(rows_of(late, 3, 0, False))
    assert len(next(rows_of(late, 4, 0, False))) == 1


def test_anchors_lie_before_tokens_of_the_target_in_the_same_document():
    row = [Text(np.arange(2, 12), np.arange(10) >= 4, 100), Text(np.arange(2, 8), np.arange(6) >= 3)]
    found = Rows.of([row], 24)
    assert found.place[0].tolist() == [*range(100, 110), *[-1] * 14]
    assert found.document[0].tolist() == [0] * 10 + [1] * 6 + [-1] * 8
    assert found.position[0, :16].tolist() == [*range(10), *range(6)]
    places = set(found.anchors(200, np.random.default_rng(0))[0].tolist())
    assert places == {3, 4, 5, 6, 7, 8, 12, 13, 14}


def tiny_target():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=128,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    settings = DrafterTraining(taps="0,1,2", num_layers=2, block_size=4, train_block_sizes="4", anchors=5, seq_len=48)
    draft = DFlashDraft(drafter_training.draft_config(target.config, settings))
    with torch.no_grad():
        drafter_training.warm_start(draft, target, torch.randint(2, 64, (2, 40)))
    draft.bind_target(target.get_input_embeddings(), target.get_output_embeddings())
    return draft, drafter_training.Teacher(target, settings.tap_ids, settings.mask_token_id), settings


def test_a_drafter_of_a_target_without_norms_begins_with_queries_of_the_targets_size(pair):
    draft, teacher, _ = pair
    for name in ("q_norm", "k_norm"):
        weight = getattr(draft.layers[0].self_attn, name).weight
        assert 0 < float(weight.detach()[0]) != 1.0


def test_documents_in_one_row_give_the_loss_they_have_alone(pair):
    draft, teacher, settings = pair
    assert teacher.keeps_documents_apart(torch.device("cpu"))
    many = documents(17, 24, seed=3)
    texts = [Text(many.tokens_of(i).astype(np.int64), many.own_of(i)) for i in range(2)]
    together = Rows.of([texts], 48)
    anchors = [np.array([4, 9, 15]), np.array([3, 12, 22])]

    def batch(rows, places):
        parts = (rows.tokens, rows.document, rows.position, rows.own, rows.place, places)
        return drafter_training.Batch(*(torch.from_numpy(part) for part in parts), 4)

    both, _ = drafter_training.block_loss(
        draft, teacher, batch(together, np.r_[anchors[0], anchors[1] + 17][None]), settings
    )
    sums = weights = 0.0
    for text_of, places in zip(texts, anchors, strict=True):
        rows = Rows.of([[text_of]], len(text_of[0]))
        alone, _ = drafter_training.block_loss(draft, teacher, batch(rows, places[None]), settings)
        inside = [
            sum(np.exp(-k / settings.gamma) for k in range(3) if place + 1 + k < len(text_of[0])) for place in places
        ]
        sums, weights = sums + float(alone) * sum(inside), weights + sum(inside)
    assert float(both) == pytest.approx(sums / weights, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_features_are_those_of_the_target(pair, tmp_path, dtype):
    _, teacher, settings = pair
    teacher = drafter_training.Teacher(
        copy.deepcopy(teacher.target).to(dtype), settings.tap_ids, settings.mask_token_id
    )
    many = documents(17, 24, 60, 9, 11, 30, 8, seed=3)
    where = torch.device("cpu")

    def capture(folder=tmp_path / "features", about="a target", of=many, teacher=teacher):
        return StoredFeatures.capture(
            folder, of, teacher, 48, False, {"target": about, "taps": list(teacher.taps)}, Group(), where
        )

    stored = capture()
    rows = next(rows_of(many, 48, seed=1, whole_rows=False))
    part = Rows.of([rows], 48)
    place = torch.from_numpy(part.place)
    features, last = stored.read(place)
    expected = teacher(torch.from_numpy(part.tokens), torch.from_numpy(part.position))
    known = place[0] >= 0
    assert features.dtype == last.dtype == dtype
    for found, right in zip((features, last), expected, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[0][known], right[0][known], atol=tolerance, rtol=tolerance)
        assert not found[0][~known].any() and found[0][known].any(-1).all()

    # What is there is read, not computed: a target that cannot compute is never asked but for its shape.
    class Shape(drafter_training.Teacher):
        def __call__(self, tokens, position=None):
            assert tokens.shape == (1, 1)
            return super().__call__(tokens, position)

    again = capture(teacher=Shape(teacher.target, settings.tap_ids, settings.mask_token_id)).read(place)
    assert torch.equal(again[0], features) and torch.equal(again[1], last)
    # Whoever needs less of it is served: other taps in another order, or the last states alone, and by any number of processes.
    (tmp_path / "features" / "captured-0-of-1.json").unlink()
    for taps in ((2, 0), ()):
        asked = Shape(teacher.target, taps, settings.mask_token_id)
        some, states = StoredFeatures.capture(
            tmp_path / "features", many, asked, 48, False, {"target": "a target", "taps": list(taps)}, Group(), where
        ).read(place)
        parts = features.unflatten(-1, (3, 32))
        assert torch.equal(some, parts[..., list(taps), :].flatten(-2)) and torch.equal(states, last)
    with pytest.raises(ValueError, match="other settings: taps was"):
        more = drafter_training.Teacher(teacher.target, (0, 3), settings.mask_token_id)
        StoredFeatures.capture(
            tmp_path / "features", many, more, 48, False, {"target": "a target", "taps": [0, 3]}, Group(), where
        )
    # An interrupted capture goes on where its note says, in parts as in one.
    (tmp_path / "features" / "captured.json").unlink()
    (tmp_path / "features" / "captured-0-of-1.json").write_text("0")
    assert torch.equal(capture().read(place)[1], last)
    with pytest.raises(ValueError, match="other settings: target was a target, now it is another"):
        capture(about="another")
    with pytest.raises(ValueError, match="other settings: responses was"):
        capture(of=documents(17, 24))


def test_a_training_with_stored_features_is_the_training_without(tmp_path):
    target = tiny_target()
    target.save_pretrained(tmp_path / "target")
    (tmp_path / "responses").mkdir()
    documents(*range(8, 40), seed=5).save(tmp_path / "responses" / "shard-00000.npz")
    settings = DrafterTraining(
        taps="0,1,2", num_layers=1, block_size=4, train_block_sizes="4", anchors=5, seq_len=48, steps=4, batch_size=2, mask_token_id=1
    )  # fmt: skip

    def losses(name, store=None):
        report = drafter_training.train(
            settings, tmp_path / "target", tmp_path / "responses", None, tmp_path / name, "cpu", 1, False, store=store
        )
        return [entry["loss"] for entry in report["history"]]

    online = losses("online")
    assert losses("stored", tmp_path / "features") == pytest.approx(online, rel=1e-4)
    own, _ = responses.load(tmp_path / "responses").split()
    assert (tmp_path / "features" / "features.bin").stat().st_size == own.tokens.size * 4 * 32 * 4
    np.save(tmp_path / "train.npy", np.arange(2, 1000, dtype=np.int32) % 60)
    with pytest.raises(ValueError, match="store_features: got a corpus"):
        drafter_training.train(
            settings, tmp_path / "target", tmp_path / "responses", tmp_path, tmp_path / "c", "cpu", 1, False, store=tmp_path / "f"
        )  # fmt: skip


def test_tokens_that_the_target_did_not_write_are_not_learnt(pair):
    draft, teacher, settings = pair
    tokens = torch.randint(2, 64, (1, 20))
    batch = drafter_training.Batch.whole(tokens, torch.tensor([[10]]), 4)
    batch = batch._replace(own=torch.arange(20)[None] < 12)
    loss, tau = drafter_training.block_loss(draft, teacher, batch, replace(settings, soft_labels=0.0))
    changed = batch._replace(tokens=torch.where(torch.arange(20) >= 12, 5, tokens))
    again, _ = drafter_training.block_loss(draft, teacher, changed, replace(settings, soft_labels=0.0))
    assert float(loss) == pytest.approx(float(again)) and np.isnan(tau)


@pytest.mark.parametrize("soft", [0.0, 0.6, 1.0])
def test_the_loss_in_groups_of_rows_has_the_gradient_of_the_whole(pair, monkeypatch, soft):
    draft, teacher, _ = pair
    monkeypatch.setattr(losses, "_ROWS_AT_A_TIME", 3)
    torch.manual_seed(1)
    hidden, before = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    truth, weight = torch.randint(2, 64, (8,)), torch.rand(8)
    loss, likeliest = losses.head_loss(teacher, hidden, losses.Labelled(before, truth, weight), soft, k=3)
    (2 * loss).backward()
    got, hidden.grad = hidden.grad, None
    logs = teacher.logits(hidden).log_softmax(-1)
    law = teacher.logits(before).softmax(-1)
    per_slot = -soft * torch.nansum(law * logs, -1) - (1 - soft) * logs.gather(1, truth[:, None])[:, 0]
    (2 * (per_slot * weight).sum()).backward()
    assert float(loss) == pytest.approx(float((per_slot * weight).sum()), rel=1e-5)
    torch.testing.assert_close(got, torch.nan_to_num(hidden.grad), rtol=1e-4, atol=1e-6)
    values, picked = logs.topk(3)
    assert (likeliest.picked == picked).all()
    torch.testing.assert_close(likeliest.logits.log_softmax(-1), values.log_softmax(-1))
    label = soft * law + (1 - soft) * torch.nn.functional.one_hot(truth, 64)
    torch.testing.assert_close(likeliest.label, label.gather(1, picked))


def test_a_target_with_memory_of_what_came_before_has_one_document_a_row():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    teacher = drafter_training.Teacher.__new__(drafter_training.Teacher)
    teacher.target, teacher.taps, teacher.mask, teacher._seen = model.eval(), (0,), 1, {}
    model.base_model.layers[0].register_forward_hook(teacher._keep(0))
    forward = model.base_model.forward
    # It takes no positions at all.
    model.base_model.forward = lambda input_ids, position_ids=None, use_cache=False: forward(
        input_ids, use_cache=use_cache
    )
    assert not teacher.keeps_documents_apart(torch.device("cpu"))

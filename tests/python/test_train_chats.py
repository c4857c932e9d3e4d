"""Training on chats: prompts from files and from the target itself, several documents in a row, losses on the target's tokens only."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs import InvalidArgument, SamplingParams  # noqa: E402
from dflash_rs.models.dflash import DFlashDraft  # noqa: E402
from dflash_rs.train import chats, responses  # noqa: E402
from dflash_rs.train import drafter as drafter_training  # noqa: E402
from dflash_rs.train.documents import Documents, Rows, rows_of  # noqa: E402
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
    assert all(sum(len(t) for t, _ in row) <= 32 for row in rows)
    first = sorted(tuple(t.tolist()) for row in rows for t, _ in row)
    assert first == sorted(tuple(all_of.tokens_of(i)[:32].tolist()) for i in range(len(all_of)))
    again = [next(source) for _ in rows]
    shown = [[[text.tolist() for text, _ in row] for row in epoch] for epoch in (rows, again)]
    assert sorted(shown[0]) == sorted(shown[1]) and shown[0] != shown[1]
    alone = list(itertools.islice(rows_of(all_of, 32, seed=1, whole_rows=True), 8))
    assert all(len(row) == 1 for row in alone)


def test_anchors_lie_before_tokens_of_the_target_in_the_same_document():
    row = [(np.arange(2, 12), np.arange(10) >= 4), (np.arange(2, 8), np.arange(6) >= 3)]
    found = Rows.of([row], 24)
    assert found.document[0].tolist() == [0] * 10 + [1] * 6 + [-1] * 8
    assert found.position[0, :16].tolist() == [*range(10), *range(6)]
    places = set(found.anchors(200, np.random.default_rng(0))[0].tolist())
    assert places == {3, 4, 5, 6, 7, 8, 12, 13, 14}


@pytest.fixture(scope="module")
def pair():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=128,
        )
    )  # fmt: skip
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
    texts = [(many.tokens_of(i).astype(np.int64), many.own_of(i)) for i in range(2)]
    together = Rows.of([texts], 48)
    anchors = [np.array([4, 9, 15]), np.array([3, 12, 22])]

    def batch(rows, places):
        parts = (rows.tokens, rows.document, rows.position, rows.own, places)
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
    monkeypatch.setattr(drafter_training, "_ROWS_AT_A_TIME", 3)
    torch.manual_seed(1)
    hidden, before = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    truth, weight = torch.randint(2, 64, (8,)), torch.rand(8)
    loss, right = drafter_training.head_loss(teacher, hidden, drafter_training.Labelled(before, truth, weight), soft)
    (2 * loss).backward()
    got, hidden.grad = hidden.grad, None
    logs = teacher.logits(hidden).log_softmax(-1)
    law = teacher.logits(before).softmax(-1)
    per_slot = -soft * torch.nansum(law * logs, -1) - (1 - soft) * logs.gather(1, truth[:, None])[:, 0]
    (2 * (per_slot * weight).sum()).backward()
    assert float(loss) == pytest.approx(float((per_slot * weight).sum()), rel=1e-5)
    torch.testing.assert_close(got, torch.nan_to_num(hidden.grad), rtol=1e-4, atol=1e-6)
    assert (right == (logs.argmax(-1) == truth)).all()


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

"""An MTP head as a drafter: its sums against a forward without any cache, its checkpoints, and texts that do not depend on it."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from interruptions import finish_interrupted  # noqa: E402
from models_helpers import HIDDEN, VOCAB, Pages, best, qwen3_target, randomise  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from dflash_rs import LLM, SamplingParams, StepCosts  # noqa: E402
from dflash_rs.errors import CheckpointError, InvalidArgument, UnsupportedModel  # noqa: E402
from dflash_rs.models.drafter import FINAL  # noqa: E402
from dflash_rs.models.loader import build_draft, load_draft, read_draft_config, save_draft  # noqa: E402
from dflash_rs.models.mtp import MtpConfig, unrolled_hidden  # noqa: E402
from dflash_rs.models.target import TargetModel  # noqa: E402

BYTES = [bytes([32 + token]) for token in range(VOCAB)]
LENGTH = 30
SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 0.8},
    "filters": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"temperature": 0.8, "logit_bias": {17: 2.0, 30: -4.0, 5: 1.5}},
    "stop": {"temperature": 0.7, "stop": ["A", "bc"], "stop_token_ids": [8, 9]},
}


def mtp_config(**options) -> MtpConfig:
    values = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "vocab_size": VOCAB,
        "num_target_layers": 6,
        "block_size": 6,
    }
    return MtpConfig(**(values | options))


def random_mtp(seed: int = 1, **options):
    return randomise(build_draft(mtp_config(**options)), seed).eval()


def guesser(model):
    """A head that is often right: the target's last layer, fed with the target's states, and little of the tokens."""
    draft = build_draft(mtp_config())
    last = model.model.layers[-1]
    draft.layers[0].load_state_dict(last.state_dict())
    draft.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        draft.fc.weight.copy_(torch.cat((torch.eye(HIDDEN), 0.3 * torch.eye(HIDDEN)), dim=1))
    return draft.eval()


def bound(draft, model=None):
    model = model or qwen3_target()
    return draft.bind_target(model.get_input_embeddings(), model.lm_head)


@torch.no_grad()
def without_cache(draft, states, tokens, steps: int) -> tuple[list[int], list[float]]:
    """Greedy drafts after `tokens`, the last of which is the anchor, and their probabilities: every step all over, in plain torch.

    states [L, H]: the target's, of all tokens but the anchor."""
    layer, attention = draft.layers[0], draft.layers[0].self_attn
    before, text = [*states], list(tokens)
    drafts, chances = [], []
    for _ in range(steps):
        x = draft.join(torch.tensor(text[1:]), torch.stack(before))
        normed = layer.input_layernorm(x)
        cos, sin = draft.cos_sin(torch.arange(1, len(text)), x.dtype)
        q = attention.query(normed, cos, sin).transpose(0, 1)
        k, v = (part.transpose(0, 1).repeat_interleave(2, dim=0) for part in attention.key_value(normed, cos, sin))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        state = draft.norm(layer.close(x, attended, None, 1))[-1]
        law = draft.bound[1](state).softmax(-1)
        drafts.append(int(law.argmax()))
        chances.append(float(law.max()))
        text.append(drafts[-1])
        before.append(state)
    return drafts, chances


def case(lengths, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(n, HIDDEN, generator=generator) for n in lengths]
    texts = [torch.randint(2, VOCAB, (n + 1,), generator=generator).tolist() for n in lengths]
    return states, texts


def told(draft, pages, row: int, states, text, cuts=(), valid_from: int = 0) -> None:
    """Injects a text's states in pieces; what lies before `valid_from` is never told."""
    edges = [valid_from, *cuts, states.shape[0]]
    for begin, end in zip(edges, edges[1:]):
        places = np.arange(begin, end)
        before = np.where(places - 1 >= valid_from, pages.slots(row, np.maximum(places - 1, 0)), -1)
        draft.inject(
            states[begin:end], places, pages.slots(row, places), token_ids=np.array(text[begin:end]), before=before
        )


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False}, {"attention_bias": True}], ids=str)
def test_drafts_with_a_cache_are_those_without_one(options, page_size, kernel):
    draft = bound(random_mtp(**options))
    lengths = [1, 23, 9, 2]
    states, texts = case(lengths)
    expected = [without_cache(draft, s, t, 5) for s, t in zip(states, texts, strict=True)]
    pages = Pages(4, 32, page_size)
    draft.alloc_kv(pages.num_slots)
    assert draft.runtime.kernel
    draft.runtime.kernel = kernel
    for row, (s, t) in enumerate(zip(states, texts, strict=True)):
        told(draft, pages, row, s, t, cuts=[cut for cut in (1, 5, 6) if cut < len(s)])
    anchors = [t[-1] for t in texts]
    drafts, chances = best(draft, anchors, lengths, pages.table, page_size=page_size)
    assert drafts.tolist() == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(chances, [probabilities for _, probabilities in expected], rtol=2e-3)
    # Any subset in any order; shorter blocks are the front of longer ones.
    some = best(draft, [anchors[2], anchors[0]], [9, 1], pages.table, [2, 0], page_size=page_size, block_size=4)[0]
    assert some.tolist() == [expected[2][0][:3], expected[0][0][:3]]


def test_a_drafted_block_leaves_nothing_behind():
    draft = bound(random_mtp())
    states, texts = case([9])
    pages = Pages(1, 24, 4)
    draft.alloc_kv(pages.num_slots)
    told(draft, pages, 0, states[0], texts[0])
    kept = [part.clone() for part in (draft.runtime.keys, draft.runtime.values, draft.runtime.states)]
    first = best(draft, [texts[0][-1]], [9], pages.table, page_size=4)[0]
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (draft.runtime.keys, draft.runtime.values, draft.runtime.states))
    )
    assert np.array_equal(first, best(draft, [texts[0][-1]], [9], pages.table, page_size=4)[0])


def test_candidates_are_the_likeliest_behind_the_likeliest_path():
    draft = bound(random_mtp())
    states, texts = case([12, 7])
    pages = Pages(2, 24, 4)
    draft.alloc_kv(pages.num_slots)
    for row in range(2):
        told(draft, pages, row, states[row], texts[row])
    anchors, lengths = [t[-1] for t in texts], [12, 7]
    one, its = best(draft, anchors, lengths, pages.table, page_size=4)
    tokens, chances = draft.candidates(anchors, lengths, pages.table, page_size=4)
    assert tokens.shape == (2, 5, draft.branches) and np.array_equal(tokens[:, :, 0], one)
    np.testing.assert_allclose(chances[:, :, 0], its, rtol=1e-5)
    assert (np.diff(chances, axis=2) <= 0).all() and (chances.sum(axis=2) <= 1).all()


def test_context_that_was_never_told_is_not_seen():
    draft = bound(random_mtp())
    states, texts = case([20])
    pages = Pages(1, 32, 4)
    draft.alloc_kv(pages.num_slots)
    told(draft, pages, 0, states[0], texts[0], valid_from=8)
    part = best(draft, [texts[0][-1]], [20], pages.table, page_size=4, valid_from=[8])[0]
    # From place 8 on the text is one of its own, whose first token has no state before it.
    alone, _ = without_cache(draft, states[0][8:], texts[0][8:], 5)
    with torch.inference_mode():
        draft.runtime.keys[pages.slots(0, np.arange(8))] = torch.nan
        draft.runtime.states[pages.slots(0, np.arange(8))] = torch.nan
    again = best(draft, [texts[0][-1]], [20], pages.table, page_size=4, valid_from=[8])[0]
    assert part.tolist() == again.tolist() == [alone]
    # Nothing at all was told: nothing of what lies in the cache matters.
    with torch.inference_mode():
        draft.runtime.states.fill_(torch.nan)
    blind, chances = best(draft, [texts[0][-1]], [20], pages.table, page_size=4, valid_from=[20])
    assert np.isfinite(chances).all() and blind.shape == (1, 5)


def test_training_rows_are_the_drafts_made_at_the_same_anchors():
    draft = bound(random_mtp())
    states, texts = case([20, 20])
    anchors = [[3, 12, 7], [1, 12, 12]]
    pages = Pages(2, 28, 4)
    draft.alloc_kv(pages.num_slots)
    for row in range(2):
        told(draft, pages, row, states[row], texts[row])
        for anchor in anchors[row]:
            drafts = best(draft, [texts[row][anchor]], [anchor], pages.table, [row], page_size=4)[0][0].tolist()
            # Trained as if its drafts were the text: then a row's likeliest token is the next draft.
            text = [*texts[row][: anchor + 1], *drafts, 0][: anchor + 6]
            length = max(20, anchor + 6)
            tokens = torch.tensor([text + [0] * (length - len(text))])
            hidden = F.pad(states[row], (0, 0, 0, length - 20))[None]
            with torch.no_grad():
                rows = unrolled_hidden(draft, hidden, tokens, torch.tensor([[anchor]]), 5)
                assert draft.bound[1](rows)[0, 0].argmax(-1).tolist() == drafts


def test_a_training_row_sees_its_context_and_its_own_steps_and_nothing_else():
    draft = bound(random_mtp())
    states, texts = case([20, 20])
    hidden, tokens = torch.stack(states).requires_grad_(), torch.tensor([text[:20] for text in texts])
    anchors = torch.tensor([[9, 4], [6, 6]])
    rows = unrolled_hidden(draft, hidden, tokens, anchors, 4)
    rows[0, 0, 3].sum().backward()
    touched = hidden.grad.abs().sum(-1) > 0
    # States before the anchor, of their own sequence; the last token's state is what the next ones are made of.
    assert touched[0].tolist() == [place < 9 for place in range(20)] and not touched[1].any()
    with torch.no_grad():
        changed = tokens.clone()
        changed[0, 13:] = 5
        changed[0, 0] = 6
        same = unrolled_hidden(draft, hidden, changed, anchors, 4)
        assert torch.equal(same[0, 0], rows[0, 0]) and torch.equal(same[1], rows[1])
        alone = unrolled_hidden(draft, hidden[:1], tokens[:1], anchors[:1, 1:], 4)
        torch.testing.assert_close(alone[0, 0], rows[0, 1], atol=1e-5, rtol=1e-4)


def test_training_runs_under_bfloat16_autocast_and_reaches_every_weight():
    draft = bound(random_mtp())
    states, texts = case([16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = unrolled_hidden(draft, torch.stack(states), torch.tensor([texts[0][:16]]), torch.tensor([[2, 9]]), 3)
        loss = F.cross_entropy(draft.bound[1](rows).float().flatten(0, 2), torch.zeros(6, dtype=torch.int64))
    loss.backward()
    missing = [name for name, p in draft.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


# ---- what the target hands out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_final_states_are_what_the_head_reads(fused):
    model = qwen3_target()
    tokens = torch.randint(2, VOCAB, (1, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state[0]
    target = TargetModel(qwen3_target(), fused=fused)
    assert target.path == ("fused" if fused else "modules")
    pages = Pages(1, 32, 4)
    target.alloc_kv(pages.num_slots)
    plain = target.forward(pages.batch([(0, 0, tokens[0].tolist())], logit_rows=[16, 3]))[0]
    for taps in ((FINAL,), (2, FINAL, 0)):
        target.set_taps(taps)
        logits, features = target.forward(pages.batch([(0, 0, tokens[0].tolist())], logit_rows=[16, 3]))
        at = taps.index(FINAL) * HIDDEN
        assert features.shape == (17, len(taps) * HIDDEN) and torch.equal(logits, plain)
        torch.testing.assert_close(features[:, at : at + HIDDEN], expected, atol=1e-4, rtol=1e-4)
    target.set_taps(())
    assert target.forward(pages.batch([(0, 0, [3])]))[1] is None


def test_a_target_whose_final_states_have_another_width_is_refused():
    target = TargetModel(qwen3_target())
    target._final_output = (1, 2, 7)
    with pytest.raises(UnsupportedModel, match=r"its last norm puts out \[1, 2, 7\] for two tokens"):
        target.set_taps((FINAL,))


# ---- in the engine ---------------------------------------------------------------------------------------------------

PROMPTS = [[(7 * i * i + 3 * n) % 90 + 2 for i in range(n)] for n in (1, 3, 9, 17, 30, 41)]


def params(name: str, seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=LENGTH, **SAMPLING[name])


def engine(draft="guesser", **options) -> LLM:
    model = qwen3_target()
    target = TargetModel(model)
    if draft == "guesser":
        draft = guesser(qwen3_target()).bind_target(target.embedding, target.lm_head)
    # What drafts is the head alone.
    options = {"page_size": 4, "max_running": 5, "adaptive": False, "lookup": False, **options}
    return LLM.from_parts(target, draft, tokenizer=None, token_bytes=BYTES, **options)


def ids(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[list[int]]]:
    """Texts of the requests alone, without drafts and without reuse."""
    with engine(None, max_running=1, prefix_cache=False) as llm:
        return {name: [ids(llm.generate([p], params(name, i)))[0] for i, p in enumerate(PROMPTS)] for name in SAMPLING}


OPTIONS = {
    "together": {},
    "no reuse": {"prefix_cache": False, "page_size": 1},
    "chunks": {"max_batch_tokens": 9},
    "few pages": {"num_pages": 26, "max_context": 80, "max_running": 8},
    "adaptive": {"adaptive": True, "costs": StepCosts(((1, 1.0), (64, 1.5)), ((1, 0.1), (64, 0.4)))},
    "trees that pay": {"adaptive": True, "tree_nodes": 7, "costs": StepCosts(((1, 1.0), (64, 1.1)))},
    "trees": {"tree_nodes": 12},
    "overlap": {"overlap": True},
    "one draft": {"block_size": 2},
}
# Every way to sample with whole blocks, every way to run with draws and with counts of earlier tokens.
CASES = [("together", name) for name in SAMPLING]
CASES += [(kind, name) for kind in OPTIONS for name in ("seeded", "penalties") if kind != "together"]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_text_does_not_depend_on_the_head(plain, kind, name):
    options = OPTIONS[kind]
    with engine(**options) as llm:
        sampling = [params(name, i) for i in range(len(PROMPTS))]
        for _ in range(2):
            assert ids(llm.generate(PROMPTS, sampling)) == plain[name]
        stats = llm.stats()
        assert stats["drafted"] > 0 and stats["running"] == stats["waiting"] == 0
        assert (stats["retractions"] > 0) == ("num_pages" in options)


def test_drafts_are_the_same_whoever_runs_beside_and_however_a_prompt_was_cut(plain):
    """Steps per request say what was drafted: with chunks, in company, and after a cached prefix that others computed."""
    alone = []
    with engine(prefix_cache=False, max_running=1) as llm:
        alone = [llm.generate([p], params("greedy", i))[0].metrics["steps"] for i, p in enumerate(PROMPTS)]
    assert min(alone) < LENGTH - 1, "some drafts are right"
    for options in ({}, {"max_batch_tokens": 7}, {"page_size": 1}):
        with engine(**options) as llm:
            sampling = [params("greedy", i) for i in range(len(PROMPTS))]
            for _ in range(2):
                assert [o.metrics["steps"] for o in llm.generate(PROMPTS, sampling)] == alone, options


def test_a_prefix_that_a_plain_request_left_does_not_spoil_the_drafts(plain):
    with engine() as llm:
        llm.generate(PROMPTS, params("greedy", 0), draft=False)
        assert ids(llm.generate(PROMPTS, [params("greedy", i) for i in range(len(PROMPTS))])) == plain["greedy"]


def test_an_interruption_and_an_abort_harm_nobody(plain, monkeypatch):
    with engine() as llm:
        stream = llm.stream(PROMPTS, [params("seeded", i) for i in range(len(PROMPTS))])
        texts, calls = finish_interrupted(llm, stream, monkeypatch, leaves=5)
    assert calls > 10 and [texts[i] for i in range(5)] == plain["seeded"][:5]


def test_what_is_injected_is_what_the_text_says(monkeypatch):
    """Whatever comes in between, the context of a running request is that of its tokens and of the target's states."""
    with engine(num_pages=26, max_context=80, max_running=8, max_batch_tokens=9) as llm:
        llm.generate(PROMPTS, params("seeded", 3))
        stream = llm.stream(PROMPTS[:4], params("seeded", 4))
        for _ in range(9):
            llm._loop.step()
        core, draft, found = llm._loop.core, llm._draft, 0
        plan = core.plan()
        for row in range(plan.row_ids.size):
            length = int(plan.context_lens[row])
            active = llm._requests.active[int(plan.request_ids[row])]
            text = (active.ids + active.record.tokens())[:length]
            if plan.is_prefill[row] or plan.draft_valid_from[row] or length < 2:
                continue
            places = np.arange(length)
            slots = core.page_table[plan.row_ids[row], places // 4].astype(np.int64) * 4 + places % 4
            with torch.no_grad():
                states = qwen3_target().model(torch.tensor([text])).last_hidden_state[0]
                torch.testing.assert_close(draft.runtime.states[slots], states, atol=2e-3, rtol=2e-3)
                layer = draft.layers[0]
                x = layer.input_layernorm(draft.join(torch.tensor(text[1:]), states[:-1]))
                keys, values = layer.self_attn.key_value(x, *draft.cos_sin(torch.arange(1, length), x.dtype))
            torch.testing.assert_close(draft.runtime.keys[slots[1:]], keys, atol=5e-3, rtol=5e-3)
            torch.testing.assert_close(draft.runtime.values[slots[1:]], values, atol=5e-3, rtol=5e-3)
            found += 1
        core.cancel(plan)
        stream.close()
        assert found >= 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    save_draft(random_mtp(), tmp_path)
    return tmp_path


def edit(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "attention_bias": True}], ids=str)
def test_a_saved_head_loads_to_the_same_weights_under_public_names(options, tmp_path):
    from safetensors import safe_open

    draft = random_mtp(**options)
    save_draft(draft, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_hidden.weight"} <= names
    assert all(name.startswith("mtp.") for name in names)
    assert ("mtp.layers.0.self_attn.q_norm.weight" in names) == draft.config.qk_norm
    loaded = load_draft(tmp_path, TargetModel(qwen3_target()))
    assert loaded.config == draft.config == read_draft_config(tmp_path) and loaded.kind == "mtp"
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers: got 2, expected 1: a head is one layer"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types: got \['sliding_attention'\], expected \['full_attention'\]"),
        ({"qk_norm": 1}, "qk_norm: got 1, expected true or false"),
        ({"block_size": 1}, "block_size: got 1"),
        ({"head_dim": 15}, "head_dim: got 15"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type of default"),
        ({"num_target_layers": ...}, "num_target_layers: got nothing"),
        ({"architectures": ["Mtp"]}, r"expected \['DFlashDraftModel'\], \['DFlash2DraftModel'\] or \['MtpDraft'\]"),
        ({"num_target_layers": 8}, "num_target_layers: got 8, expected the target's 6"),
        ({"vocab_size": 120}, "vocab_size: got 120, expected the target's 97"),
        ({"hidden_size": 64}, "hidden_size: got 64, expected the target's 48"),
        ({"intermediate_size": 64}, r"mlp.\w+_proj.weight: got shape"),
        ({"qk_norm": False}, r"self_attn.\w_norm.weight: unexpected tensor"),
        ({"attention_bias": True}, r"self_attn.\w_proj.bias: missing tensor"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_refused_by_name(changes, message, checkpoint):
    with pytest.raises(CheckpointError, match=message):
        load_draft(edit(checkpoint, **changes), TargetModel(qwen3_target()))


def test_bad_arguments_are_named():
    draft = random_mtp()
    with pytest.raises(InvalidArgument, match="not bound to a target"):
        draft.alloc_kv(8)
    with pytest.raises(InvalidArgument, match="embedding: width 7, expected the drafter's hidden_size 48"):
        draft.bind_target(torch.nn.Embedding(VOCAB, 7), torch.nn.Linear(7, VOCAB))
    bound(draft)
    with pytest.raises(InvalidArgument, match="no cache"):
        draft.candidates([1], [1], np.zeros((1, 1), dtype=np.int32), page_size=4)
    with pytest.raises(InvalidArgument, match="num_slots: got 0"):
        draft.alloc_kv(0)
    draft.alloc_kv(8)
    one = np.zeros(1, dtype=np.int64)
    for options, message in (
        ({}, "token_ids: got nothing"),
        ({"token_ids": one}, "before: got nothing"),
        ({"token_ids": np.zeros(2, dtype=np.int64), "before": one}, r"token_ids: got shape \[2\], expected \[1\]"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            draft.inject(torch.zeros(1, HIDDEN), one, one, **options)
    with pytest.raises(InvalidArgument, match=r"features: got shape \[1, 7\]"):
        draft.inject(torch.zeros(1, 7), one, one, token_ids=one, before=one)
    table = np.zeros((1, 2), dtype=np.int32)
    with pytest.raises(InvalidArgument, match="anchors: got 97"):
        draft.candidates([97], [1], table, page_size=4)
    with pytest.raises(InvalidArgument, match="block_size: got 1"):
        draft.candidates([1], [1], table, page_size=4, block_size=1)
    assert draft.candidates([], [], table, page_size=4, k=1)[0].shape == (0, 5, 1)
    draft.free()
    assert draft.runtime is None

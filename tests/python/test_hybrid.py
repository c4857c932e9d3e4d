"""Targets with recurrent layers beside attention: the text of transformers, and the same text however it is computed."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from hybrid_models import CONTEXT, KINDS, OTHERS, Knowing, build, keep_wrongly
from models_helpers import VOCAB, Pages

from dflash_rs import LLM, SamplingParams
from dflash_rs.errors import DflashError, InvalidArgument, UnsupportedModel
from dflash_rs.models.hybrid import find_mixers
from dflash_rs.models.hybrid.gated_delta import _Delta
from dflash_rs.models.hybrid.mixer import Mixer, Room, Span
from dflash_rs.models.target import TargetModel
from dflash_rs.models.target.probe import check_architecture

BYTES = [bytes([33 + token]) for token in range(VOCAB)]
PROMPTS = [np.random.default_rng(7 + n).integers(3, VOCAB, n).tolist() for n in (1, 2, 5, 17, 33, 50)]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=24, ignore_eos=True),
}


@functools.cache
def target(kind: str) -> TargetModel:
    return TargetModel(build(kind))


def engine(kind: str, draft=None, **options) -> LLM:
    # What drafts is the drafter alone, right or wrong.
    options = {"page_size": 4, "max_running": 4, "max_context": 128, "adaptive": False, "lookup": False, **options}
    made = kind if isinstance(kind, TargetModel) else target(kind)
    return LLM.from_parts(made, draft, tokenizer=None, token_bytes=BYTES, **options)


def ids(outputs) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.token_ids for output in outputs]


@functools.cache
def alone(kind: str, name: str) -> list[list[int]]:
    """Texts of the requests one after the other, without drafts, chunks and reuse."""
    with engine(kind, max_running=1, prefix_cache=False) as llm:
        return [ids(llm.generate([prompt], PARAMS[name]))[0] for prompt in PROMPTS]


def knowing(kind: str, name: str, **options) -> Knowing:
    draft = Knowing(target(kind), **options)
    draft.texts = [prompt + text for prompt, text in zip(PROMPTS, alone(kind, name), strict=True)]
    return draft


@pytest.mark.parametrize("kind", KINDS + OTHERS)
def test_greedy_texts_are_those_of_transformers(kind):
    model = build(kind)
    for prompt, text in zip(PROMPTS, alone(kind, "greedy"), strict=True):
        given = torch.tensor([prompt])
        with torch.inference_mode():
            own = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, min_new_tokens=24,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert own[0, len(prompt) :].tolist() == text
    assert len({token for text in alone(kind, "greedy") for token in text}) > 20


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 9, "page_size": 1},
        {"num_pages": 40, "max_running": 6},
    ],
    ids=["together", "no reuse", "chunks", "chunks of any length", "few pages"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_chunks_reuse_and_retraction_change_nothing(kind, name, options):
    draft = knowing(kind, name)
    with engine(kind, draft, **options) as llm:
        assert ids(llm.generate(PROMPTS, PARAMS[name], draft=False)) == alone(kind, name)
        for _ in range(2):
            assert ids(llm.generate(PROMPTS, PARAMS[name])) == alone(kind, name)
            with llm.stream([PROMPTS[3], PROMPTS[5]], PARAMS[name]) as gone:
                next(gone)
        stats = llm.stats()
        assert stats["running"] == stats["waiting"] == 0
        assert stats["tau"] > 1.5
        assert (stats["retractions"] > 0) == ("num_pages" in options)
        again = llm.generate([PROMPTS[5]], PARAMS[name])[0]
        assert (again.metrics["cached_prompt_tokens"] > 0) == options.get("prefix_cache", True)
        assert again.token_ids == alone(kind, name)[5]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_rules_say_the_same_in_chunks_with_few_pages_and_in_any_company(kind):
    for name in PARAMS:
        draft = knowing(kind, name)
        with engine(kind, draft, max_batch_tokens=24, page_size=4, num_pages=36, max_running=6) as llm:
            for _ in range(2):
                assert ids(llm.generate(PROMPTS, PARAMS[name])) == alone(kind, name)
                with llm.stream([PROMPTS[3], PROMPTS[5]], PARAMS[name]) as gone:
                    next(gone)
            stats = llm.stats()
            assert stats["tau"] > 1.5 and stats["retractions"] > 0
            again = llm.generate([PROMPTS[5]], PARAMS[name])[0]
            assert again.metrics["cached_prompt_tokens"] > 0 and again.token_ids == alone(kind, name)[5]


@pytest.mark.parametrize("wrong", ["none", "last", "all"])
@pytest.mark.parametrize("block", [2, 5, 16])
def test_blocks_that_are_kept_whole_in_part_or_not_at_all(block, wrong):
    with engine("dense", knowing("dense", "greedy", block_size=block, wrong=wrong)) as llm:
        assert ids(llm.generate(PROMPTS, PARAMS["greedy"])) == alone("dense", "greedy")
        tau = llm.stats()["tau"]
        assert tau == 1 if wrong == "all" or (wrong, block) == ("last", 2) else tau > 1.4


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_steps_in_which_everything_is_rejected_leave_the_state_where_plain_steps_do(kind):
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True, logprobs=0)
    prompts = [PROMPTS[2], PROMPTS[3]]
    with engine(kind, max_context=CONTEXT) as llm:
        plain = llm.generate(prompts, params)
    draft = Knowing(target(kind), 4, wrong="all")
    draft.texts = [prompt + output.token_ids for prompt, output in zip(prompts, plain, strict=True)]
    with engine(kind, draft, max_context=CONTEXT) as llm:
        drafted = llm.generate(prompts, params)
        assert llm.stats()["tau"] == 1
    assert ids(drafted) == ids(plain)
    model = build(kind)
    for prompt, output in zip(prompts, drafted, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output.token_ids]), use_cache=False).logits[0]
        own = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in output.logprobs])
        assert float((own - got).abs().max()) < 2e-3


def broken(mixer, fault: str):
    """`mixer.run` with a fault."""
    run = mixer.run

    def wrongly(room, spans, fed):
        going_on = [span.row for span in spans if not span.fresh]
        if fault == "fold nothing":
            room.pending[going_on] = 0
        window = room.pieces[1][going_on].clone()
        found = run(room, spans, fed)
        if fault == "fold no window":
            room.pieces[1][going_on] = window
        if fault == "run on":
            for row, start, end, _ in spans:
                _Delta.advance(mixer, [piece[row] for piece in room.pieces], [part[start:end] for part in fed])
        return found

    return wrongly


FAULTS = ("keep all", "keep one too few", "fold nothing", "fold no window", "run on", "no restore")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_state_is_seen(monkeypatch, fault):
    made = TargetModel(build("dense"))
    state, draft = made.state, knowing("dense", "greedy")
    keep = state.keep
    if fault == "keep all":

        def too_many(rows, counts):
            spans = state._pass.by_row
            wrong = np.array([spans[row].end - spans[row].start for row in rows.tolist()])
            keep_wrongly(state, keep, rows, counts, wrong)

        monkeypatch.setattr(state, "keep", too_many)
    elif fault == "keep one too few":

        def too_few(rows, counts):
            wrong = np.array([c - (1 < c <= draft.block_size) for c in counts.tolist()])
            keep_wrongly(state, keep, rows, counts, wrong)

        monkeypatch.setattr(state, "keep", too_few)
    elif fault == "no restore":

        def nothing(rows, checkpoints):
            state.pretend(rows, state._lengths[state._rows + checkpoints])

        monkeypatch.setattr(state, "restore", nothing)
    else:
        for mixer in state.mixers.values():
            monkeypatch.setattr(mixer, "run", broken(mixer, fault))
        if fault == "run on":
            monkeypatch.setattr(state, "keep", lambda rows, counts: state.pretend(rows, state._lengths[rows] + counts))
    with engine(made, draft, max_batch_tokens=64) as llm:
        outputs = [llm.generate(PROMPTS, PARAMS["greedy"]) for _ in range(2)]
    texts = [[output.token_ids for output in some] for some in outputs]
    assert any(text != alone("dense", "greedy") for text in texts)


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 9, "page_size": 1}], ids=["together", "chunks"])
def test_states_that_torch_moves_give_the_texts_of_those_that_the_kernel_moves(options):
    made, draft = TargetModel(build("next")), knowing("next", "seeded")
    assert all(mixer.host is not None for mixer in made.state.mixers.values())
    for mixer in made.state.mixers.values():
        mixer.host = None
    with engine(made, draft, **options) as llm:
        for _ in range(2):
            assert ids(llm.generate(PROMPTS, PARAMS["seeded"])) == alone("next", "seeded")


def test_a_step_that_is_interrupted_anywhere_in_a_forward_leaves_states_as_they_were(monkeypatch):
    made = TargetModel(build("dense"))
    draft, calls, mix = knowing("dense", "greedy"), 0, made.state.mix

    def interrupted(index, hidden):
        nonlocal calls
        calls += 1
        if calls % 7 == 3:
            raise KeyboardInterrupt
        found = mix(index, hidden)
        if calls % 7 == 5:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(made.state, "mix", interrupted)
    with engine(made, draft, max_batch_tokens=12) as llm:
        stream = llm.stream(PROMPTS, PARAMS["greedy"])
        interruptions = 0
        while llm._requests.active:
            try:
                llm._loop.step()
            except KeyboardInterrupt:
                interruptions += 1
        texts = {event.index: event.output.token_ids for event in stream if event.output is not None}
    assert interruptions > 20 and [texts[i] for i in range(len(PROMPTS))] == alone("dense", "greedy")


@pytest.mark.filterwarnings("ignore:layer")
def test_a_state_that_is_not_finite_fails_its_request_and_nobody_else(monkeypatch):
    made = TargetModel(build("dense"))
    keep, steps = made.state.keep, 0

    def spoil(rows, counts):
        nonlocal steps
        keep(rows, counts)
        steps += 1
        if steps == 5:
            room = made.state._rooms[1]
            room.pieces[0][int(rows[0]), 0, 0, 0] = torch.inf

    monkeypatch.setattr(made.state, "keep", spoil)
    with engine(made) as llm, pytest.warns(UserWarning, match="layer 1: the recurrent state of 1 of 3 requests"):
        outputs = llm.generate(PROMPTS[:3], PARAMS["greedy"])
    assert [output.finish_reason for output in outputs].count("error") == 1
    failed = next(output for output in outputs if output.error is not None)
    assert "NaN" in failed.error
    for output, text in zip(outputs, alone("dense", "greedy"), strict=False):
        assert output.error is not None or output.token_ids == text


def test_weights_in_bfloat16_have_float32_states_and_the_models_own_log_probabilities():
    made = TargetModel(build("dense").to(torch.bfloat16))
    draft = knowing("dense", "greedy")
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
    with engine(made, draft, max_batch_tokens=16) as llm:
        assert {room.pieces[0].dtype for room in made.state._rooms.values()} == {torch.float32}
        outputs = llm.generate(PROMPTS, params)
    model = build("dense").to(torch.bfloat16)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output.token_ids]), use_cache=False).logits[0].float()
        own = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in output.logprobs])
        assert float((own - got).abs().mean()) < 0.05


# ---- the layer -------------------------------------------------------------------------------------------------------


def room_of(mixer: Mixer, rows: int, block: int) -> Room:
    return Room(
        [torch.zeros(rows, *shape, dtype=dtype) for shape, dtype in mixer.pieces],
        [torch.zeros(rows, block, *shape, dtype=dtype) for shape, dtype in mixer.fed],
        torch.zeros(rows, dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "dense, by torch", *OTHERS])
def test_a_tokens_output_and_the_state_after_it_are_the_same_bits_in_any_block_and_company(kind, dtype):
    model = build(kind.partition(",")[0]).to(dtype)
    attended = {0, 1, 2, 3} if kind == "falcon" else {3}
    mixer = find_mixers(model, model.model.layers, attended)[0]
    if kind.endswith("by torch"):
        mixer.host = None
    # States are float32, last inputs what they came as.
    assert [piece[1] for piece in mixer.pieces] == [torch.float32, dtype][-len(mixer.pieces) :]
    generator = torch.Generator().manual_seed(1)
    count = 23
    fed = [torch.randn(2 * count, *shape, generator=generator).to(kept) for shape, kept in mixer.fed]
    whole = [torch.zeros(shape, dtype=kept) for shape, kept in mixer.pieces]
    expected = mixer.advance(whole, [part[:count] for part in fed])
    rng = np.random.default_rng(5)
    for _ in range(8):
        room, at, out = room_of(mixer, 3, 6), 0, []
        while at < count:
            n = int(rng.integers(1, 9))
            n = min(n, count - at)
            more = 0 if n > 6 else int(rng.integers(0, 7 - n))
            company = int(rng.integers(1, 6))
            # A neighbour's tokens first, then the row's, then what is rejected.
            now = [
                torch.cat((part[count : count + company], part[at : at + n], part[-more or len(part) :]))
                for part in fed
            ]
            spans = [Span(0, 0, company, True), Span(2, company, company + n + more, at == 0)]
            found, ends = mixer.run(room, spans, now)
            out.append(found[company : company + n])
            if n > 6:
                torch._foreach_copy_([piece[2] for piece in room.pieces], ends[2])
            else:
                room.pending[2] = n
            at += n
        mixer.settle(room, 2, False)
        assert torch.equal(torch.cat(out), expected)
        assert all(torch.equal(piece[2], end) for piece, end in zip(room.pieces, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_torch_reference_up_to_rounding(dtype):
    model = build("dense").to(dtype)
    mixer = find_mixers(model, model.model.layers, {3})[1]
    generator = torch.Generator().manual_seed(2)
    fed = [torch.randn(40, *shape, generator=generator).to(kept) for shape, kept in mixer.fed]
    found = []
    for host in (mixer.host, None):
        mixer.host = host
        state = [torch.zeros(shape, dtype=kept) for shape, kept in mixer.pieces]
        out = [mixer.advance(state, [part[start : start + 8] for part in fed]) for start in range(0, 40, 8)]
        found.append((torch.cat(out).float(), state[0]))
        assert torch.equal(state[1], fed[0][-mixer.taps + 1 :])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < bound


# ---- sizes, costs, refusals ------------------------------------------------------------------------------------------


def test_bytes_of_states_are_counted_and_leave_less_room_for_pages():
    made = target("dense")
    # Three layers: S [6, 8, 12] and three inputs of 2 * 16 + 72 channels; a token feeds in these channels and two gates per head.
    assert made.state.bytes_per_slot == 3 * 4 * (6 * 8 * 12 + 3 * 104)
    assert made.state.bytes_per_token == 3 * 4 * (104 + 12)
    with engine(made, knowing("dense", "greedy"), max_running=3) as llm:
        each = made.state.bytes_per_slot
        assert llm.stats()["state_bytes"] == 3 * (3 * each + 6 * made.state.bytes_per_token)


def test_what_a_pass_costs_is_measured_and_disturbs_no_text():
    draft = knowing("dense", "greedy")
    with engine("dense", draft, adaptive=True) as llm:
        rows = [rows for rows, _ in llm._loop.policy.costs.target]
        assert rows == [1, 2, 4, 8, 16]  # four requests with blocks of six
        assert ids(llm.generate(PROMPTS, PARAMS["greedy"])) == alone("dense", "greedy")


def test_what_recurrent_layers_cannot_do_is_refused_by_name():
    made = target("dense")
    with pytest.raises(InvalidArgument, match="tree_nodes: got 8, expected 0 with a target that keeps state"):
        engine("dense", knowing("dense", "greedy"), tree_nodes=8)
    with pytest.raises(InvalidArgument, match="matmul_precision"):
        TargetModel(build("dense"), matmul_precision="medium")
    with pytest.raises(InvalidArgument, match="overlap: got True"):
        engine("dense", overlap=True)
    made.alloc_kv(64)
    made.state.alloc(2, 0, 4)
    pages = Pages(2, 32, 4)
    with pytest.raises(InvalidArgument, match=r"row_ids: got 0\.\.2, expected 0\.\.1"):
        made.forward(Pages(3, 16, 4).batch([(0, 0, [1]), (2, 0, [1])]))
    made.forward(pages.batch([(0, 0, [1, 2]), (1, 0, [1, 2, 3, 4, 5])]))
    with pytest.raises(InvalidArgument, match=r"counts: got 3 for row 0, expected 0\.\.2"):
        made.state.keep(np.array([0]), np.array([3]))
    with pytest.raises(InvalidArgument, match="counts: got 4 for row 1, expected 5: of more than 4 tokens all or none"):
        made.state.keep(np.array([1]), np.array([4]))
    made.state.keep(np.array([0, 1]), np.array([1, 5]))
    # A text has to go on where its state stands, and one that goes on from a page has to bring a state along.
    with pytest.raises(DflashError, match="got 2 tokens before those of row 0, expected 1, which its state stands for"):
        made.forward(pages.batch([(0, 2, [3])]))
    with pytest.raises(DflashError, match="row 0 had no part in the last pass"):
        made.state.keep(np.array([0]), np.array([1]))
    made.free()
    made.state.free()


def test_a_prefix_that_is_hit_without_its_state_is_refused_by_name(monkeypatch):
    with engine(TargetModel(build("dense"))) as llm:
        llm.generate([PROMPTS[5]], PARAMS["greedy"])
        monkeypatch.setattr(llm._target.state, "restore", lambda rows, checkpoints: None)
        with pytest.raises(
            DflashError, match=r"got \d+ tokens before those of row 0, expected \d+, .* or a checkpoint to go on from"
        ):
            llm.generate([PROMPTS[5]], PARAMS["greedy"])


def test_a_layer_that_is_not_known_is_refused_by_name():
    from transformers import Qwen3_5TextConfig

    model = build("dense")
    config = Qwen3_5TextConfig(layer_types=["linear_attention", "chunked_attention"], num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match="layer_types has 'chunked_attention'"):
        check_architecture(config)

    class OtherRule(type(model.model.layers[1].linear_attn)):
        pass

    model.model.layers[1].linear_attn.__class__ = OtherRule
    with pytest.raises(
        UnsupportedModel, match="layer 1 has neither paged attention nor recurrent layers that are known"
    ):
        TargetModel(model)


def test_next_token_logits_have_a_state_of_their_own():
    texts = alone("dense", "greedy")
    with engine("dense") as llm, contextlib.closing(llm.stream([PROMPTS[4]], PARAMS["greedy"])) as events:
        first = [next(events) for _ in range(3)]
        assert int(llm.next_token_logits(PROMPTS[3]).argmax()) == texts[3][0]
        rest = [token for event in [*first, *events] for token in event.token_ids]
        assert rest == texts[4]

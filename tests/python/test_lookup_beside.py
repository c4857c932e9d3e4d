"""Look-up beside a drafter: the same text as plain, each row's drafts from whichever promises more."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from interruptions import finish_interrupted  # noqa: E402
from test_llm import LENGTH, PROMPTS, SAMPLING, idle, params, rounding_explains  # noqa: E402
from test_seams import BYTES, told  # noqa: E402
from test_seams import PROMPTS as TOY_PROMPTS  # noqa: E402
from toy_models import VOCAB, RecurrentTarget  # noqa: E402
from toy_models import LookUp as Teller  # noqa: E402

from dflash_rs import LLM, SamplingParams, StepCosts, _core  # noqa: E402
from dflash_rs.errors import InvalidArgument  # noqa: E402

GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
# A row more costs nothing, and neither does drafting: whatever is found is verified.
FREE = StepCosts(((1, 1.0), (64, 1.0)), ((1, 0.0), (64, 0.0)))


def ids(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def toys(draft, **options) -> LLM:
    options = {"page_size": 4, "max_running": 8, "costs": FREE, "lookup": True, **options}
    return LLM.from_parts(RecurrentTarget(), draft, tokenizer=None, token_bytes=BYTES, **options)


class Counted(Teller):
    """Counts the rows it is asked for."""

    asked = 0

    def candidates(self, anchors, *rest, **options):
        self.asked += len(anchors)
        return super().candidates(anchors, *rest, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["adaptive", "whole"])
def llm(request):
    torch.set_num_threads(1)
    with LLM(device="cpu", lookup=True, adaptive=request.param, num_pages=512) as engine:
        yield engine


@pytest.mark.parametrize("name", SAMPLING)
def test_the_text_is_the_same_with_and_without(llm, name):
    prompts = [llm.encode(p) for p in PROMPTS[:5]]
    options = [params(name, seed=i) for i in range(len(prompts))]
    # One alone, then several at once.
    fast = llm.generate(prompts[:1], options[:1]) + llm.generate(prompts[1:], options[1:])
    plain = llm.generate(prompts, options, draft=False)
    for prompt, a, b, o in zip(prompts, plain, fast, options, strict=True):
        assert a.token_ids == b.token_ids or rounding_explains(llm, prompt, a.token_ids, b.token_ids, o)
    assert idle(llm)


def test_it_takes_fewer_steps_than_either_alone():
    prompts, steps = PROMPTS[:12], {}
    for name, options in {"both": {}, "drafter": {"lookup": False}, "look-up": {"draft": "lookup"}}.items():
        with LLM(device="cpu", adaptive=False, num_pages=512, **options) as engine:
            steps[name] = sum(o.metrics["steps"] for o in engine.generate(prompts, GREEDY))
            assert engine.lookup == (name == "both")
    assert steps["both"] < min(steps["drafter"], steps["look-up"]), steps


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 30, "max_running": 8},
        {"max_batch_tokens": 9, "max_running": 4},
        {"prefix_cache": False, "page_size": 1},
        {"costs": StepCosts(((1, 1.0), (64, 4.0)), ((1, 0.2), (64, 0.4)))},
        {"block_size": 2},
    ],
    ids=["few pages", "chunks", "no reuse", "costs", "one draft"],
)
def test_retraction_chunks_reuse_and_what_pays_change_nothing(options):
    prompts = [p for p in PROMPTS[:6]] + [PROMPTS[0] + PROMPTS[1]]
    # By given costs: what a pass takes here would decide how much is drafted.
    with LLM(device="cpu", lookup=True, **({"max_context": 256, "costs": FREE} | options)) as engine:
        plain = ids(engine.generate(prompts, GREEDY, draft=False))
        for _ in range(2):
            assert ids(engine.generate(prompts, GREEDY)) == plain
        stats = engine.stats()
        assert stats["tau"] > 1 and idle(engine)
        assert (stats["retractions"] > 0) == ("num_pages" in options)


def test_aborts_and_interruptions_harm_nobody(monkeypatch):
    with LLM(device="cpu", lookup=True, adaptive=False) as engine:
        plain = ids(engine.generate(PROMPTS[:4], GREEDY, draft=False))
        texts, calls = finish_interrupted(engine, engine.stream(PROMPTS[:5], GREEDY), monkeypatch, leaves=4)
        assert calls > 10 and [texts[i] for i in range(4)] == plain and idle(engine)


def test_it_is_on_where_it_can_be():
    for options, on in (
        ({}, True), ({"lookup": False}, False), ({"draft": None}, False), ({"draft": "lookup"}, False),
        ({"tree_nodes": 4}, False), ({"overlap": True}, False), ({"overlap": False}, True),
    ):  # fmt: skip
        with LLM(device="cpu", adaptive=False, **options) as engine:
            assert engine.lookup is on, options


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_target_with_state_and_any_drafter(adaptive):
    sampling = SamplingParams(temperature=0.6, seed=3, max_tokens=30)
    with toys(None, lookup=False, costs=None) as engine:
        plain = ids(engine.generate(TOY_PROMPTS, sampling))
    options = {} if adaptive else {"adaptive": False, "costs": None}
    for draft in (Teller(), told(plain)):
        with toys(draft, **options) as engine:
            for _ in range(2):
                assert ids(engine.generate(TOY_PROMPTS, sampling)) == plain
            assert engine.stats()["drafted"] > 0


def test_where_the_text_promises_more_the_drafter_is_not_asked():
    bias = SamplingParams(temperature=0.0, max_tokens=80, logit_bias={11: 1000.0})
    draft = Counted()
    with toys(draft) as engine:
        loop = engine.generate([[11, 5, 11]], bias)[0]
        assert loop.token_ids == [11] * 80
        assert loop.metrics["steps"] <= 12 and draft.asked <= 2
        alone = draft.asked
        # Of two at once, the one whose text has nothing to say.
        distinct = [(7 * i) % VOCAB for i in range(20)]
        engine.generate([[11, 5, 11], distinct], [bias, SamplingParams(temperature=0.0, max_tokens=12)])
        assert alone < draft.asked <= alone + 16


def test_a_right_drafter_is_believed_where_the_text_has_nothing_to_say():
    sampling = SamplingParams(temperature=0.0, max_tokens=30)
    with toys(None, lookup=False, costs=None) as engine:
        plain = ids(engine.generate(TOY_PROMPTS, sampling))
    taus = []
    for draft, options in ((told(plain), {}), (told(plain), {"lookup": False})):
        with toys(draft, **options) as engine:
            assert ids(engine.generate(TOY_PROMPTS, sampling)) == plain
            taus.append(engine.stats()["tau"])
    # Texts of a random recurrence: what is looked up is seldom right, which is soon learnt, and does not come much in a good drafter's way.
    assert taus[0] > 0.8 * taus[1] > 1.5


def test_what_is_learnt_of_the_drafter_is_learnt_of_its_own_drafts():
    """A loop that is looked up says nothing of a drafter that is always wrong."""
    bias = SamplingParams(temperature=0.0, max_tokens=150, logit_bias={11: 1000.0})
    draft = Counted()
    with toys(draft) as engine:
        engine.generate([[11, 5, 11]], bias)
        planner = engine._loop.policy.planner
        assert engine.stats()["tau"] > 5
        # Only what was assumed at the start, and what it did itself.
        assert max(planner.acceptance(0.0)) <= 0.7 + 1e-6


def test_with_a_drafter_that_never_pays_look_up_goes_on_alone():
    draft = Counted()
    dear = StepCosts(((1, 1.0), (64, 1.0)), ((1, 100.0), (64, 100.0)))
    distinct = [(7 * i) % VOCAB for i in range(20)]
    sampling = SamplingParams(temperature=0.0, max_tokens=40)
    with toys(draft, costs=dear) as engine:
        output = engine.generate([distinct], sampling)[0]
        # But for the steps that look whether that has changed; the drafter could go on at any time.
        assert draft.asked <= 3 and draft.injected + len(engine._loop.backend._deferred) >= 50
        plain = engine.generate([distinct], sampling, draft=False)[0]
    assert output.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": None}, "lookup: got True, expected False: there is no drafter to look up beside"),
        ({"draft": "lookup"}, "lookup: got True, expected False: the drafter looks up already"),
        ({"tree_nodes": 4}, "lookup: got True, expected False: tree_nodes is 4"),
        ({"overlap": True}, "overlap: got True, expected None or False: what is looked up"),
        ({"lookup": 1}, "lookup: got 1"),
        ({"lookup": 0}, "lookup: got 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(InvalidArgument, match=message):
        LLM(device="cpu", **({"lookup": True} | options))


@pytest.mark.parametrize("options", [{"adaptive": False, "costs": None}, {}], ids=["whole", "adaptive"])
def test_a_drafter_of_longer_blocks_keeps_them(options):
    sampling = SamplingParams(temperature=0.0, max_tokens=60)
    with toys(None, lookup=False, costs=None) as engine:
        plain = ids(engine.generate(TOY_PROMPTS, sampling))
    draft = told(plain)
    draft.block_size = 24
    with toys(draft, **options) as engine:
        assert ids(engine.generate(TOY_PROMPTS, sampling)) == plain
        assert engine._loop.policy.look_up == 24 and engine.stats()["tau"] > 1.5


def test_many_requests_share_the_room_of_a_step():
    """Long rows for the first would leave none for the others."""
    prompts = [[11, n, 11] for n in range(1, 9)]
    bias = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={11: 1000.0})
    with toys(Counted(), max_batch_tokens=40) as engine:
        outputs = engine.generate(prompts, bias)
        assert all(output.token_ids == [11] * 40 for output in outputs)
        steps = [output.metrics["steps"] for output in outputs]
    # Three tokens for each of eight.
    assert max(steps) <= 26 and max(steps) - min(steps) <= 6, steps


def test_a_step_in_which_nobody_drafts_says_nothing_of_what_drafting_costs():
    draft = Counted()
    with toys(draft) as engine:
        policy, observed = engine._loop.policy, []
        policy.planner = _Watched(policy.planner, observed)
        policy._observes = True
        # The last step has room for one token alone.
        engine.generate([[(7 * i) % VOCAB for i in range(20)]], SamplingParams(temperature=0.0, max_tokens=4))
    assert draft.asked > 0 and observed[-1][2] == 0 and max(rows for _, _, rows, _ in observed) > 0


class _Watched:
    """A planner whose observations are written down."""

    def __init__(self, planner, observed):
        self._planner, self._observed = planner, observed

    def __getattr__(self, name):
        return getattr(self._planner, name)

    def observe_step(self, *what):
        self._observed.append(what)


def _second_step(engine, block: int = 5):
    """A core and a step of it whose request's text ends as it did before: 2 was followed by 1."""
    core = engine._loop.core
    core.add([1, 2, 1, 2], {"max_tokens": 12, "temperature": 1.0})
    core.commit(plan := core.plan(), core.accept_sampled(plan, np.array([1], dtype=np.int64)))
    return core, core.plan(block)


def test_time_that_was_not_spent_on_a_drafter_does_not_make_up_for_more_rows():
    chances = np.full((1, 7), 0.8, dtype=np.float32)
    names, found = np.arange(7)[None], np.array([7], dtype=np.int32)
    widths = []
    for asked in (False, True):
        with toys(Teller()) as engine:
            _, step = _second_step(engine, 8)
            planner = _core.Planner(8, target=[(1, 1.0), (65, 29.8)], draft=[(1, 2.0), (64, 2.0)])
            if asked:
                nothing = np.zeros_like(chances)
                planner.admit_either(step, (names, nothing, np.zeros_like(found)), (step.draft_rows, names, chances))
            else:
                planner.admit_either(step, (names, chances, found))
            widths.append(int(step.block_len[0]))
    assert widths[1] > widths[0] > 1


def test_a_planner_fills_in_the_drafts_that_promise_more():
    with toys(Teller()) as engine:
        core, step = _second_step(engine)
        planner = _core.Planner(8, target=[(1, 1.0), (9, 1.1)], draft=[(1, 0.1)])
        tokens, chances, found = core.look_up(step, 5)
        assert tokens[0, 0] == 2 and found[0] == 4
        assert planner.ask(step, chances, 1).size == 0
        assert planner.ask(step, np.zeros_like(chances), 3).tolist() == step.draft_rows.tolist() == [0]
        assert planner.ask(step, np.ones_like(chances), 3).size == 0
        own = np.array([[40, 41]]), np.array([[0.99, 0.98]], dtype=np.float32)
        planner.admit_either(step, (tokens, np.full_like(chances, 0.1), found), (step.draft_rows, *own))
        assert step.token_ids.tolist() == [1, 40, 41]
        # The next token tells of them, and nothing of a text.
        before = planner.acceptance(1.0)
        planner.record_step(step, core.accept_sampled(step, np.array([40, 7, 7])))
        after = planner.acceptance(1.0)
        assert after[0] > before[0] and after[1] < before[1]


def test_of_drafts_from_a_text_nothing_is_learnt_of_the_drafter():
    with toys(Teller()) as engine:
        core, step = _second_step(engine)
        planner = _core.Planner(8, target=[(1, 1.0), (9, 1.1)], draft=[(1, 0.1)])
        planner.admit_either(step, core.look_up(step, 5))
        assert step.token_ids.tolist() == [1, 2, 1, 2, 1]
        before = planner.acceptance(1.0), planner.exponent(1.0)
        planner.record_step(step, core.accept_sampled(step, np.full(5, 40)))
        assert (planner.acceptance(1.0), planner.exponent(1.0)) == before


def test_what_is_offered_for_a_step_is_checked_before_the_step_is_touched():
    with toys(Teller()) as engine:
        core, step = _second_step(engine)
        planner = engine._loop.policy.planner
        looked_up = tokens, chances, found = core.look_up(step, 5)
        rows, own = step.draft_rows, (np.zeros((1, 2), dtype=np.int64), np.zeros((1, 2), dtype=np.float32))
        before = step.token_ids.tolist()
        for call, message in (
            (lambda: planner.ask(step, chances, 0), "block: got 0, expected at least 1"),
            (lambda: planner.ask(step, np.repeat(chances, 2, 0), 3), r"chances: got shape \[2\], expected shape \[1\]"),
            (lambda: planner.ask(None, chances, 3), "plan: got None"),
            (lambda: planner.admit_either(step, (tokens, chances[:, :2], found)), "looked_up: got shape"),
            (lambda: planner.admit_either(step, (tokens, chances, found[:0])), "looked_up: got shape"),
            (lambda: planner.admit_either(step, (tokens, tokens, found)), "looked_up: got .*int64"),
            (lambda: planner.admit_either(step, looked_up, (rows, own[0], own[1][:, :1])), "own: got shape"),
            (
                lambda: planner.admit_either(step, looked_up, (rows[:0], *own)),
                r"own: got shape \[1, 2\], expected shape \[0, 2\]",
            ),
            (lambda: planner.admit_either(step, looked_up, (rows, own[1], own[1])), "own: got .*float32"),
            (
                lambda: planner.admit_either(step, looked_up, (rows + 1, *own)),
                "own: got row 1, expected rows of the step that draft",
            ),
        ):
            with pytest.raises(InvalidArgument, match=message):
                call()
        assert step.token_ids.tolist() == before
        with pytest.raises(InvalidArgument, match="tokens: got shape"):
            planner.admit(own[1], np.zeros(1, dtype=np.float32), np.array([3], dtype=np.int32), tokens=own[0][:, :1])
        with pytest.raises(InvalidArgument, match="context: got -1"):
            planner.observe(1, 1.0, context=-1)
        with pytest.raises(InvalidArgument, match="target_time: got -1"):
            planner.observe_step(step, -1.0)

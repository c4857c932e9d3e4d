"""Whatever is passed to what this package offers: it is taken, or refused by name in one line; nothing worse happens."""

from __future__ import annotations

import inspect
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import dflash_rs
from dflash_rs import (
    DflashError,
    DraftTree,
    InvalidArgument,
    PagePool,
    Planner,
    SamplingParams,
    StepCosts,
    StructuredOutputsParams,
    WidthPlanner,
    _core,
    serving,
    verify,
)
from dflash_rs.arguments import shown
from dflash_rs.config import EngineConfig

F32, I32, I64, U64 = np.float32, np.int32, np.int64, np.uint64


class Rude:
    """Does not even say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Endless(list):
    def __repr__(self) -> str:
        return "x" * 10**5


HOSTILE = [
    range(2**60), range(2**70), None, True, -1, 0, 1, 5, 2**31, 2**32, 2**63, 2**64, -(2**70), 10**5000,
    0.5, -0.5, float("nan"), float("inf"), 1e300, 1e-320, 1j, Decimal(1), Fraction(1, 10**400),
    "", "a", "x" * 10**5, "\ud800", "\0", b"", b"x" * 10**5,
    [], [[]], [None], [True], [-1], [0, 0], [0.5], [float("nan")], [2**70], ["a"], [[0], [0, 1]], [[[]]], Endless([1]), list(range(10**5)),
    (), (1, 2), range(3), range(2**60), {}, {1: float("nan")}, {"a": 1}, {-1: 1.0}, {10**5000: 1.0}, {0: 10**5000}, {1, 2}, object(), Rude(), int, len,
    np.int64(-1), np.float32("nan"), np.bool_(True), np.array(5), np.zeros(0), np.zeros(0, I64), np.zeros((0, 0), F32), np.zeros((2, 0), F32),
    np.full(3, np.nan, F32), np.full((2, 3), np.nan, F32), np.full((1, 3), 2.0, F32), np.zeros((1, 2, 3)), np.zeros((2, 0, 3), F32),
    np.full(2, -5, I32), np.full(2, 2**62, I64), np.full((1, 2), -5, I64), np.zeros(6, I32)[::2], np.zeros((4, 4), F32)[::2],
    np.zeros(2, object), np.array(["a"]), np.zeros(2, bool), np.zeros((1,) * 20, F32),
]  # fmt: skip


def tried(function, good: dict, names: tuple[str, ...], also: tuple[str, ...] = (), kinds=InvalidArgument) -> int:
    """Calls `function` with every hostile value for each argument; returns how many were refused.

    A refusal names the argument, another of the same call that it does not fit, or one of `also`.
    """
    refused, problems = 0, []
    for name in names:
        for value in HOSTILE:
            try:
                function(**(good | {name: value}))
            except kinds as error:
                refused += 1
                wrong = misspoken(str(error), {name, *good, *also})
            except BaseException as error:
                wrong = f"{type(error).__name__}: {error}"[:300]
            else:
                continue
            if wrong:
                problems.append(f"{function}({name}={shown(value)}): {wrong}")
    assert not problems, "\n".join(problems[:40])
    return refused


def misspoken(message: str, names: set[str]) -> str | None:
    """What a refusal should not have said, or left out."""
    if len(message) >= 300 or "\n" in message:
        return f"too long: {message[:300]}"
    if not re.search(rf"\b({'|'.join(names)})\b", message):
        return f"no name: {message}"
    got = re.search(r": got (.*), expected (.*)", message)
    if (got and got[1] == got[2]) or re.search(r"\d to \d|\.\.=|exclusive|row \d+: row|4294967295 at", message):
        return f"not as written elsewhere: {message}"
    return None


def verifiers():
    p, q = np.full((1, 3, 4), 0.25), np.full((1, 2, 4), 0.25)
    drafts, sampled = np.zeros((2, 3), I64), np.zeros((2, 4), I64)
    yield verify.walk, dict(drafts=drafts, sampled=sampled, lengths=None), ("drafts", "sampled", "lengths"), ()
    keyed = dict(p=p, q=q, drafts=np.zeros((1, 2), I64), seeds=[1], round_starts=[2])
    coins = dict(p=p, q=q, drafts=np.zeros((1, 2), I64), accept_coins=np.zeros((1, 2)), last_coins=[0.5])
    for function in (verify.token, verify.block):
        yield function, keyed, tuple(keyed), ("p", "coins", "drafts")
        yield function, coins, tuple(coins), ("p", "coins", "drafts")
        # One request alone.
        yield function, {k: v[0] for k, v in keyed.items()}, tuple(keyed), ("p", "coins", "drafts")
    good = dict(logits=np.zeros((2, 5), F32), positions=[0, 1], seeds=0)
    options = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    # Penalties that are finite can make logits that are not.
    more = ("logits", "positions", "paths")
    yield verify.sample_rows, good, (*good, *options, "logit_bias", "prompt", "output", "paths"), more
    yield verify.top_logprobs, dict(logits=np.zeros(5, F32), n=2), ("logits", "n"), ()
    names = ("seed", "position", "columns", "domain")
    couples = dict(tokens=np.zeros((1, 1, 2), I64), probabilities=np.ones((1, 1, 2), F32), k=1)
    couples |= dict(seeds=np.zeros(1, U64), positions=np.zeros(1, I64), temperatures=np.ones(1, F32))
    yield _core.couple, couples, tuple(couples), ()
    yield verify.gumbel, dict(seed=0, position=0, columns=3, domain="draw"), names, ()


def trees():
    tokens, log_probs = np.zeros((2, 3), I64), np.full((2, 3), -1, F32)
    good = dict(anchor=1, tokens=tokens, log_probs=log_probs, nodes=3)
    yield DraftTree.build, good, tuple(good), ()
    good = dict(anchor=1, log_probs=log_probs, nodes=3)
    yield DraftTree.from_log_probs, good, tuple(good), ()
    good = dict(anchor=1, drafts=tokens[0], log_probs=log_probs[0])
    yield DraftTree.chain, good, tuple(good), ("log_probs",)
    good = dict(tokens=tokens[0, :2], parents=np.array([-1, 0], I32))
    yield DraftTree.from_parents, good, tuple(good), ("parents",)
    tree = DraftTree.from_parents(**good)
    yield tree.path_tokens, dict(node=0), ("node",), ()
    yield tree.walk, dict(sampled=np.zeros(2, I64)), ("sampled",), ()


def bookkeeping():
    pool, costs = PagePool(4), [(0, 1.0), (1, 2.0)]
    yield pool.alloc, dict(count=0), ("count",), ("pages",)
    yield pool.retain, dict(pages=[]), ("pages",), ("page",)
    yield pool.release, dict(pages=[]), ("pages",), ("page",)
    yield pool.owners, dict(page=0), ("page",), ()
    yield PagePool, {}, ("num_pages",), ()
    good = dict(block_size=4, target=costs, draft=costs, context=0.1, tree_nodes=2)
    yield Planner, good, tuple(good), ()
    planner = Planner(4, tree_nodes=3)
    good = dict(temperatures=np.ones(1, F32), others=0, context=3, widths=[2, 4], room=9)
    yield planner.decide, good, tuple(good), ()
    rows = dict(temperatures=np.ones(1, F32), most=np.ones(1, I32), others=0, plan=None)
    good = dict(probabilities=np.full((1, 2), 0.5, F32), tokens=np.zeros((1, 2), I64)) | rows
    yield planner.admit, good, tuple(good), ("tokens", "temperatures", "most")
    good = (
        dict(anchors=np.zeros(1, I64), tokens=np.zeros((1, 2, 3), I64), probabilities=np.full((1, 2, 3), 0.5, F32))
        | rows
    )
    yield planner.admit_trees, good, tuple(good), ("tokens", "probabilities", "temperatures", "most")
    good = dict(drafted=2, accepted=1, temperature=1.0, probabilities=np.ones(2, F32))
    yield planner.record, good, tuple(good), ("accepted",)
    good = dict(plan=None, accepted=None)
    yield planner.record_step, good, tuple(good), ("plan",)
    yield planner.acceptance, {}, ("temperature",), ()
    yield planner.exponent, {}, ("temperature",), ()
    good = dict(target_rows=1, target_time=1.0, draft_rows=1, draft_time=0.5, context=3)
    yield planner.observe, good, tuple(good), ()
    widths = WidthPlanner([1, 4])
    yield WidthPlanner, {}, ("widths",), ()
    yield widths.choose, {}, ("requests",), ()
    yield widths.observe, dict(requests=1, width=4, seconds=0.1), ("requests", "width", "seconds"), ()
    yield widths.record, dict(width=4, accepted=[0]), ("width", "accepted"), ("accepted",)
    yield widths.times, {}, ("requests",), ()
    rooms = dict(committed=np.zeros(0, I64), allocated=np.zeros(0, I32), next=np.zeros(0, I32))
    good = dict(requests=[], ahead=1, page_size=1, **rooms)
    yield serving.plan_decode, good, tuple(good), ("committed", "allocated", "next")
    yield StepCosts, {}, ("target", "draft", "context"), ()
    yield (
        StepCosts.lines,
        dict(fixed=1.0, row=0.1, draft_fixed=0.1, draft_row=0.1),
        ("fixed", "row", "draft_fixed", "draft_row"),
        ("costs",),
    )
    yield StepCosts().planner, {}, ("block_size",), ()
    yield StepCosts().planner, dict(block_size=4), ("tree_nodes",), ()
    yield EngineConfig, {}, tuple(EngineConfig.__dataclass_fields__), ()
    yield SamplingParams, {}, tuple(SamplingParams.__dataclass_fields__), ()
    yield StructuredOutputsParams, {}, ("json", "regex", "choice", "grammar", "json_object"), ()
    yield StructuredOutputsParams, dict(regex="a"), ("disable_any_whitespace",), ()


def launched() -> tuple[_core.Engine, _core.StepPlan]:
    core = _core.Engine(num_pages=40, vocab_size=31, page_size=4, block_size=4, max_context=200)
    core.add([1, 2], {"max_tokens": 9})
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.array([7])))
    return core, core.plan()


def stages():
    sizes = dict(
        num_pages=4,
        vocab_size=31,
        page_size=4,
        block_size=4,
        max_context=20,
        max_running=2,
        max_batch_tokens=8,
        depth=0,
    )
    names = (*sizes, "eos_ids", "prefix_cache", "vocabulary")
    yield _core.Engine, sizes, names, ("max_batch_tokens", "num_pages")
    core, plan = launched()
    options = tuple(SamplingParams().for_core(0, True))
    yield (
        lambda prompt, **options: core.add(prompt, options),
        dict(prompt=[1]),
        ("prompt", *options),
        ("prompt", "max_tokens"),
    )
    yield core.add, dict(prompt=[1]), ("prompt", "params"), ()
    yield core.abort, {}, ("request_id",), ()
    # As many steps are unresolved as may be.
    yield core.plan, {}, ("max_block",), ("step",)
    yield core.device_sampling, {}, ("plan",), ()
    yield core.record, {}, ("request_id",), ()
    yield core.drafting, {}, ("most",), ()
    yield core.is_wanted, {}, ("plan",), ()
    outputs = dict(
        sampled=np.zeros(4, I64), status=np.zeros(4, I32), accepted=np.zeros(1, I32), drafts=None, logprobs=None
    )
    good = dict(plan=plan, **outputs, top_tokens=None, top_logprobs=None, edited=None)
    yield core.accept_outputs, good, tuple(good), ("sampled", "top_tokens", "top_logprobs", "step")
    ones, width = (
        ("query_starts", "start_known", "anchor_known", "context_lens", "valid_from"),
        core.page_table.shape[1],
    )
    arrays = dict.fromkeys(ones, np.zeros(2, I32)) | dict.fromkeys(("table_rows", "anchors"), np.zeros(2, I64))
    arrays |= dict(draft_rows=np.zeros(1, I32), draft_rows64=np.zeros(1, I64), sampling=np.zeros((1, 64), np.uint8))
    arrays |= dict(draft_sampling=np.zeros((1, 64), np.uint8))
    good = dict(
        plan=plan, wanted=core.device_sampling(plan), bucket=1, uncertain=0, pages=np.zeros((2, width), I32)
    ) | {name: array.copy() for name, array in arrays.items()}
    yield core.fill_inputs, good, tuple(good), ()
    yield core.cancel, {}, ("plan",), ()
    yield core.evict, {}, ("count",), ()
    logits = np.zeros((4, 31), F32)
    good = dict(plan=plan, logits=logits, edited=None)
    yield core.accept, good, tuple(good), ("logits", "step")
    edited = (np.array([1]), np.zeros((1, 31), F32), np.zeros((1, 31), F32), [None])
    yield core.draw_edited, dict(plan=plan, edited=edited), ("plan", "edited"), ("step",)
    for place in range(len(edited)):

        def draw(part, place=place):
            return core.draw_edited(plan, (*edited[:place], part, *edited[place + 1 :]))

        yield draw, {}, ("part",), ("edited", "step")
    good = dict(plan=plan, sampled=np.zeros(4, I64), logprobs=None, status=None, top_tokens=None, top_logprobs=None)
    good |= dict(edited=None)
    yield core.accept_sampled, good, tuple(good), ("sampled", "top_tokens", "top_logprobs", "step")
    accepted = core.accept_sampled(plan, np.zeros(4, I64))
    yield core.commit, dict(plan=None, accepted=accepted, injected=True), ("plan", "accepted", "injected"), ("plan",)
    yield plan.set_drafts, {}, ("drafts",), ()
    yield plan.narrow, {}, ("widths",), ()
    good = dict(tokens=np.full((1, 1), 7), parents=np.full((1, 1), -1, I32), counts=np.full(1, 9, I32))
    yield plan.set_trees, good, tuple(good), ("parents", "counts")


@pytest.mark.parametrize("calls", [verifiers, trees, bookkeeping, stages], ids=lambda calls: calls.__name__)
def test_what_is_passed_is_taken_or_refused_by_name(calls):
    for function, good, names, also in calls():
        assert tried(function, good, names, also, DflashError) > 8 * len(names), function


NOWHERE = (0, 0, 0)


def on_host():
    """What takes addresses on the host; those here are null and of nothing."""
    good = dict(
        query_starts=np.zeros(2, I32),
        context_lens=np.zeros(1, I32),
        page_table=np.zeros((1, 1), I32),
        row_ids=np.zeros(1, I32),
    )
    good |= dict(
        page_size=4, num_slots=8, slots=np.zeros(0, I64), valid_from=np.zeros(1, I32), ancestors=np.zeros((0, 1), U64)
    )
    yield _core.AttentionBatch, good, tuple(good), ("context_lens", "row_ids", "query_starts", "valid_from")
    batch = _core.AttentionBatch(**good)
    good = dict(weight=np.ones((4, 4), F32), bias=np.zeros(4, F32), precision="highest")
    yield _core.PackedWeight, good, tuple(good), ("bias",)
    weight = _core.PackedWeight(**good)
    yield weight.product, dict(x=NOWHERE, rows=0, out=NOWHERE, residual=None), ("x", "rows", "out", "residual"), ()
    good = dict(
        x=NOWHERE, rows=0, weight=NOWHERE, outputs=0, inputs=2, out=NOWHERE, dtype="bfloat16", bias=None, threads=1
    )
    yield _core.linear, good, tuple(good), ()
    yield _core.swiglu, dict(gate_up=NOWHERE, rows=0, width=0, out=NOWHERE), ("gate_up", "rows", "width", "out"), ()
    good = dict(
        gate_up=NOWHERE, down=NOWHERE, count=1, hidden=2, inner=1, dtype="float32", precision="highest", threads=1
    )
    shared = dict.fromkeys(("router", "shared_gate_up", "shared_down"), np.ones((2, 2), F32)) | dict(
        shared_gate=np.ones(2, F32)
    )
    good |= shared | dict(top_k=1, normalised=True)
    yield _core.Experts, good, tuple(good), ("gate_up",)
    one = np.ones(4, F32)
    places = dict(gate_up=(one.ctypes.data, 4, 2), down=(one.ctypes.data, 2, 1))
    experts = _core.Experts(**(good | places | dict.fromkeys(shared)))
    good = dict(x=NOWHERE, rows=0, out=NOWHERE, indices=np.zeros((0, 1), I64), weights=np.zeros((0, 1), F32))
    yield experts.run, good, tuple(good), ("indices", "weights", "x")
    arrays = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache", "out"), NOWHERE)
    sizes = dict(num_q_heads=0, num_kv_heads=0, head_dim=8, window=None, softcap=None, scale=1.0, sinks=None)
    good = dict(batch=batch, dtype="float32", mask="causal", **arrays, **sizes)
    yield _core.paged_attention, good, tuple(good), ()
    norm = np.ones(4, F32)
    yield _core.HostDecoder, dict(norm=norm, head=weight, eps=1e-6), ("norm", "head", "eps"), ()
    decoder = _core.HostDecoder(norm, weight, 1e-6)
    weights = dict.fromkeys(("qkv", "out", "gate_up", "down"), weight) | dict(attention_norm=norm, mlp_norm=norm)
    sizes = dict(heads=1, kv_heads=1, head_dim=4, scale=0.5, mask="causal", window=None, query_norm=norm, key_norm=norm)
    yield decoder.add_layer, weights | sizes, (*weights, *sizes), ()
    none, table = np.zeros(0, I64), (NOWHERE, 0)
    good = dict(
        batch=batch, token_ids=none, positions=none, embedding=table, rotary=table, caches=[], block=4, never=None, k=1
    )
    yield decoder.draft, good, tuple(good), ()
    passed = dict(logit_rows=none, logits=NOWHERE, taps=[], features=NOWHERE)
    good = {name: value for name, value in good.items() if name not in ("block", "never", "k")} | passed
    yield decoder.forward, good, tuple(good), ()
    good = dict(fc=weight, norm=norm, key_values=weight, key_norms=[], kv_heads=1, head_dim=4, eps=1e-6)
    yield _core.HostInjector, good, tuple(good), ()
    two = _core.PackedWeight(np.ones((8, 4), F32))
    injector = _core.HostInjector(**(good | dict(key_values=two, key_norms=[norm])))
    good = dict(features=NOWHERE, feature_rows=0, rows=none, positions=none, slots=none, rotary=table)
    good |= dict(caches=[(NOWHERE, NOWHERE)], num_slots=0)
    yield injector.inject, good, tuple(good), ("k_cache", "v_cache")


def on_a_gpu():
    """What takes tensors on a GPU: every argument of every function, by its own signature."""
    yield _core.cuda_sample_scratch, dict(rows=1, vocab=1), ("rows", "vocab"), ()
    tensor, numbers = (0, "int32", 0, (0,), (1,)), dict(eps=1e-6, scale=1.0, beta_scale=1.0)
    for function in (
        _core.cuda_probe, _core.cuda_prepare_block, _core.cuda_kv_inject, _core.cuda_block_attention, _core.cuda_sample_rows,
        _core.cuda_accept, _core.cuda_tree_top_k, _core.cuda_tree_build, _core.cuda_compact_kv,
        _core.cuda_delta_rule,
    ):  # fmt: skip
        sizes = {"page_size", "max_block_len", "max_keys", "max_nodes", "longest", "stream"}
        asked = inspect.signature(function).parameters.values()
        good = {a.name: 1 if a.name in sizes else numbers.get(a.name, tensor) for a in asked if a.default is a.empty}
        # What is read is looked at in order, and beyond that the call as a whole.
        yield function, good, tuple(a.name for a in asked), (*good, "head_dim", "logits", "ancestors")


@pytest.mark.parametrize("calls", [on_host, on_a_gpu], ids=lambda calls: calls.__name__)
def test_what_takes_addresses_says_which_argument_it_could_not_read(calls):
    for function, good, names, also in calls():
        assert tried(function, good, names, also, DflashError) > 8 * len(names), function


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.swiglu("x", 0, 0, NOWHERE), "gate_up: got 'x', expected an address, a row stride and a head stride"),
        (lambda: _core.swiglu(NOWHERE, -1, 0, NOWHERE), "rows: got -1, expected an integer in 0..18446744073709551615"),
        (lambda: _core.swiglu(NOWHERE, True, 0, NOWHERE), "rows: got True, expected an integer in 0..18446744073709551615"),
        (lambda: _core.swiglu(NOWHERE, 0, 0, NOWHERE, 0.5), "threads: got 0.5, expected an integer in 0..18446744073709551615"),
        (lambda: _core.cuda_probe(5, 0), "out: got 5, expected address, dtype, device, shape and strides of a tensor"),
        (lambda: _core.cuda_probe((0, "int8", 0, (1,), (1,)), 0), "out: got int8, expected float32, bfloat16, "),
        (lambda: _core.HostDecoder(np.ones(4, F32), None, 1e-6), "head: got None, expected a PackedWeight"),
        (lambda: _core.HostDecoder(np.ones(4), None, 1e-6), "head: got None, expected a PackedWeight"),
        (lambda: _core.PackedWeight(np.ones((4, 4), F32), precision=5), "precision: got 5, expected 'highest' or 'medium'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_the_words_of_every_other_argument(call, message):
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__)
def test_what_was_passed_is_shown_in_a_short_line(value):
    text = shown(value)
    assert 0 < len(text) <= 80 and "\n" not in text


def test_values_are_shown_as_python_writes_them_where_that_is_short():
    assert [shown(v) for v in (5, -1, "ab", [1, 2], None, 0.5, {"a": 1}, b"x")] == [
        "5", "-1", "'ab'", "[1, 2]", "None", "0.5", "{'a': 1}", "b'x'",
    ]  # fmt: skip
    assert shown(np.zeros((2, 3), F32)) == "a float32 array of shape (2, 3)"
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown(list(range(100))) == "[0, 1, 2, 3, ...]"
    assert shown("x" * 1000).count("x") < 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Planner(4).decide(np.full(1, np.nan, F32)), "temperatures: got NaN, expected finite numbers of at least 0"),
        (
            lambda: Planner(4).admit(np.ones((2, 0), F32), np.ones(2, F32), np.ones(2, I32)),
            "probabilities: got places of no drafts, expected at least one draft per request",
        ),
        (
            lambda: Planner(4).admit(np.ones((1, 3), F32), np.ones(1, F32), np.zeros(1, I32)),
            "most: got 0, expected at least 1, the anchor",
        ),
        (lambda: Planner(4, tree_nodes=3).decide(np.ones(1, F32), widths=[-1]), "widths: got [-1], expected integers in 2..4 that rise"),
        (lambda: Planner(4, tree_nodes=3).decide(np.ones(1, F32), widths=[4, 2]), "widths: got 2, expected integers in 2..4 that rise"),
        (lambda: SamplingParams(seed=10**5000), "seed: got an integer of 16610 bits, expected an integer in 0..18446744073709551615"),
        (lambda: SamplingParams(top_p=0), "top_p: got 0, expected a number in (0, 1]"),
        (lambda: SamplingParams(logit_bias={3: "x"}), "logit_bias[3]: got 'x', expected a number in [-3.40282e+38, 3.40282e+38]"),
        (lambda: PagePool(0), "num_pages: got 0, expected 1..67108864"),
        (
            lambda: DraftTree.from_parents(np.array([7, 8]), np.array([-1, -5], I32)),
            "parents: got -5 at node 1, expected a node before it, 0..0",
        ),
        (lambda: DraftTree.from_parents(np.zeros(0, I64), np.zeros(0, I32)), "tokens: got 0 elements, expected 1"),
        (
            lambda: verify.token(np.full((1, 2, 4), 0.25), np.full((1, 1, 4), 0.5), np.zeros((1, 1), I64), seeds=[1], round_starts=[0]),
            "request 0, row 0: q: got a sum of 2, expected probabilities that sum to 1 (within 1e-3)",
        ),
        (lambda: verify.walk(np.zeros((1, 3), I64), np.zeros((1, 4), I64), np.array([4])), "lengths: got 4, expected 0..3 (g)"),
        (lambda: verify.gumbel(0, 0, 3, "x" * 1000), "domain: got " + "x" * 100 + "..., expected draw, accept, residual or draft"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_got_and_what_was_expected(call, message):
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert str(caught.value) == message


def test_a_context_without_room_for_an_answer_is_refused():
    with pytest.raises(InvalidArgument, match=r"^max_context: got 1, expected 0 or at least 2"):
        EngineConfig(max_context=1)


def test_every_public_name_is_in_the_tables_or_needs_none():
    """A new name has to be tried as well, or to be put down here as one that takes nothing."""
    takes_nothing = {name for name in dflash_rs.__all__ if name.startswith("__")} | {"Output", "StreamEvent", "Stream"}
    errors = {
        n
        for n in dflash_rs.__all__
        if isinstance(getattr(dflash_rs, n), type) and issubclass(getattr(dflash_rs, n), DflashError)
    }
    tables = {"DraftTree", "PagePool", "Planner", "WidthPlanner", "StepCosts", "SamplingParams", "serving", "verify"}
    tables |= {"StructuredOutputsParams"}
    # tests/python/test_requests.py
    elsewhere = {"LLM"}
    assert set(dflash_rs.__all__) == takes_nothing | errors | tables | elsewhere

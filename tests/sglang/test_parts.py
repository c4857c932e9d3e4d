"""The parts of dflash_rs.sglang without a server, against the installed SGLang."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import _REGISTRY, get_spec
from torch.overrides import TorchFunctionMode

import dflash_rs.sglang
from dflash_rs.errors import CheckpointError, DflashError, InvalidArgument
from dflash_rs.sglang import ALGORITHM, algorithm, compat, config, drafter, grammar, requests, sampling
from dflash_rs.sglang.sampling import History, Penalties, TargetSampler
from dflash_rs.sglang.shapes import SHAPED, Shapes
from dflash_rs.sglang.widths import Widths

# --- contract ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered() -> algorithm.DflashRsAlgorithm:
    """The algorithm, registered the way SGLang does it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return get_spec(ALGORITHM)


def test_this_sglang_is_one_that_was_tested() -> None:
    assert compat.version() in compat.TESTED
    assert compat.problems() == []


def test_every_question_of_the_enum_has_an_answer() -> None:
    assert algorithm.missing_answers() == []


def test_the_answers_are_those_of_dflash(registered) -> None:
    for name in algorithm.AS_DFLASH:
        ask = getattr(SpeculativeAlgorithm.DFLASH, name)
        if not inspect.signature(ask).parameters:
            assert getattr(registered, name)() == ask(), name


def test_the_plugin_registers_and_the_worker_can_tell(registered) -> None:
    assert SpeculativeAlgorithm.from_string("dflash_rs") is registered
    algorithm.require_registered()


def test_a_plugin_that_failed_is_noticed(registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_REGISTRY, ALGORITHM)
    with pytest.raises(DflashError, match="plugin of dflash-rs failed"):
        algorithm.require_registered()


def test_a_request_check_that_is_not_in_place_is_noticed(registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.seams, "REQUEST_CHECK", "sglang.srt.nowhere")
    with pytest.raises(DflashError, match=r"sglang.srt.nowhere could not be hooked"):
        algorithm.require_registered()


def test_an_untested_version_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.9.0")
    with pytest.raises(compat.UnsupportedSGLang, match=r"got version 0.9.0, tested with"):
        compat.check(allow_untested=False)
    compat.check(allow_untested=True)


def test_an_untested_version_is_served_as_the_last_tested_one_before_it() -> None:
    assert [compat.served_as(version) for version in compat.TESTED] == list(compat.TESTED)
    oldest, newest = compat.TESTED[0], compat.TESTED[-1]
    for version in (f"{newest}.post1", f"{newest}rc1", "0.6.0", "1.0", "0.5.1000"):
        assert compat.served_as(version) == newest
    assert compat.served_as("0.4.9") == compat.served_as(f"{oldest}.post1") == compat.served_as("0.5.20") == oldest


def test_a_missing_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.seams.METHODS, "_accept_block", ("candidates", "fate"))
    monkeypatch.setitem(compat.seams.METHODS, "_gone", ())
    monkeypatch.delattr("sglang.srt.layers.sampler.Sampler._preprocess_logits")
    assert compat.problems() == [
        "DFlashWorkerV2._accept_block: no parameter fate",
        "DFlashWorkerV2._gone: not there",
        "Sampler._preprocess_logits: not there",
    ]
    if compat.version() == "0.5.23":
        module = "sglang.srt.speculative.dflash_worker_v2"
        monkeypatch.delattr(f"{module}.DFlashWorkerV2._draft_write_ids")
        monkeypatch.delattr(f"{module}.compute_spec_logprobs")
        assert compat.problems() == [
            "DFlashWorkerV2._draft_write_ids: not there",
            "dflash_worker_v2.compute_spec_logprobs: not there",
        ]


# --- grammars ---------------------------------------------------------------------------------------------------------


class Pattern:
    """A grammar that is over once it has seen the end token, 0."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def accept_token(self, token: int) -> None:
        if not self.is_terminated():
            self.seen.append(token)

    def is_terminated(self) -> bool:
        return 0 in self.seen


def ended(steps: list[list[int]], ignore_eos: bool, hooked: bool = True) -> tuple[list[int], bool, bool]:
    """What a request has written after these steps, whether its grammar ended it, and whether it has its grammar still. `hooked`: steps
    of several tokens, as with speculation; else one token at a time, in the order SGLang has without."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    tell = inspect.unwrap(SchedulerBatchResultProcessor._accept_grammar_tokens)
    ask = inspect.unwrap(Req.update_finish_state)
    req = Req.__new__(Req)
    req.rid, req.grammar, req.output_ids, req.to_finish, req.finished_reason = "r", Pattern(), [], None, None
    req.finished_len, req.vocab_size, req.tokenizer, req.eos_token_ids = None, 100, None, {0}
    req.sampling_params = SimpleNamespace(
        ignore_eos=ignore_eos, stop_token_ids=None, stop_strs=[], stop_regex_strs=[], max_new_tokens=100
    )
    for tokens in steps if hooked else [[token] for step in steps for token in step]:
        kept = grammar.accept(tell, None, req, tokens) if hooked else tokens
        req.output_ids.extend(kept)
        if hooked:
            grammar.finish(ask, req, len(kept))
        else:
            ask(req, 1)
            tell(None, req, tokens)
        if req.finished():
            break
    return list(req.output_ids), req.finished(), req.grammar is not None


@pytest.mark.parametrize(
    "steps",
    [[[5], [6, 0, 7, 8]], [[5], [6, 0], [7, 8]], [[5], [6, 0, 7]], [[0], [7]], [[5], [6, 8]], [[0, 7, 8]]],
    ids=["inside", "at the end", "before the last", "at once", "not yet", "in the first"],
)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_grammar_ends_a_request_where_it_ends_without_speculation(steps: list[list[int]], ignore_eos: bool) -> None:
    assert ended(steps, ignore_eos) == ended(steps, ignore_eos, hooked=False)


# --- server arguments -------------------------------------------------------------------------------------------------


def server_args(**changes: Any) -> SimpleNamespace:
    """What `fill_in` reads, with SGLang's defaults."""
    from servers import DRAFT

    values = {
        "speculative_draft_model_path": DRAFT,
        "speculative_draft_model_revision": None,
        "speculative_num_draft_tokens": None,
        "speculative_dflash_block_size": None,
        "speculative_num_steps": None,
        "speculative_eagle_topk": None,
        "speculative_draft_window_size": None,
        "speculative_draft_attention_backend": None,
        "max_running_requests": None,
        "trust_remote_code": False,
        "pp_size": 1,
        "disaggregation_mode": "null",
        "enable_pd_role_switch": False,
        "enable_dp_attention": False,
        "attn_dp_size": 1,
        "attn_cp_size": 1,
        "enable_dp_lm_head": False,
        "enable_streaming_session": False,
    }
    return SimpleNamespace(**values | changes)


def test_the_block_comes_from_the_drafter_unless_given() -> None:
    args = server_args()
    algorithm.fill_in(args)
    assert args.speculative_num_draft_tokens == 8
    assert (args.speculative_num_steps, args.speculative_eagle_topk, args.max_running_requests) == (1, 1, 48)
    args = server_args(speculative_dflash_block_size=5, max_running_requests=3)
    algorithm.fill_in(args)
    assert (args.speculative_num_draft_tokens, args.max_running_requests) == (5, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"speculative_draft_model_path": None}, "--speculative-draft-model-path: not given"),
        ({"speculative_draft_model_path": "/nowhere"}, "--speculative-draft-model-path: /nowhere"),
        ({"pp_size": 2}, "--pp-size: got 2"),
        ({"speculative_num_draft_tokens": 1}, "--speculative-num-draft-tokens: got 1"),
        (
            {"speculative_num_draft_tokens": 4, "speculative_dflash_block_size": 8},
            "--speculative-num-draft-tokens: got 4, but --speculative-dflash-block-size is 8",
        ),
        (
            {"speculative_draft_window_size": 4},
            "--speculative-draft-window-size: got 4, expected at least the block, 8",
        ),
    ],
)
def test_contradictory_flags_are_named(changes: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        algorithm.fill_in(server_args(**changes))


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"attn_dp_size": 2}, "--enable-dp-lm-head: not given, expected with --attn-dp-size 2"),
        (
            {"attn_dp_size": 2, "enable_dp_lm_head": True, "attn_cp_size": 2},
            "--attn-cp-size: got 2, expected 1 with --attn-dp-size 2",
        ),
        ({"attn_dp_size": 2, "enable_dp_lm_head": True}, None),
        ({"enable_pd_role_switch": True}, "--enable-pd-role-switch: got true, expected false with this SGLang"),
        ({}, None),
    ],
)
def test_what_only_the_newest_can_be_asked_for_is_refused_by_name(changes: dict, answer: str | None) -> None:
    # Flags that 0.5.17 does not have.
    from dflash_rs.sglang.compat import v0_5_23

    assert v0_5_23.Version().refused(server_args(**changes)) == answer


ATTENTION = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}


@pytest.mark.parametrize(
    ("changes", "oldest", "newest"),
    [
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode: got prefill, expected null", None),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode: got decode, expected null", None),
        ({"pp_size": 2}, *["--pp-size: got 2, expected 1"] * 2),
        (ATTENTION, "--enable-dp-attention: got true, expected false", "--enable-dp-lm-head: not given, expected with"),
        (ATTENTION | {"enable_dp_lm_head": True}, "--enable-dp-attention: got true, expected false", None),
        ({"enable_streaming_session": True}, "--enable-streaming-session: got true, expected false", None),
        ({"enable_hierarchical_cache": True}, None, None),
        ({"dp_size": 2}, None, None),
    ],
)
def test_sglang_itself_passes_the_refusals_on(
    registered, changes: dict, oldest: str | None, newest: str | None
) -> None:
    """Through SGLang's own command line, whose names for the same thing change from version to version."""
    from servers import arguments, speculative
    from sglang.srt.server_args import prepare_server_args

    def resolve() -> None:
        args = prepare_server_args(arguments(**speculative(**changes)))
        if compat.version() != "0.5.17":
            args.resolve_once()  # 0.5.17 does so at once

    expected = oldest if compat.version() == "0.5.17" else newest
    if expected is None:
        resolve()
        return
    with pytest.raises(InvalidArgument, match=expected):
        resolve()


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_come_inline_or_from_a_file(tmp_path) -> None:
    assert config.parse(None) == config.parse(" ") == config.Options()
    assert config.parse('{"alarm_tau": 0, "metrics": false}') == config.Options(alarm_tau=0, metrics=False)
    file = tmp_path / "options.json"
    file.write_text('{"alarm_passes": 10}')
    assert config.parse(str(file)).alarm_passes == 10
    assert config.parse(f'{{"alarm_passes": {2**31 - 1}}}').alarm_passes == 2147483647
    file.write_text("null\n")
    with pytest.raises(InvalidArgument, match="got null, expected an object"):
        config.parse(str(file))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"alarm": 1}', "unknown option alarm; known are alarm_tau, alarm_passes"),
        ('{"alarm_tau": "high"}', "alarm_tau: got 'high', expected a finite number"),
        ('{"alarm_passes": 0}', "alarm_passes: got 0, expected an integer of at least 1"),
        ('{"metrics": 1}', "metrics: got 1, expected true or false"),
        ('{"coupled": "no"}', "coupled: got 'no', expected true or false"),
        ('{"max_drafts": -1}', "max_drafts: got -1, expected an integer of at least 0"),
        ('{"max_drafts": true}', "max_drafts: got True, expected an integer"),
        ('{"max_draft_context": "long"}', "max_draft_context: got 'long', expected an integer of at least 0"),
        ('{"adaptive": "often"}', "adaptive: got 'often', expected true, false or \"cycle\""),
        ('{"adaptive": 1}', "adaptive: got 1, expected true, false"),
        ('{"widths": 4}', "widths: got 4, expected a list of integers"),
        ('{"widths": []}', r"widths: got \[\], expected a list of integers"),
        ('{"widths": [0, 4]}', r"widths: got \[0, 4\], expected a list of integers of at least 1"),
        ('{"widths": [true]}', r"widths: got \[True\], expected a list of integers"),
        ('{"widths": [4, 4]}', r"widths: got \[4, 4\], expected each width once"),
        ('{"widths": [1, 4], "adaptive": false}', r"widths: got \[1, 4\], expected none with"),
        (f'{{"alarm_passes": {2**31}}}', "alarm_passes: got 2147483648, expected .* at most 2147483647"),
        ('{"metrics": true, "widths": [1], "metrics": false}', "metrics: given more than once, expected once"),
        ("null", "got null, expected an object"),
        ("[1, 2]", r"got \[1, 2\], expected an object"),
        ("{", "not JSON"),
        ("/nowhere.json", "got '/nowhere.json', expected a JSON object or a path"),
    ],
)
def test_bad_options_are_named(text: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        config.parse(text)


def test_the_widths_are_powers_of_two_and_the_block_unless_given() -> None:
    assert config.parse(None).widths_of(8) == (1, 2, 4, 8)
    assert config.parse(None).widths_of(6) == (1, 2, 4, 6)
    assert config.parse('{"adaptive": false}').widths_of(6) == (6,)
    assert config.parse('{"widths": [8, 1, 5]}').widths_of(8) == (1, 5, 8)
    with pytest.raises(InvalidArgument, match=r"widths: got \[1, 16\], expected at most the block, 8"):
        config.parse('{"widths": [1, 16]}').widths_of(8)


def test_a_width_beyond_the_block_is_refused_before_a_model_is_loaded(
    registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.VARIABLE, '{"widths": [1, 16]}')
    with pytest.raises(InvalidArgument, match=r"widths: got \[1, 16\], expected at most the block, 8"):
        registered.handle_server_args(server_args())


# --- requests ---------------------------------------------------------------------------------------------------------


def request(**params: Any) -> SimpleNamespace:
    """A request of SGLang, as far as it is looked at."""
    values = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "min_p": 0.0,
        "top_k": 1 << 30,
        "top_p": 1.0,
        "stop_token_ids": None,
    }
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**values | params),
        return_hidden_states=False,
        return_sampling_mask=False,
        origin_input_ids=[0, 1, 2],
        output_ids=[],
        tokenizer=None,
        eos_token_ids=None,
        custom_logit_processor=None,
        logprob=SimpleNamespace(top_logprobs_num=0),
        vocab_size=100,
        rid="r",
    )


def test_min_p_is_refused_only_where_draws_are_seeded() -> None:
    assert requests.why_not(request(min_p=0.1), seeded=False) is None
    assert "min_p: got 0.1, expected 0 with --enable-deterministic-inference" in requests.why_not(
        request(min_p=0.1), True
    )


def test_min_p_of_a_greedy_request_is_dropped() -> None:
    asked = request(min_p=0.1, top_k=1)
    shared = asked.sampling_params
    requests.without_idle_filters(asked)
    assert asked.sampling_params.min_p == 0 and shared.min_p == 0.1 and requests.why_not(asked, True) is None
    asked = request(min_p=0.1, top_k=2)
    requests.without_idle_filters(asked)
    assert asked.sampling_params.min_p == 0.1


def test_what_would_end_the_server_is_refused() -> None:
    def prompt(*ids: int) -> SimpleNamespace:
        asked = request()
        asked.origin_input_ids = array("q", ids)
        return asked

    assert requests.why_not(prompt(), False).startswith("input_ids: got none, expected at least one token")
    assert requests.unknown_tokens(prompt(0, 99)) is None
    for outside in (-3, 100):
        assert (
            requests.unknown_tokens(prompt(1, outside)) == f"input_ids: got {outside}, expected 0..99, the vocabulary"
        )
    asked = request()
    for many, refused in ((100, False), (101, True), (-1, True), (None, False)):
        asked.logprob.top_logprobs_num = many
        assert (
            requests.why_not(asked, False) == f"top_logprobs_num: got {many}, expected 0..100, the vocabulary"
        ) is refused


def test_more_logprobs_than_a_prefill_server_hands_on_are_refused() -> None:
    asked = request()
    for many, most, refused in ((128, 128, False), (129, 128, True), (129, None, False), (None, 128, False)):
        asked.logprob.top_logprobs_num = many
        assert (
            requests.too_many_logprobs(asked, most)
            == f"top_logprobs_num: got {many}, expected at most 128 with --disaggregation-mode"
        ) is refused


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"callable": "00"}', '{"callable": "80044b052e"}'])
def test_a_custom_processor_that_cannot_be_read_is_refused(text: str) -> None:
    assert requests.unreadable(text).startswith("custom_logit_processor: got what reads as ")


def test_a_custom_processor_that_can_be_read_is_served() -> None:
    import cases

    assert requests.unreadable(None) is None
    for fields in cases.custom().values():
        assert requests.unreadable(fields["custom_logit_processor"]) is None


def test_a_refused_request_asks_for_nothing_any_more() -> None:
    refused = request(min_p=0.1)
    shared, refused.return_hidden_states = refused.sampling_params, True
    refused.logprob.top_logprobs_num, refused.custom_logit_processor = 101, "nonsense"
    refused.origin_input_ids_unpadded = array("q", [-3])
    requests.harmless(refused)
    assert requests.why_not(refused, seeded=True) is None and shared.min_p == 0.1
    assert refused.custom_logit_processor is None and list(refused.origin_input_ids_unpadded) == [0]


# --- penalties --------------------------------------------------------------------------------------------------------

V = 12


def naive(logits: torch.Tensor, output: list[int], p: SimpleNamespace, stops: list[int]) -> torch.Tensor:
    """The adjusted logits of one row after `output`, one token at a time."""
    row = logits.clone()
    for token in range(V):
        n = output.count(token)
        row[token] -= p.frequency_penalty * n + p.presence_penalty * (n > 0)
    if len(output) < p.min_new_tokens:
        row[stops] = -torch.inf
    for token in set(output):
        row[token] = row[token] * p.repetition_penalty if row[token] < 0 else row[token] / p.repetition_penalty
    return row


@pytest.mark.parametrize("at_a_time", [1, 2, 99])
def test_penalties_count_the_path_to_each_place(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_PENALTY_BYTES", at_a_time * sampling._PENALTY_COPIES * 4 * 4 * V)
    generator = torch.Generator().manual_seed(3)
    several = [
        request(),
        request(frequency_penalty=0.5, presence_penalty=0.25),
        request(repetition_penalty=1.5, min_new_tokens=6, stop_token_ids=[4, 7]),
        request(min_new_tokens=5, stop_token_ids=[1]),
    ]
    slots = torch.tensor([3, 1, 5, 2])
    sampler = TargetSampler(None, 6, V, "cpu")
    info = SimpleNamespace(logit_bias=None, has_custom_logit_processor=False)
    outputs = [[2], [5, 5, 1], [4, 2, 2], [7, 3, 3]]
    for req, output in zip(several, outputs):
        req.output_ids = output[:-1]
    info.acc_additive_penalties, info.acc_scaling_penalties = torch.zeros(4, V), None
    sampler.history.start(slots, [req.output_ids for req in several])
    last = torch.tensor([[output[-1]] for output in outputs])
    sampler.committed(several, slots, last, torch.ones(4, dtype=torch.int32))
    for _ in range(6):
        block = torch.randint(0, V, (4, 4), generator=generator)
        block[:, 0] = torch.tensor([output[-1] for output in outputs])
        logits = torch.randn(4, 4, V, generator=generator)
        starts = torch.tensor([3 + len(output) - 1 for output in outputs])
        adjusted = logits.clone()
        sampler.adjust(adjusted, info, several, slots, block, starts)
        for r, req in enumerate(several):
            for place in range(4):
                path = outputs[r] + block[r, 1 : place + 1].tolist()
                stops = req.sampling_params.stop_token_ids or []
                expected = naive(logits[r, place], path, req.sampling_params, stops)
                torch.testing.assert_close(adjusted[r, place], expected, rtol=0, atol=1e-5)
        gained = torch.randint(0, V, (4, 4), generator=generator)
        lengths = torch.randint(1, 5, (4,), generator=generator).to(torch.int32)
        sampler.committed(several, slots, gained, lengths)
        for r, output in enumerate(outputs):
            output += gained[r, : int(lengths[r])].tolist()


class OnlyPinned(TorchFunctionMode):
    """Notes what makes tensors of the host's numbers, or moves them, other than `sampling.put`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tensor", "as_tensor", "from_numpy", "to", "cuda", "pin_memory"):
            caller = next(f for f in inspect.stack()[1:] if f.filename == sampling.__file__)
            moves = function.__name__ != "to" or any(isinstance(a, (str, torch.device)) for a in args[1:])
            if caller.function != "put" and moves:
                self.found.append(f"{caller.function}: {function.__name__}")
        return function(*args, **(kwargs or {}))


def sampling_info(rows: int, **more: Any) -> Any:
    """SGLang's sampling info of requests that sample."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    ones = torch.ones(rows)
    return SamplingBatchInfo(
        **{"temperatures": ones[:, None], "top_ps": ones, "top_ks": torch.full((rows,), 1 << 30), "min_ps": 0 * ones},
        **{"is_all_greedy": False, "is_any_greedy": False, "vocab_size": V},
        **{"need_top_p_sampling": False, "need_top_k_sampling": False, "need_min_p_sampling": False},
        **more,
    )


def _moved_by_hand() -> None:
    """What a step must not do, in a function that counts as the sampler's."""
    code = compile("def moved_by_hand(torch):\n    torch.tensor([1])", sampling.__file__, "exec")
    made: dict[str, Any] = {}
    exec(code, made)
    made["moved_by_hand"](torch)


def test_a_step_copies_to_the_device_from_pinned_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pageable copy waits for the step that runs there, and with it the host: overlap is lost."""
    several = [
        request(),
        request(frequency_penalty=0.5, top_k=3),
        request(repetition_penalty=1.5, min_new_tokens=6, stop_token_ids=[4, 7]),
        request(min_new_tokens=5, stop_token_ids=[1], top_p=0.9),
    ]
    slots = torch.tensor([3, 1, 5, 2])
    info = sampling_info(4, sampling_seed=torch.arange(4), custom_params=[None] * 4, has_custom_logit_processor=True)
    entry = SimpleNamespace(processor=lambda logits, params: logits, rows=[0, 2])
    monkeypatch.setattr(compat.installed(), "processors", lambda _: [(entry.processor, entry.rows)], raising=False)
    sampler = TargetSampler(lambda output, *_: output.next_token_logits.argmax(-1), 6, V, "cpu")
    for req in several:
        req.output_ids = [2, 5]
    info.acc_additive_penalties, info.acc_scaling_penalties = torch.zeros(4, V), None
    block, starts = torch.randint(0, V, (4, 4)), torch.full((4,), 5)
    # What it imports on first use makes tensors, too.
    importlib.import_module("sglang.srt.layers.logits_processor")
    with OnlyPinned() as seen:
        sampler.enter(several, slots, info)
        tokens = sampler.targets(torch.randn(16, V), info, several, slots, block, starts)
        sampler.committed(several, slots, tokens, torch.ones(4, dtype=torch.int32))
    assert seen.found == []
    with OnlyPinned() as seen:
        _moved_by_hand()
    assert seen.found == ["moved_by_hand: tensor"], "the look-out sees what it looks for"


@pytest.mark.parametrize("scored", [False, True])
def test_logits_are_copied_for_the_sampler_only_where_log_probabilities_are_read_afterwards(scored: bool) -> None:
    given: list[torch.Tensor] = []

    def sampler(output: Any, *_: Any) -> torch.Tensor:
        given.append(output.next_token_logits)
        return output.next_token_logits.copy_(output.next_token_logits.softmax(-1)).argmax(-1)

    several, logits = [request(), request()], torch.randn(8, V)
    info = sampling_info(2)
    wanted, kept = logits.argmax(-1), logits.clone()
    targets = TargetSampler(sampler, 6, V, "cpu")
    tokens = targets.targets(
        logits, info, several, torch.tensor([0, 1]), wanted.view(2, 4), torch.tensor([3, 3]), scored
    )
    assert tokens.flatten().tolist() == wanted.tolist()
    assert (given[0].data_ptr() != logits.data_ptr()) == scored and torch.equal(logits, kept) == scored


def test_a_row_starts_anew_with_each_request() -> None:
    history = History(4, V, "cpu")
    history.start(torch.tensor([2]), [[1, 1, 5]])
    assert history.at(torch.tensor([2]), torch.zeros((1, 0), dtype=torch.int64))[0, 0].tolist()[:6] == [
        0,
        2,
        0,
        0,
        0,
        1,
    ]
    history.start(torch.tensor([2]), [[]])
    assert not history.table.any()


def test_requests_without_penalties_cost_nothing() -> None:
    assert not Penalties([request(), request(min_p=0.2)], torch.tensor([0, 1]), "cpu")
    sampler = TargetSampler(None, 4, V, "cpu")
    sampler.committed([request()], torch.tensor([0]), torch.tensor([[1]]), torch.tensor([1]))
    assert sampler.history.table is None


# --- widths -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def serve(widths: Widths, clock: Clock, steps: int, requests: int, seconds: Any, likely: int) -> list[int]:
    """Steps with overlap scheduling, accept lengths one step late: `likely` drafts of each request are right."""
    chosen: list[int] = []
    for _ in range(steps):
        chosen.append(widths.next(requests))
        clock.now += seconds(requests, chosen[-1])
        if len(chosen) > 1:
            assert widths.verified([min(likely, chosen[-2] - 1)] * requests)[:2] == (chosen[-2], None)
    widths.interrupted()
    widths.verified([min(likely, chosen[-1] - 1)] * requests)
    return chosen


def test_the_width_follows_what_steps_take_and_what_is_accepted() -> None:
    clock = Clock()
    widths = Widths([1, 2, 4, 8], clock=clock)
    # Rows for nothing and all drafts right; then rows that cost, and a drafter that is never right.
    assert serve(widths, clock, 60, 4, lambda r, w: 0.01, 7)[-20:] == [8] * 20
    chosen = serve(widths, clock, 800, 4, lambda r, w: 0.01 + 0.02 * r * w + 0.01 * (w > 1), 0)
    assert chosen[-400:].count(1) > 360


def test_what_lies_between_two_steps_is_not_taken_for_one() -> None:
    clock = Clock()
    widths = Widths([8, 16], clock=clock)
    for _ in range(50):
        widths.next(2)
        clock.now += 0.5
        widths.interrupted()  # a prefill
        clock.now += 3.0
    assert widths.planner.times(2) == [None, None]
    width = widths.next(2)
    clock.now += 0.25
    widths.next(2)
    assert widths.planner.times(2)[[8, 16].index(width)] == 0.25


def test_where_steps_are_launched_ahead_a_time_counts_after_a_step_of_the_same_width_only() -> None:
    clock = Clock()
    widths = Widths([1, 8], ahead=True, clock=clock)
    seconds = {8: 0.5, 1: 0.25}
    late = 0.0
    for _ in range(40):
        # What is seen is the time of the step before.
        width = widths.next(2)
        clock.now += late
        late = seconds[width]
    assert widths.planner.times(2) == [0.25, 0.5]


def test_ranks_take_what_rank_0_has_chosen() -> None:
    asked: list[int | None] = []
    follower = Widths([1, 8], agree=lambda width: asked.append(width) or 1, leads=False)
    assert (follower.next(3), follower.planner, asked) == (1, None, [None])
    leader = Widths([1, 8], agree=lambda width: asked.append(width) or width)
    assert leader.next(3) == asked[-1] == 8
    assert follower.verified([0, 0, 0])[0] == 1 and leader.verified([7, 0, 2])[0] == 8
    # Nothing to agree on.
    assert Widths([8], agree=None).next(3) == 8
    assert [Widths([1, 4], cycle=True, leads=leads).next(1) for leads in (True, False)] == [1, 1]


def test_a_result_that_never_came_does_not_shift_the_others() -> None:
    widths = Widths([2, 4, 8], cycle=True)
    assert [widths.next(requests) for requests in (1, 3, 3)] == [2, 4, 8]
    assert [widths.verified([0, 0, 0])[0] for _ in range(3)] == [4, 8, 8]


def worker(**changes: Any) -> SimpleNamespace:
    """A worker of SGLang as far as its shape is concerned."""
    runner = {"attn_backend": "whole", "decode_cuda_graph_runner": None, "eager_runner": "eager"}
    values = {
        "device": "cpu",
        "server_args": SimpleNamespace(enable_two_batch_overlap=False, enable_pdmux=False),
        "block_size": 8,
        "_block_pos_offsets": torch.arange(8),
        "model_runner": SimpleNamespace(**runner),
        "draft_model_runner": SimpleNamespace(dtype=torch.float32, page_size=16, **runner),
        "draft_model": SimpleNamespace(config=SimpleNamespace(hidden_size=3)),
        "_need_mamba_verify_commit": False,
    }
    return SimpleNamespace(**dict.fromkeys(SHAPED) | values | changes)


def test_between_steps_a_worker_is_as_sglang_made_it() -> None:
    narrowed = worker(_draft_block_ids_buf="whole")
    before = dict(vars(narrowed))
    shapes = Shapes(narrowed, [1, 4, 8])
    with shapes.of(4):
        assert (narrowed.block_size, narrowed._block_pos_offsets.tolist()) == (4, [0, 1, 2, 3])
        assert narrowed._draft_block_spec_info.draft_token_num == 4 and narrowed._draft_block_ids_buf is None
        narrowed._draft_block_ids_buf = "room for four"
    assert vars(narrowed) == before
    with pytest.raises(ZeroDivisionError), shapes.of(4):
        assert narrowed._draft_block_ids_buf == "room for four"
        raise ZeroDivisionError
    with shapes.of(8):
        assert vars(narrowed) == before
    with shapes.of(1):
        assert (narrowed.block_size, narrowed._block_pos_offsets.tolist()) == (1, [0])
    assert vars(narrowed) == before


def test_convolutions_within_a_block_have_its_length() -> None:
    def set_block_size(block: int) -> None:
        model.block_size = block

    model = SimpleNamespace(block_size=8, set_block_size=set_block_size)
    shapes = Shapes(worker(selector="one", draft_model=model), [1, 4, 8, 17])
    for width, expected in ((1, 8), (4, 4), (8, 8), (17, 17)):
        with shapes.of(width):
            assert model.block_size == expected
        assert model.block_size == 8
    with pytest.raises(ZeroDivisionError), shapes.of(4):
        raise ZeroDivisionError
    assert model.block_size == 8


class Graphs:
    """A runner of CUDA graphs that remembers what it was made with."""

    def __init__(self, runner: Any, **options: Any):
        self.options = options
        self.made_with = (runner.attn_backend, tuple(hook.__name__ for hook in runner.capture_tail_hooks))


@pytest.mark.parametrize("captured", [True, False])
def test_every_width_has_attention_backends_and_graphs_of_its_own(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    import sglang.srt.runtime_context as context

    spec = SimpleNamespace(speculative_num_draft_tokens=8)
    monkeypatch.setattr(context, "get_spec", lambda: spec)
    override = SimpleNamespace(override=lambda tag, **values: vars(spec).update(values))
    monkeypatch.setattr(context, "get_context", lambda: override)

    monkeypatch.setattr(type(compat.installed()), "for_drafter", lambda self, worker: contextlib.nullcontext())
    bound: list[str] = []

    def whole_hook() -> None:
        pass

    def runner() -> SimpleNamespace:
        made = SimpleNamespace(
            attn_backend="backend for 8",
            eager_runner="eager",
            capture_tail_hooks=[whole_hook],
            dtype=torch.float32,
            kv_index_translator=SimpleNamespace(bind_and_verify_backends=bound.extend),
            _get_attention_backend=lambda init_new_workspace: f"backend for {spec.speculative_num_draft_tokens}",
        )
        made.decode_cuda_graph_runner = Graphs(made) if captured else "eager"
        return made

    target, draft = runner(), runner()
    narrowed = worker(model_runner=target, draft_model_runner=draft, _draft_sampler="for 8")
    narrowed._maybe_build_draft_sampler = lambda: f"for {narrowed.block_size}"
    before = [dict(vars(part)) for part in (narrowed, target, draft)]
    shapes = Shapes(narrowed, [1, 4, 8])
    shapes.make_passes()
    assert [vars(part) for part in (narrowed, target, draft)] == before and spec.speculative_num_draft_tokens == 8
    assert bound == ([] if compat.version() == "0.5.17" else ["backend for 4", "backend for 4", "backend for 1"])
    for width in (4, 1):
        with shapes.of(width):
            assert target.attn_backend == f"backend for {width}"
            assert draft.attn_backend == f"backend for {width if width > 1 else 8}"
            assert narrowed._draft_sampler == ("for 4" if width == 4 and captured else None)
            if captured:
                graphs = target.decode_cuda_graph_runner
                expected = {"attn_backend": f"backend for {width}", "speculative_num_draft_tokens": width}
                assert graphs.options == expected | {"speculative_num_steps": 1}
                assert graphs.made_with == (f"backend for {width}", ("whole_hook",))
            else:
                assert target.decode_cuda_graph_runner == draft.decode_cuda_graph_runner == "eager"
            if captured and width > 1:
                # The drafts are drawn within the graph, by the sampler of this width.
                assert draft.decode_cuda_graph_runner.made_with == ("backend for 4", ("capture_hook",))
    assert [vars(part) for part in (narrowed, target, draft)] == before


OF_STATES = (
    "the target keeps a state beside its KV, of whole blocks with this SGLang"
    if compat.version() == "0.5.17"
    else "other widths have not been tried with the target's recurrent layers"
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lilicorr": 1}, "SimpleNamespace selects among candidates"),
        ({"selector": 1}, None),
        ({"_is_domino": True}, "SimpleNamespace rolls its block out"),
        ({"_need_mamba_verify_commit": True}, OF_STATES),
        (
            {"server_args": SimpleNamespace(enable_two_batch_overlap=True, enable_pdmux=False)},
            "--enable-two-batch-overlap and",
        ),
        ({}, None),
    ],
)
def test_where_only_whole_blocks_can_be_verified_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str | None
) -> None:
    import sglang.srt.runtime_context as context

    monkeypatch.setattr(type(compat.installed()), "resolved", lambda self, args: args)
    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(attn_dp_size=1, attn_dp_enabled=False))

    def answer(asked: bool = False, **changes: Any) -> str | None:
        return compat.installed().only_whole_blocks(worker(**changes), SHAPED, asked)

    assert answer(**changes) is None if reason is None else answer(**changes).startswith(reason)
    assert "other widths have not been run on cuda" in answer(device="cuda")
    assert answer(device="cuda", asked=True, **changes) == answer(**changes)
    lacking = worker()
    del lacking._accept_len_buf
    assert compat.installed().only_whole_blocks(lacking, SHAPED, False) == "SGLang's worker has no _accept_len_buf"
    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(attn_dp_size=2, attn_dp_enabled=True))
    assert "data-parallel attention" in answer()


# --- drafter ----------------------------------------------------------------------------------------------------------


def configs(**changes: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A drafter's and a target's configuration that fit."""
    nested = {"mask_token_id": 1, "target_layer_ids": [1, 3]} | changes.pop("dflash_config", {})
    draft = {"hidden_size": 64, "num_hidden_layers": 1, "num_target_layers": 4, "vocab_size": 100} | changes
    draft |= {"dflash_config": nested, "architectures": ["DFlashDraftModel"]}
    return SimpleNamespace(**draft), SimpleNamespace(hidden_size=64, num_hidden_layers=4, vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 32}, "hidden_size: got 32, expected the target's 64"),
        ({"num_target_layers": 6}, "num_target_layers: got 6, expected the target's 4"),
        ({"dflash_config": {"target_layer_ids": [1, 4]}}, r"target_layer_ids: got 4, expected 0\.\.3"),
        ({"dflash_config": {"mask_token_id": 100}}, r"mask_token_id: got 100, expected 0\.\.99"),
    ],
)
def test_a_drafter_of_another_target_is_refused(changes: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        drafter.check("there", *configs(**changes))


def test_weights_that_cannot_be_meant_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    model = torch.nn.Linear(2, 2)
    assert drafter.check("there", *configs(), model) == []
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="weight: has values that are not finite"):
        drafter.check("there", *configs(), model)
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(CheckpointError, match="weight: is all zeros"):
        drafter.check("there", *configs(), model)
    save_file({"model.norm.weight": torch.ones(1), "hidden_norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r": layers\.0\.input_layernorm\.weight: missing tensor"):
        drafter.check(str(tmp_path), *configs())


def test_another_vocabulary_is_remarked_upon() -> None:
    assert drafter.check("there", *configs(vocab_size=90)) == [
        "there/config.json: vocab_size is 90, the target's is 100"
    ]


def test_the_package_itself_loads_nothing() -> None:
    assert dflash_rs.sglang.ALGORITHM == "DFLASH_RS"
    assert json.loads(json.dumps(dflash_rs.sglang.__doc__))


def test_what_is_the_same_in_all_plain_steps_is_made_once() -> None:
    from dflash_rs.sglang.worker import DflashRsWorker

    plain = DflashRsWorker.__new__(DflashRsWorker)
    vars(plain)["_plain_lengths"] = (torch.empty(0, dtype=torch.int32),) * 2
    memory = []
    for rows in (2, 5, 3, 5):
        sampled, before = torch.arange(rows)[:, None], torch.arange(rows) + 7
        accepted, gained, bonus, tokens, lengths = plain._walk(sampled + 1, sampled, before)
        assert accepted.tolist() == [0] * rows and gained.tolist() == [1] * rows
        assert accepted.dtype == gained.dtype == torch.int32
        assert bonus.tolist() == tokens[:, 0].tolist() == list(range(rows))
        assert lengths.tolist() == [n + 8 for n in range(rows)] and before[0] == 7
        memory.append(gained.data_ptr())
    assert memory[0] != memory[1] == memory[2] == memory[3]

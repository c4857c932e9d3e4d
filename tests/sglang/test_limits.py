"""How many drafts a request may have: read, refused, counted and kept; without a server (those: `test_http`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_rs.sglang.limits import Limits, Said, of_request, why_not
from dflash_rs.sglang.metrics import Acceptance, Exporter
from dflash_rs.sglang.widths import Widths, described


def says(*most: Any, length: int = 10, **more: Any) -> list[Any]:
    """Requests with these limits; ... says nothing."""
    made = []
    for n in most:
        params = None if n is ... else {"dflash_rs": {"max_drafts": n}, **more}
        made.append(
            SimpleNamespace(
                sampling_params=SimpleNamespace(custom_params=params, top_k=1),
                origin_input_ids=[1] * length,
                output_ids=[],
                grammar=None,
                lora_id=None,
            )
        )
    return made


def test_a_request_has_its_own_limit_or_the_servers() -> None:
    assert Limits(8, None, None).of(says(..., ..., {})[:2]) is None
    assert Limits(8, None, None).of(says(7, 9)) is None, "as much as there is is no limit"
    assert Limits(8, None, None).of(says(..., 0, 3, 12, other=1)) == [7, 0, 3, 7]
    assert Limits(8, 2, None).of(says(..., 0, 5)) == [2, 0, 5]
    assert Limits(8, None, None).of([]) is None
    # A dictionary that says nothing of it, and one whose limit is null.
    quiet = SimpleNamespace(custom_params={"dflash_rs": {}}), SimpleNamespace(custom_params={"mine": 3})
    assert [of_request(params) for params in (*quiet, SimpleNamespace())] == [Said(), Said(), Said()]


def test_a_batch_that_wants_whole_blocks_has_them_whatever_pays() -> None:
    limits, wanted, other = Limits(8, None, None), *says(..., 3)
    wanted.sampling_params.custom_params = {"dflash_rs": {"whole_blocks": True}}
    assert limits.whole([wanted, wanted]) and not limits.whole([wanted, other])
    for depth, widths in ((None, [1, 4, 8]), (7, [1, 8, 17])):
        judging = Widths(widths, tree_depth=depth)
        assert [judging.next(1, whole=True) for _ in range(12)] == [8] * 12
        assert judging.verified([7])[:2] == (8, None)
    assert Widths([17], tree_depth=7).next(1, whole=True) == 17


def test_a_long_text_drafts_nothing_more() -> None:
    limits = Limits(8, None, 12)
    short, long = says(..., length=12) + says(3, length=12)
    assert limits.of([short, long]) == [7, 3]
    for req in (short, long):
        req.output_ids = [5]
    assert limits.of([short, long]) == [0, 0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (3, "custom_params.dflash_rs: got 3, expected an object with max_drafts or whole_blocks"),
        ({"max_drafts": -1}, "custom_params.dflash_rs.max_drafts: got -1, expected an integer of at least 0"),
        ({"max_drafts": True}, "custom_params.dflash_rs.max_drafts: got True"),
        ({"max_drafts": "2"}, "custom_params.dflash_rs.max_drafts: got '2'"),
        ({"whole_blocks": 1}, "custom_params.dflash_rs.whole_blocks: got 1, expected true or false"),
        ({"max_draft": 2}, "custom_params.dflash_rs: got max_draft, expected max_drafts or whole_blocks"),
    ],
)
def test_a_limit_that_cannot_be_read_is_refused(said: Any, message: str) -> None:
    req = SimpleNamespace(sampling_params=SimpleNamespace(custom_params={"dflash_rs": said}))
    assert (why_not(req) or "").startswith(message)


def test_a_step_is_no_wider_than_what_somebody_may_use_and_learns_from_the_others_only() -> None:
    turns = Widths([1, 2, 4, 8], cycle=True)
    assert [turns.next(2, [0, 0]) for _ in range(4)] == [1] * 4
    assert [turns.next(2, [2, 0]) for _ in range(4)] == [1, 2, 4, 4]
    # Whole blocks where there is no choice.
    assert Widths([8]).next(1, [0]) == 8
    judging = Widths([1, 8])
    recorded: list[tuple[int, list[int]]] = []
    choose = judging.planner.choose
    judging.planner = SimpleNamespace(
        choose=choose, observe=lambda *_: None, record=lambda width, drafts, _: recorded.append((width, drafts))
    )
    assert judging.next(3, [7, 0, 7]) == 8 and judging.verified([5, 0, 2])[:2] == (8, [7, 0, 7])
    assert judging.next(2, [3, 3]) == 8 and judging.verified([3, 3])[:2] == (8, [3, 3])
    assert recorded == [(8, [5, 2])]


def test_lengths_and_temperatures_are_told_to_the_planner() -> None:
    told: list[tuple[Any, ...]] = []
    judging = Widths([1, 8], clock=iter(range(9)).__next__)
    judging.planner = SimpleNamespace(
        choose=lambda *given: told.append(given) or 8,
        observe=lambda *given: told.append(given),
        record=lambda *given: told.append(given),
    )
    reqs = says(..., ..., length=10)
    for req, top_k, temperature in zip(reqs, (1, 50), (1.0, 0.75)):
        req.sampling_params.top_k, req.sampling_params.temperature = top_k, temperature
    reqs[0].output_ids = [3, 4]
    assert described(reqs) == (22, [0.0, 0.75])
    judging.next(2, [0, 7], reqs)
    reqs[1].output_ids = [5, 6]
    judging.next(2, None, reqs)
    # One step took a tick of the clock, at the length that it had. Nothing is learnt of who may not accept.
    assert told == [(2, 22, [0.0, 0.75]), (2, 8, 1, 22), (2, 24, [0.0, 0.75])]
    assert judging.verified([0, 5])[:2] == (8, [0, 7]) and judging.verified([1, 2])[:2] == (8, None)
    assert told[3:] == [(8, [5], [0.75]), (8, [1, 2], [0.0, 0.75])]


def test_what_a_request_may_not_accept_is_not_counted_as_drafted() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    acceptance = Acceptance(8, 1.05, 3, Exporter(8, {"model_name": "m"}, registry))
    acceptance.observe([5, 0, 2], 8, [7, 0, 3])

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"dflash_rs_spec_{name}", {"model_name": "m"})

    assert (value("drafts_total"), value("draft_tokens_total"), value("accepted_tokens_total")) == (2, 10, 7)
    assert acceptance.tau == 1 + 7 / 2
    for _ in range(20):
        acceptance.observe([0, 0], 8, [0, 0])
    assert not acceptance.alarmed and acceptance.tau == 1 + 7 / 2


def test_drafts_beyond_a_limit_are_tokens_that_the_target_does_not_say_there() -> None:
    from dflash_rs.sglang.worker import DflashRsWorker

    worker, blocks = DflashRsWorker.__new__(DflashRsWorker), torch.arange(12).view(3, 4)
    # Every draft is what the target says, zeros and ones among them.
    blocks[1, 2:], said = torch.tensor([0, 1]), torch.zeros_like(blocks)
    said[:, :-1] = blocks[:, 1:]
    worker._most = None
    assert worker._within_limits(blocks, said) is blocks
    worker._most = [3, 0, 1]
    limited = worker._within_limits(blocks, said.flatten())
    assert limited[0].tolist() == [0, 1, 2, 3] and limited[:, 0].tolist() == [0, 4, 8] and limited[2, 1] == 9
    matches = (limited[:, 1:] == said[:, :-1]).int().cumprod(1).sum(1)
    assert matches.tolist() == [3, 0, 1] and blocks[1].tolist() == [4, 5, 0, 1]

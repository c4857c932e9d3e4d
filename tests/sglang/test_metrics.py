"""What is counted of drafts, when the log warns of them, and what a server says of its drafter before it takes requests."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflash_rs import DflashError
from dflash_rs.sglang import probe
from dflash_rs.sglang.metrics import MOST_KINDS, Acceptance, Exporter
from dflash_rs.sglang.widths import kind_of


def test_counters_are_those_of_the_drafts() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    acceptance = Acceptance(4, 0, 2, Exporter(4, {"model_name": "m"}, registry))
    acceptance.observe([3, 0])
    acceptance.observe([1])
    acceptance.observe([])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"dflash_rs_spec_{name}", {"model_name": "m", **labels})

    assert (value("drafts_total"), value("draft_tokens_total"), value("accepted_tokens_total")) == (3, 9, 4)
    assert [value("accepted_tokens_per_pos_total", position=str(i)) for i in range(3)] == [2, 1, 1]
    assert value("tau") == 2.5 and value("block_size") == 4
    assert acceptance.tau == pytest.approx(1 + 4 / 3)


def test_a_kernel_that_fails_is_counted_and_said_and_sglang_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import CollectorRegistry

    from dflash_rs.sglang.worker import DflashRsWorker

    registry = CollectorRegistry()
    worker = DflashRsWorker.__new__(DflashRsWorker)
    worker.acceptance = Acceptance(4, 0, 2, Exporter(4, {"model_name": "m"}, registry))

    def broken(*_: Any) -> None:
        raise DflashError("kv_inject_128: an illegal address")

    worker._context_kv = broken
    nothing = torch.empty(0)
    with pytest.raises(DflashError, match="illegal address"), caplog.at_level(logging.ERROR):
        worker._append_target_hidden_fused(nothing, nothing, nothing)
    assert "kv_inject failed" in caplog.text and "illegal address" in caplog.text
    assert registry.get_sample_value("dflash_rs_spec_kernel_failures_total", {"model_name": "m"}) == 1


def test_only_what_was_drafted_is_counted() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    acceptance = Acceptance(8, 1.05, 4, Exporter(8, {"model_name": "m"}, registry, widths=(1, 4, 8)))
    acceptance.observe([0, 0, 0, 0], 1)
    assert acceptance.tau is None and not acceptance.alarmed, "a plain step is no reason to worry about the drafter"
    acceptance.observe([3, 1], 4)
    acceptance.observe([5], 8)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"dflash_rs_spec_{name}", {"model_name": "m", **labels})

    assert [value("passes_total", width=str(width)) for width in (1, 4, 8)] == [4, 2, 1]
    assert (value("drafts_total"), value("draft_tokens_total"), value("accepted_tokens_total")) == (3, 13, 9)
    assert [value("accepted_tokens_per_pos_total", position=str(i)) for i in range(7)] == [3, 2, 2, 1, 1, 0, 0]
    assert (value("width"), value("block_size")) == (8, 8)


@pytest.mark.parametrize(("accepted", "level", "said"), [(2, "INFO", "3.00 tokens"), (0, "WARNING", "1.00 tokens")])
def test_the_first_passes_tell_whether_a_drafter_fits(
    caplog: pytest.LogCaptureFixture, accepted: int, level: str, said: str
) -> None:
    acceptance = Acceptance(4, 1.05, 4096)
    with caplog.at_level(logging.INFO):
        for _ in range(40):
            acceptance.observe([accepted, accepted])
            acceptance.observe([0, 0], 1)  # plain steps say nothing
    (record,) = caplog.records
    assert record.levelname == level and said in record.message and "the first 64" in record.message
    assert f"by place: {' '.join(['1.00' if n < accepted else '0.00' for n in range(3)])}" in record.message


def test_the_alarm_rings_once_until_drafts_are_accepted_again(caplog: pytest.LogCaptureFixture) -> None:
    acceptance = Acceptance(8, 1.05, 4)
    with caplog.at_level(logging.INFO, logger="dflash_rs.sglang.metrics"):
        for _ in range(4):
            acceptance.observe([0, 0])
        assert len(caplog.records) == 1 and "drafting gains nothing" in caplog.text
        for _ in range(2):
            acceptance.observe([3, 2])
        assert "accepted again: 3.50 tokens" in caplog.text
        for _ in range(2):
            acceptance.observe([0, 0])
    assert len(caplog.records) == 3


GREEDY, SAMPLED, ADAPTED = ("greedy", None), ("sampled", None), ("sampled", "a1")


def test_a_kind_of_request_that_gains_nothing_has_an_alarm_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    exporter = Exporter(8, {"model_name": "m"}, registry)
    acceptance = Acceptance(8, 1.05, 8, exporter, {"a1": "poems"}.__getitem__)
    kinds = [GREEDY, ADAPTED, SAMPLED]
    with caplog.at_level(logging.INFO, logger="dflash_rs.sglang.metrics"):
        for _ in range(16):
            acceptance.observe([4, 0, 1], kinds=kinds)
        (record,) = caplog.records
        assert (
            record.levelname == "WARNING"
            and "8 target passes of some requests (sampled, with adapter poems)" in caplog.text
        )
        assert "1.00 tokens each, those of the others 3.50" in caplog.text and not acceptance.alarmed
        caplog.clear()
        for _ in range(8):
            acceptance.observe([4, 3, 1], kinds=kinds)
        assert "requests (sampled, with adapter poems) are accepted again: 4.00" in caplog.text
        caplog.clear()
        for _ in range(16):  # who may accept nothing says nothing of the drafts
            acceptance.observe([4, 0, 1], limits=[7, 0, 7], kinds=kinds)
        assert not caplog.records

    def value(name: str, how: str, adapter: str = "") -> float | None:
        labels = {"model_name": "m", "kind": how, "adapter": adapter}
        return registry.get_sample_value(f"dflash_rs_spec_kind_{name}_total", labels)

    assert [value("drafts", *of) for of in (("greedy",), ("sampled",), ("sampled", "poems"))] == [40, 40, 24]
    assert [value("accepted_tokens", *of) for of in (("greedy",), ("sampled",), ("sampled", "poems"))] == [160, 40, 24]


def test_where_nothing_is_gained_at_all_one_alarm_says_so(caplog: pytest.LogCaptureFixture) -> None:
    acceptance = Acceptance(8, 1.05, 8)
    with caplog.at_level(logging.INFO, logger="dflash_rs.sglang.metrics"):
        for _ in range(8):
            acceptance.observe([0, 0], kinds=[GREEDY, SAMPLED])
        alone = Acceptance(8, 1.05, 8)
        for _ in range(8):
            alone.observe([0], kinds=[GREEDY])
    assert len(caplog.records) == 2 and all("drafting gains nothing. Is the" in r.message for r in caplog.records)


def test_kinds_are_bounded_however_many_adapters_come() -> None:
    acceptance = Acceptance(8, 1.05, 8)
    for n in range(MOST_KINDS + 40):
        acceptance.observe([1], kinds=[("greedy", str(n))])
    assert len(acceptance._kinds) == MOST_KINDS + 1


def test_a_request_is_of_a_kind() -> None:
    def request(top_k: int, grammar: Any = None, adapter: str | None = None) -> Any:
        return SimpleNamespace(sampling_params=SimpleNamespace(top_k=top_k), grammar=grammar, lora_id=adapter)

    made = [request(1), request(50), request(1, object()), request(50, adapter="a1")]
    assert [kind_of(req) for req in made] == [GREEDY, SAMPLED, ("constrained", None), ADAPTED]


# --- the probe --------------------------------------------------------------------------------------------------------


def test_a_server_that_warms_up_tries_its_drafter() -> None:
    def asked(warmups: str | None = None, skip: bool = False, mode: str = "null") -> str | None:
        args = SimpleNamespace(warmups=warmups, skip_server_warmup=skip, disaggregation_mode=mode)
        probe.ask_for(args)
        probe.ask_for(args)
        return args.warmups

    assert asked() == "dflash_rs" and asked("mine") == "mine,dflash_rs"
    assert asked(skip=True) is None and asked("mine", mode="decode") == "mine"


class Manager:
    """SGLang's tokenizer manager, as far as the probe asks it."""

    def __init__(
        self, accepted: int, template: str | None = "{{ messages }}", fails: bool = False, refuses: bool = False
    ):
        self.accepted, self.fails, self.asked = accepted, fails, None

        def apply(turns: list[dict[str, str]], **_: Any) -> str:
            if refuses:
                raise ValueError("a system turn is missing")
            return f"<user>{turns[0]['content']}<model>"

        self.tokenizer = SimpleNamespace(chat_template=template, apply_chat_template=apply)

    async def generate_request(self, request: Any, _: None) -> Any:
        if self.fails:
            raise ValueError("no such option")
        self.asked = request
        tokens = request.sampling_params["max_new_tokens"]
        info = {"completion_tokens": tokens + 1, "spec_verify_ct": tokens // (1 + self.accepted)}
        yield [{"meta_info": info} for _ in request.text]


@pytest.mark.parametrize(
    ("manager", "level", "said"),
    [
        (Manager(2), "INFO", "gives 3.00 tokens per pass of the target (code 3.00, math 3.00, prose 3.00), over 6 "),
        (Manager(2), "INFO", "in the tokenizer's chat template; plain"),
        (Manager(0), "WARNING", "gives 1.00 tokens per pass"),
        (Manager(0), "WARNING", "Is it the one trained for this target, and the template"),
        (Manager(1, template=None), "INFO", "as they are (the tokenizer has no chat template)"),
        (Manager(1, fails=True), "ERROR", "could not be tried, the built-in prompts failed: no such option"),
        (
            Manager(1, refuses=True),
            "ERROR",
            "could not be tried, the built-in prompts failed: a system turn is missing",
        ),
    ],
)
def test_the_probe_says_what_the_drafter_is_worth(
    manager: Manager, level: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dflash_rs.sglang.probe"):
        asyncio.run(probe.run("null", manager))
    (record,) = caplog.records
    assert record.levelname == level and said in record.message
    if manager.asked is not None:
        assert manager.asked.sampling_params["custom_params"] == {"dflash_rs": {"whole_blocks": True}}
        assert manager.asked.text[0].startswith("<user>") == (manager.tokenizer.chat_template is not None)


def test_a_server_without_a_tokenizer_says_that_nothing_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dflash_rs.sglang.probe"):
        asyncio.run(probe.run("null", SimpleNamespace(tokenizer=None)))
    assert "was not tried" in caplog.text


def test_answers_that_needed_no_pass_tell_nothing() -> None:
    level, line = probe.verdict(["code"], [{"completion_tokens": 1, "spec_verify_ct": 0}], True, 1.05)
    assert level == logging.WARNING and "not known" in line

"""The benchmark's arithmetic and its tables, driven by an engine without models."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from fake_llm import FakeLLM

from dflash_rs.bench import report, runner
from dflash_rs.bench.runner import Plan, compare, first_difference, run_demo
from dflash_rs.bench.workloads import Prompt, Setting, parse_prompts, read_prompts
from dflash_rs.errors import DflashError, InvalidArgument

PROMPTS = [Prompt("alpha", "a.py"), Prompt("beta", "b.py"), Prompt("gamma", "c.py")]
GREEDY, SEEDED = Setting(0.0), Setting(0.7, seed=5)


def demo(plan: Plan, **engine):
    engines = []

    def make(concurrency: int) -> FakeLLM:
        engines.append(FakeLLM(max_running=concurrency, **engine))
        return engines[-1]

    return run_demo(make, PROMPTS, plan), engines


def test_every_setting_and_concurrency_gets_a_plain_and_a_dflash_row():
    rows, engines = demo(Plan((GREEDY, SEEDED), (1, 4), repeat=2, max_tokens=10))
    assert [(r.mode, r.concurrency, r.temperature) for r in rows] == [
        (mode, concurrency, t) for concurrency in (1, 4) for t in (0.0, 0.7) for mode in ("plain", "dflash")
    ]
    assert [engine.options["max_running"] for engine in engines] == [1, 4]
    assert all(engine.closed for engine in engines)


def test_both_arms_take_turns_on_one_engine_after_a_warm_up_of_both():
    _, engines = demo(Plan((GREEDY,), repeat=3, max_tokens=10))
    assert engines[0].calls == [False, True] + [False, True, True, False, False, True]


def test_tau_is_decode_tokens_over_passes_without_the_prefill_token():
    rows, _ = demo(Plan((GREEDY,), repeat=1, max_tokens=10))
    plain, fast = rows
    assert (plain.tau, plain.steps, plain.output_tokens) == (1.0, 27, 30)
    assert (fast.tau, fast.steps) == (3.0, 9)
    assert fast.accept_histogram == [0, 0, 9, 0]
    assert fast.accepted_per_position == [1.0, 1.0, 0.0]


def test_equal_outputs_are_called_identical_and_plain_is_the_unit_of_speed_up():
    rows, _ = demo(Plan((SEEDED,), (1, 2), repeat=1, max_tokens=10))
    assert all(row.identical_to_plain and row.identical_to_first_concurrency for row in rows)
    assert [row.speedup for row in rows if row.mode == "plain"] == [1.0, 1.0]
    assert rows[1].speedup == pytest.approx(rows[1].tokens_per_s / rows[0].tokens_per_s)


def test_a_changed_token_is_reported_with_its_place_and_logit_gap():
    rows, _ = demo(Plan((GREEDY,), repeat=1, max_tokens=10), change=4)
    plain, fast = rows
    assert plain.identical_to_plain and not fast.identical_to_plain
    assert fast.identical == "0/3"
    one = fast.divergences[1]
    assert (one.prompt, one.source, one.position, one.other_token) == (1, "b.py", 4, 63)
    assert one.logit_gap == pytest.approx((one.plain_token - 63) / 1000)
    assert any("prompt 2 (b.py) differs at token 4" in line for line in report.remarks(rows))


def test_a_speed_up_is_the_median_of_the_repeats_own(monkeypatch):
    # A machine that gets faster and slower: drafting doubles the speed in every repeat but one.
    seconds = {False: iter([4.0, 1.0, 2.0]), True: iter([2.0, 2.0, 1.0])}
    once = runner.timed

    def timed(llm, prompts, params, draft):
        done = once(llm, prompts, params, draft)
        return dataclasses.replace(done, seconds=next(seconds[draft]))

    monkeypatch.setattr(runner, "_warm_up", lambda *_: None)
    monkeypatch.setattr(runner, "timed", timed)
    rows, _ = demo(Plan((GREEDY,), repeat=3, max_tokens=4))
    assert (rows[0].speedup, rows[1].speedup) == (1.0, 2.0) and rows[1].tokens_per_s == rows[0].tokens_per_s


def test_an_unfinished_request_fails_the_benchmark():
    class Failing(FakeLLM):
        def generate(self, prompts, params, draft=True):
            outputs = super().generate(prompts, params, draft)
            outputs[-1].finish_reason = "error"
            return outputs

    with pytest.raises(DflashError, match="prompt 2 ended with 'error'"):
        run_demo(lambda concurrency: Failing(), PROMPTS, Plan((GREEDY,), repeat=1, max_tokens=4))


def test_a_profile_reports_each_stage_per_pass():
    rows, _ = demo(Plan((GREEDY,), repeat=2, max_tokens=4, profile=True))
    assert rows[0].stage_seconds == {"draft": 0.0, "verify": 1.0}
    assert rows[1].stage_seconds == {"draft": 0.5, "verify": 1.0}
    assert [row.engine_steps for row in rows] == [10.0, 10.0]
    assert "10 steps of 150.00 ms" in report.profile_table(rows)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"concurrency": (0,)}, "--concurrency"),
        ({"repeat": 0}, "--repeat"),
        ({"max_tokens": 1}, "--max-tokens"),
        ({"settings": ()}, "--temperature"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused_by_name(options, named):
    with pytest.raises(InvalidArgument, match=named):
        Plan(**({"settings": (GREEDY,)} | options))


def test_the_first_difference_may_be_a_missing_token():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    (one,) = compare([Prompt("x")], [[1, 2]], [[1, 2, 3]])
    assert (one.plain_token, one.other_token, one.logit_gap) == (None, 3, None)


def test_json_rows_carry_the_promised_keys_and_come_back_equal(tmp_path):
    rows, _ = demo(Plan((GREEDY, SEEDED), repeat=1, max_tokens=10), change=3)
    head = report.header(["bench", "--suite", "demo"])
    path = tmp_path / "new" / "folder" / "rows.json"
    report.write_json(str(path), head, rows)
    data = json.loads(path.read_text())
    promised = {
        "mode", "concurrency", "temperature", "tokens_per_s", "tau", "speedup", "identical_to_plain",
        "repeated_4gram_share", "ngram_tau",
    }  # fmt: skip
    assert all(promised <= set(row) for row in data["rows"])
    assert {"command", "machine", "cpu", "threads", "torch", "dtype", "dflash_rs", "git_commit", "date"} <= set(
        data["header"]
    ) | {"threads", "dtype"}
    back_head, back_rows = report.read_json(str(path))
    assert back_head == head
    assert [row.tokens_per_s for row in back_rows] == [row.tokens_per_s for row in rows]


def test_lines_of_a_jsonl_file_are_json_whatever_they_begin_with():
    assert [p.text for p in parse_prompts('"abc"\n\n"d\\ne"\n', "x.jsonl")] == ["abc", "d\ne"]
    with pytest.raises(InvalidArgument, match=r"^x.jsonl: line 2 is not JSON"):
        parse_prompts('"abc"\nplain\n', "x.jsonl")
    assert [p.text for p in parse_prompts('"abc"\n', "x.txt")] == ['"abc"']


def test_the_table_has_one_line_per_row_and_says_whether_the_text_is_the_same():
    rows, _ = demo(Plan((GREEDY,), repeat=1, max_tokens=10))
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[3].startswith("dflash") and lines[3].endswith("yes 3/3")


def test_a_drafter_that_a_look_up_beats_is_called_out():
    rows, _ = demo(Plan((GREEDY,), repeat=1, max_tokens=10))
    rows[1].ngram_tau = rows[1].tau + 1
    rows[1].repeated_4gram_share = 0.8
    text = "\n".join(report.remarks(rows))
    assert "a look-up drafter would reach" in text and "80% of the 4-grams repeat" in text


class Counting(FakeLLM):
    """Says what it drafted: 10 passes a call, `per_pass` places in each where it drafts; a step of a whole block costs 2.5 plain ones."""

    def __init__(self, per_pass: float, planner=True):
        super().__init__()
        self.per_pass = per_pass
        costs = ([(1, 2.0), (4, 4.0)], [(1, 0.0), (4, 1.0)]) if planner else None
        self._loop = SimpleNamespace(policy=SimpleNamespace(planner=SimpleNamespace(costs=costs)))

    def stats(self):
        drafted = 10 * self.per_pass * sum(self.calls)
        return super().stats() | {"passes": 10 * len(self.calls), "drafted": drafted}


def test_what_was_not_drafted_is_said_with_the_reason_and_not_held_against_the_drafter():
    plan = Plan((GREEDY,), repeat=2, max_tokens=10)
    rows = run_demo(lambda concurrency: Counting(0.5), PROMPTS, plan)
    plain, fast = rows
    assert (plain.drafts_per_pass, plain.block_cost) == (None, None)
    assert (fast.drafts_per_pass, fast.most_drafts, fast.block_cost) == (0.5, 3, 2.5)
    fast.ngram_tau = fast.tau + 1
    (line,) = report.remarks(rows)
    assert "0.5 of 3 drafts were made per pass" in line and "costs 2.50 plain ones" in line and "look-up" not in line
    rows = run_demo(lambda concurrency: Counting(3, planner=False), PROMPTS, plan)
    assert (rows[1].drafts_per_pass, rows[1].block_cost) == (3, None)
    assert not any("were made per pass" in line for line in report.remarks(rows))


def test_the_plot_is_a_png_of_some_size(tmp_path):
    pytest.importorskip("matplotlib")
    rows, _ = demo(Plan((GREEDY, SEEDED), (1, 4), repeat=1, max_tokens=10))
    path = tmp_path / "plot.png"
    report.plot(str(path), report.header(["bench"]), rows)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_rows_are_called_after_the_drafter_and_a_look_up_is_not_held_against_itself(tmp_path):
    def make(concurrency: int) -> FakeLLM:
        llm = FakeLLM(max_running=concurrency)
        llm.draft_kind = "lookup"
        return llm

    looked = run_demo(make, PROMPTS, Plan((GREEDY,), repeat=1, max_tokens=10))
    assert [row.mode for row in looked] == ["plain", "lookup"]
    looked[1].ngram_tau, looked[1].drafts_per_pass, looked[1].most_drafts = looked[1].tau + 1, 0.1, 15
    assert not report.remarks(looked)
    rows = demo(Plan((GREEDY,), repeat=1, max_tokens=10))[0] + looked
    assert [line.split()[0] for line in report.table(rows).splitlines()[2:]] == ["plain", "dflash", "plain", "lookup"]
    pytest.importorskip("matplotlib")
    report.plot(str(tmp_path / "both.png"), report.header(["bench"]), rows)
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_where_nothing_can_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from dflash_rs import cli

    def measured(*_, **__):
        raise AssertionError("something was measured")

    monkeypatch.setattr(cli.engine, "make_engine", measured)
    (tmp_path / "file").write_text("")
    for option, path, message in (
        ("--json", tmp_path / "file" / "x.json", "expected a file that can be written"),
        ("--json", tmp_path / "new" / "x.json", "in a folder that exists"),
        ("--json", tmp_path, "expected a file that can be written"),
        ("--plot", tmp_path, "expected a file that can be written"),
        ("--plot", tmp_path / "x.doc", "expected a file name that ends in one of"),
    ):
        assert cli.main(["bench", option, str(path)]) == cli.BAD_INPUT
        error = capsys.readouterr().err
        assert error.startswith(f"dflash-rs: error: {option}") and message in error
    assert cli.main(["bench", "--json", str(tmp_path / "x.json")]) == cli.FAILED
    assert "something was measured" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_plot_without_a_drafted_row_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(DflashError, match="no drafted row"):
        report.plot(str(tmp_path / "x.png"), {}, [])


def test_prompts_are_read_from_lists_lines_and_plain_text(tmp_path):
    assert parse_prompts('["a", {"prompt": "b", "source": "s"}]', "x") == [Prompt("a"), Prompt("b", "s")]
    assert parse_prompts('{"prompt": "a"}\n\n{"prompt": "b"}\n', "x") == [Prompt("a"), Prompt("b")]
    assert parse_prompts("one\n\ntwo\n", "x") == [Prompt("one"), Prompt("two")]
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\nthree\n")
    assert read_prompts(path, limit=2) == [Prompt("one"), Prompt("two")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no prompt"),
        ("[1]", 'entry 0: got 1, expected a string or an object with "prompt"'),
        ('["a", ""]', "entry 1: the prompt is empty"),
        ('["a"', "not a JSON list"),
        ('{"prompt": "a"}\n{oops', "line 2 is not JSON"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        read_prompts(path)


def test_a_missing_prompt_file_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match="No such file"):
        read_prompts(tmp_path / "nowhere")

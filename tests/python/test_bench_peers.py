"""The suite of peers: who takes part, what is compared with what, and how it is told; with engines without models and a clock of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_llm import FakeLLM

from dflash_rs.bench import arms, peers, report, runner
from dflash_rs.bench.arms import Generate, Reference, conversations
from dflash_rs.bench.generate import ended
from dflash_rs.bench.peers import Suite, quartiles
from dflash_rs.bench.runner import REFERENCE, TRANSFORMERS, TRANSFORMERS_LOOKUP, Plan
from dflash_rs.bench.workloads import ALL, Prompt, Setting, bundled_conversations, read_conversations
from dflash_rs.errors import InvalidArgument

GREEDY, SEEDED = Setting(0.0), Setting(0.7, seed=5)


def prompt(text: str, category: str, *more: str) -> Prompt:
    return Prompt(text, f"id-{text}", f"file: {text}", category, (text, *more))


PROMPTS = [prompt("alpha", "code"), prompt("beta", "math"), prompt("gamma", "code"), prompt("delta", "math")]


class Clock:
    """Stands in for the module `time`: it goes on when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(runner, "time", found)
    return found


class Engine(FakeLLM):
    """Takes a second a pass, and a tenth more for every place of its block where it drafts."""

    def __init__(self, clock: Clock, log: list[str], kind: str | None, **options: Any):
        super().__init__(**options)
        self.clock, self.log, self.draft_kind = clock, log, kind
        self.block_size = options.get("block_size") or (8 if kind == "mtp" else 4)
        self.slow = 1.0
        # A head's drafts are accepted up to the third, and each costs what a third of a pass does.
        self.width = min(self.block_size, 4 if kind == "mtp" else 3)

    def generate(self, prompts, params, draft=True):
        outputs = super().generate(prompts, params, draft)
        steps = sum(output.metrics["steps"] for output in outputs)
        each = 1.0 if not draft else 1.0 + (0.3 if self.draft_kind == "mtp" else 0.1) * (self.block_size - 1)
        self.clock.now += steps * each * self.slow
        more = " trees" if self.options.get("tree_nodes") else " + lookup" if self.options.get("lookup") else ""
        self.log.append(f"{self.draft_kind or 'plain'}{more}")
        return outputs


class Machine:
    """Makes engines and keeps them; `kinds` says what a drafter of a name is."""

    kinds = {None: None, "own": "dflash", "second": "dflash", "head": "mtp", "lookup": "lookup"}

    def __init__(self, clock: Clock, **options: Any):
        self.clock, self.options = clock, options
        self.engines: list[Engine] = []
        self.log: list[str] = []

    def __call__(self, draft, max_running, block_size, tree_nodes, lookup):
        more = {
            "draft": draft, "max_running": max_running, "block_size": block_size, "tree_nodes": tree_nodes, "lookup": lookup
        }  # fmt: skip
        self.engines.append(Engine(self.clock, self.log, self.kinds[draft], **more, **self.options))
        return self.engines[-1]

    def others(self, llm, draft, fails: str = "", missing: str | None = None):
        made = [
            Generate(TRANSFORMERS, Loop(self)),
            Generate(TRANSFORMERS_LOOKUP, Loop(self)),
            Reference(REFERENCE, Loop(self)),
        ]
        for arm in made:
            arm.loop.fails = arm.name == fails
        return (made if missing is None else made[:2]), missing


class Loop:
    """A loop of somebody else: the texts of plain decoding, ten seconds a pass; draws of its own where it samples."""

    def __init__(self, machine: Machine):
        self.machine, self.fails = machine, False

    def generate(self, prompts, max_tokens, stop_ids, temperature=0.0, seed=None, look_up=None):
        if self.fails:
            raise RuntimeError("no such kernel\nand more")
        self.machine.log.append("theirs")
        self.machine.clock.now += 10.0 * (max_tokens - 1)
        batch = [prompts] if look_up is None else prompts
        params = SimpleNamespace(seed=None, temperature=0.0, max_tokens=max_tokens)
        texts = [FakeLLM()._one(0, list(ids), params, False)[0].token_ids for ids in batch]
        return (texts[0], max_tokens - 1) if look_up is None else (texts, max_tokens)


def suite(
    clock: Clock, drafts=("own", "head", "lookup"), plan: Plan | None = None, prompts=PROMPTS, options=None, **more
):
    machine = Machine(clock, **(options or {}))
    plan = plan or Plan((GREEDY,), repeat=2, max_tokens=10)
    found = Suite(machine, list(drafts), plan, more.pop("others", machine.others), **more).run(prompts)
    return found, machine


def test_every_arm_has_a_row_for_every_category_setting_and_number_of_requests(clock):
    found, machine = suite(clock, plan=Plan((GREEDY, SEEDED), (1, 2), repeat=1, max_tokens=10))
    own = ["plain", "dflash", "dflash + lookup", "dflash trees", "mtp", "mtp + lookup", "lookup"]
    theirs = {1: [TRANSFORMERS, TRANSFORMERS_LOOKUP, REFERENCE], 2: [TRANSFORMERS]}
    assert [(row.concurrency, row.temperature, row.category, row.mode) for row in found.rows] == [
        (concurrency, temperature, kind, arm)
        for concurrency in (1, 2)
        for temperature in (0.0, 0.7)
        for kind in ("code", "math", ALL)
        for arm in [*own, *theirs[concurrency]]
    ]
    assert [one.line for one in found.skipped] == [
        "skipped: transformers look-up, batch 2: its prompt look-up takes one request at a time",
        "skipped: z-lab, batch 2: its loop takes one request at a time",
    ]
    assert all(engine.closed for engine in machine.engines)


def test_arms_take_turns_within_a_round_and_another_one_begins_each_time(clock):
    _, machine = suite(
        clock, ("lookup",), Plan((GREEDY,), repeat=2, max_tokens=10), others=lambda llm, draft: ([], None)
    )
    # Warm-ups, then two rounds of two categories.
    assert machine.log == ["plain", "lookup"] * 2 + ["lookup", "plain"] + ["plain", "lookup"] + ["lookup", "plain"]


def test_a_speed_up_divides_runs_of_the_same_round(clock):
    class Busy(Engine):
        """Everything takes ten times as long from the second round on."""

        def generate(self, prompts, params, draft=True):
            self.slow = 10.0 if len(self.log) >= 6 else 1.0
            return super().generate(prompts, params, draft)

    machine = Machine(clock)

    def make(draft, *more):
        llm = Machine.__call__(machine, draft, *more)
        llm.__class__ = Busy
        return llm

    plan = Plan((GREEDY,), repeat=3, max_tokens=10)
    found = Suite(make, ["lookup"], plan, lambda llm, draft: ([], None)).run(PROMPTS)
    row = next(row for row in found.rows if (row.mode, row.category) == ("lookup", ALL))
    # Three tokens a pass that costs 1.3 of a plain one, whatever the machine does meanwhile.
    assert row.speedup == pytest.approx(3 / 1.3) and row.speedup_quartiles == pytest.approx([3 / 1.3] * 2)
    assert max(row.tokens_per_s_runs) == pytest.approx(10 * min(row.tokens_per_s_runs))
    assert row.tokens_per_s_quartiles[0] < row.tokens_per_s_quartiles[1]
    assert (row.tau, row.steps, row.output_tokens, row.draft, row.block_size) == (3.0, 12, 40, "lookup", 4)


def test_all_categories_together_are_all_tokens_over_all_seconds(clock):
    found, _ = suite(clock, prompts=[*PROMPTS, prompt("epsilon", "math")])
    for arm in ("plain", "dflash", REFERENCE):
        code, math, whole = (
            next(r for r in found.rows if (r.mode, r.category) == (arm, k)) for k in ("code", "math", ALL)
        )
        assert whole.output_tokens == code.output_tokens + math.output_tokens == 50
        seconds = code.output_tokens / code.tokens_per_s + math.output_tokens / math.tokens_per_s
        assert whole.tokens_per_s == pytest.approx(50 / seconds)
        assert whole.steps == code.steps + math.steps
    assert whole.identical == "5/5" and code.identical == "2/2"


def test_a_head_runs_at_the_number_of_steps_that_a_scan_found_fastest(clock):
    found, machine = suite(clock, plan=Plan((GREEDY, SEEDED), (1, 2), repeat=2, max_tokens=13))
    assert [(scan.arm, scan.concurrency, scan.best, list(scan.tokens_per_s)) for scan in found.scans] == [
        ("mtp", 1, 3, [1, 2, 3, 4, 5, 6, 7]),
        ("mtp", 2, 3, [1, 2, 3, 4, 5, 6, 7]),
    ]
    one, three = (found.scans[0].tokens_per_s[k] for k in (1, 3))
    assert three / one == pytest.approx((13 / 3 / 1.9) / (13 / 6 / 1.3))
    assert {(row.block_size, row.tau) for row in found.rows if row.mode == "mtp"} == {(4, 4.0)}
    assert found.scans[0].line.startswith("mtp, batch 1: 3 steps were fastest (tokens/s by steps: 1: ")
    # Whose turn it is to go first changes there, too.
    heads = [engine.options["block_size"] for engine in machine.engines if engine.options["draft"] == "head"]
    assert heads[:15] == [None, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8, 2]


def test_a_head_of_two_steps_is_tried_with_no_more_and_its_block_is_not_the_one_of_other_drafters(clock):
    machine = Machine(clock)

    def make(draft, max_running, block_size, tree_nodes, lookup):
        llm = machine(draft, max_running, block_size or (3 if draft == "head" else None), tree_nodes, lookup)
        return llm

    plan = Plan((GREEDY,), repeat=1, max_tokens=10)
    found = Suite(make, ["own", "head"], plan, machine.others, block_size=2, tree_nodes=9).run(PROMPTS)
    assert list(found.scans[0].tokens_per_s) == [1, 2]
    limits = {row.mode: (row.block_size, row.tree_nodes) for row in found.rows}
    assert limits["dflash"] == (2, 0) and limits["dflash trees"] == (2, 9) and limits["mtp"] == (3, 0)
    assert limits["plain"] == limits[TRANSFORMERS] == (None, None)


def test_what_cannot_run_is_told_with_the_reason(clock):
    machine = Machine(clock)
    found, _ = suite(
        clock,
        ("lookup",),
        others=lambda llm, draft: machine.others(llm, draft, TRANSFORMERS_LOOKUP, "it is not installed"),
    )
    assert {one.arm: one.reason for one in found.skipped} == {
        "dflash": "no DFlash drafter was given (--draft FOLDER)",
        "mtp": "no MTP head was given (--draft FOLDER)",
        "transformers look-up": "it does not run this target: RuntimeError: no such kernel",
        "z-lab": "it is not installed",
    }
    assert {row.mode for row in found.rows} == {"plain", "lookup", TRANSFORMERS}


def test_trees_are_skipped_where_the_target_takes_none_and_other_errors_are_errors(clock):
    machine = Machine(clock)
    told = "tree_nodes: got 15, expected 0 with a target that keeps state"

    def make(draft, max_running, block_size, tree_nodes, lookup):
        if tree_nodes:
            raise InvalidArgument(told)
        return machine(draft, max_running, block_size, tree_nodes, lookup)

    plan = Plan((GREEDY,), repeat=1, max_tokens=10)
    found = Suite(make, ["own"], plan, machine.others).run(PROMPTS)
    assert ("dflash trees", told) in [(one.arm, one.reason) for one in found.skipped]
    assert "dflash trees" not in {row.mode for row in found.rows}
    told = "max_context: got 7, expected more"
    with pytest.raises(InvalidArgument, match="max_context"):
        Suite(make, ["own"], plan, machine.others).run(PROMPTS)
    assert all(engine.closed for engine in machine.engines)


def test_two_drafters_of_a_kind_are_called_after_their_folders(clock):
    found, _ = suite(clock, ("own", "second", "lookup"))
    names = list(dict.fromkeys(row.mode for row in found.rows))
    one, other = ([f"{name}{more}" for more in ("", " + lookup", " trees")] for name in ("dflash", "dflash (second)"))
    assert names[:8] == ["plain", *one, *other, "lookup"]


def test_a_changed_token_is_found_in_its_category_and_texts_drawn_otherwise_are_not_compared(clock):
    plan = Plan((GREEDY, SEEDED), repeat=1, max_tokens=10)
    found, _ = suite(clock, ("own", "lookup"), plan, options={"change": 4})
    told = {(row.mode, row.temperature, row.category): row.identical_to_plain for row in found.rows}
    assert told["dflash", 0.7, "code"] is False and told["plain", 0.7, ALL] is True
    assert told[TRANSFORMERS, 0.0, ALL] is True and told[REFERENCE, 0.0, "math"] is True
    assert told[TRANSFORMERS, 0.7, ALL] is None and told[REFERENCE, 0.7, ALL] is None
    row = next(row for row in found.rows if (row.mode, row.category) == ("dflash", "math"))
    assert [one.source for one in row.divergences] == ["id-beta", "id-delta"] and row.identical == "0/2"
    lines = report.table(found.rows).splitlines()
    assert lines[0].split()[:2] == ["arm", "category"] and "quartiles" in lines[0]
    seeded = [line for line in lines if line.startswith("transformers ") and "seeded" in line]
    assert seeded and all(line.endswith("-") for line in seeded)


def test_json_has_every_key_of_every_row_and_what_was_skipped(clock, tmp_path):
    found, _ = suite(clock, ("lookup",))
    path = tmp_path / "peers.json"
    skipped = [vars(one) for one in found.skipped]
    report.write_json(str(path), {"cpu": "x"}, found.rows, scans=[], skipped=skipped)
    data = json.loads(path.read_text())
    promised = {
        "mode", "category", "concurrency", "temperature", "seed", "tokens_per_s", "tokens_per_s_quartiles", "tokens_per_s_runs", "speedup",
        "speedup_quartiles", "tau", "identical_to_plain", "repeated_4gram_share", "ngram_tau", "draft", "block_size", "tree_nodes",
    }  # fmt: skip
    assert all(promised <= set(row) for row in data["rows"])
    assert {"arm", "reason", "concurrency", "temperature"} == set(data["skipped"][0])


def test_the_plot_is_a_png_of_some_size_with_one_and_with_several_numbers_of_requests(clock, tmp_path):
    pytest.importorskip("matplotlib")
    from dflash_rs.bench.peers_plot import plot_peers

    sizes = []
    for levels in ((1,), (1, 2)):
        found, _ = suite(clock, plan=Plan((GREEDY, SEEDED), levels, repeat=1, max_tokens=10))
        path = tmp_path / "plot.png"
        plot_peers(str(path), report.header(["bench"]), found.rows)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
        sizes.append(int.from_bytes(data[20:24], "big"))
    assert sizes[1] > 1.5 * sizes[0]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, each with the room it has."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: [saved.append(figure), save(figure, *a, **k)][1])
    return saved


def visible_behind(label):
    """Whether a line behind the label would run through its letters."""
    return not any(effect._gc.get("foreground") == "white" for effect in label.get_path_effects())


@pytest.mark.parametrize("settings", [(GREEDY,), (GREEDY, SEEDED)], ids=["one", "two"])
def test_the_legend_of_the_plot_lies_within_it_and_has_tau_at_every_temperature(clock, drawn, tmp_path, settings):
    from dflash_rs.bench.peers_plot import plot_peers

    found, _ = suite(clock, ("own", "lookup"), Plan(settings, repeat=1, max_tokens=10))
    # As long as the names and the processor's are where it is used.
    rows = [replace(row, mode=f"{row.mode} of a drafter like another") for row in found.rows if row.mode != "plain"]
    plot_peers(str(tmp_path / "plot.png"), report.header(["bench"]) | {"cpu": "A processor " * 4}, rows)
    (figure,) = drawn
    (legend,) = figure.legends
    figure.draw_without_rendering()
    room = figure.bbox
    for text in (figure._suptitle, legend, *legend.get_texts(), legend.get_title(), *legend.get_patches()):
        extent = text.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= room.width and 0 <= extent.y0 < extent.y1 <= room.height
    for name in (text.get_text() for text in legend.get_texts()):
        assert re.fullmatch(rf".* \(tau {', '.join([r'[0-9.]+'] * len(settings))}\)", name), name
    labels = [text for axis in figure.axes for text in axis.texts]
    assert labels and not any(visible_behind(label) for label in labels)


def test_a_line_does_not_run_through_the_labels_of_the_other_plot_either(clock, drawn, tmp_path):
    found, _ = suite(clock, ("own",), Plan((GREEDY,), repeat=1, max_tokens=10))
    report.plot(str(tmp_path / "plot.png"), report.header(["bench"]), found.rows)
    labels = drawn[0].axes[0].texts
    assert labels and not any(visible_behind(label) for label in labels)


def test_one_round_has_no_spread_and_four_have_that_of_the_middle():
    assert quartiles([3.0]) == [3.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


# --- conversations --------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of characters with a template."""

    chat_template = "some"
    all_special_ids = [59]
    added_tokens_decoder = {59: SimpleNamespace(special=True)}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_):
        shown = "".join(f"<{m['role'][0]}>{m['content']};" for m in messages)
        return shown + ("<a>" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[ord(c) for c in text])


def chatting(**options) -> FakeLLM:
    llm = FakeLLM(**options)
    llm.tokenizer, llm.model_dir = Words(), "words"
    return llm


def texts(tasks) -> list[str]:
    return ["".join(map(chr, task.ids)) for task in tasks]


def test_prompts_are_chats_where_there_is_a_template_and_its_mark_ends_an_answer():
    tasks, ends = conversations(chatting(), PROMPTS[:2], 5)
    assert texts(tasks) == ["<u>alpha;<a>", "<u>beta;<a>"] and ends == [59]
    tasks, ends = conversations(FakeLLM(), PROMPTS[:2], 5)
    assert texts(tasks) == ["alpha", "beta"] and ends == []


def test_a_later_turn_follows_the_plain_greedy_answer_to_the_one_before():
    two = [prompt("alpha", "code"), prompt("beta", "math", "why?")]
    llm = chatting(change=1)
    tasks, _ = conversations(llm, two, 5)
    answer = FakeLLM().generate(
        [[ord(c) for c in "<u>beta;<a>"]], SimpleNamespace(seed=None, temperature=0, max_tokens=5)
    )
    assert texts(tasks)[1:] == ["<u>beta;<a>", f"<u>beta;<a>{answer[0].text};<u>why?;<a>"]
    assert [(task.prompt.source, task.prompt.category) for task in tasks[1:]] == [
        ("id-beta", "math"),
        ("id-beta, turn 2", "math"),
    ]
    assert llm.calls == [False]
    assert texts(conversations(FakeLLM(), two, 5)[0])[2].startswith("beta\n\n")


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_timed():
    llm = FakeLLM()
    llm.max_context = 9
    with pytest.raises(
        InvalidArgument, match=r"^file: alpha: got 5 tokens and --max-tokens 5, expected at most 9 together"
    ):
        conversations(llm, PROMPTS, 5)


def test_the_packages_own_prompts_are_of_three_kinds_with_at_least_eight_each():
    found = bundled_conversations()
    count = {kind: sum(one.category == kind for one in found) for kind in {one.category for one in found}}
    assert set(count) == {"code", "math", "prose"} and min(count.values()) >= 8
    assert len({one.text for one in found}) == len(found)
    assert [one.category for one in bundled_conversations(2)] == ["code", "code", "math", "math", "prose", "prose"]


GOOD = '{"id": "a", "category": "code", "prompt": "x"}'


def test_files_of_conversations_are_put_together_by_category(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        f'\ufeff{GOOD}\n\n{{"id": "b", "category": "chat", "turns": ["y", "z"], "more": 1}}\n'
    )
    (tmp_path / "b.jsonl").write_text('{"id": "c", "category": "code", "prompt": "w"}\n')
    found = read_conversations([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [(one.source, one.category, one.turns) for one in found] == [
        ("a", "code", ("x",)),
        ("c", "code", ("w",)),
        ("b", "chat", ("y", "z")),
    ]
    assert found[2].where == f"{tmp_path / 'a.jsonl'}: line 3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('"text"', "line 2: got str, expected an object"),
        ('{"category": "code", "prompt": "x"}', "line 2: id: got None, expected a text"),
        ('{"id": "b", "category": 3, "prompt": "x"}', "line 2: category: got 3, expected a text"),
        ('{"id": "b", "category": "all", "prompt": "x"}', "line 2: category: got 'all', which stands for all"),
        ('{"id": "b", "category": "code"}', 'line 2: got none of "prompt" and "turns"'),
        ('{"id": "b", "category": "code", "prompt": "x", "turns": ["y"]}', 'line 2: got both of "prompt" and "turns"'),
        ('{"id": "b", "category": "code", "turns": []}', "line 2: turns: got [], expected a list of messages"),
        ('{"id": "b", "category": "code", "turns": ["x", 1]}', "line 2: turns[1]: got 1, expected a text"),
        ('{"id": "b", "category": "code", "prompt": " "}', "line 2: prompt: got ' ', expected a text"),
        ('{"id": "b", "category": "code", "prompt": "\\ud800"}', "line 2: prompt: got "),
        (GOOD, "line 2: id: got 'a', which "),
    ],
)
def test_a_broken_line_is_named_by_its_number(line, said, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InvalidArgument) as error:
        read_conversations([path])
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_files_that_hold_nothing_or_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"\xff")
    for name, said in (("empty", "contains no prompt"), ("latin", "not UTF-8 text"), ("nowhere", "No such file")):
        with pytest.raises(InvalidArgument, match=said):
            read_conversations([tmp_path / name])


def test_what_pads_a_batch_is_no_part_of_a_text():
    assert ended([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert ended([5, 6], [2]) == [5, 6] and ended([], [2]) == []


def test_a_batch_of_somebody_elses_loop_holds_as_many_requests_as_run_at_once(clock):
    machine = Machine(clock)
    arm = Generate(TRANSFORMERS, Loop(machine))
    sizes = []
    whole = arm.loop.generate
    arm.loop.generate = lambda prompts, *more, **named: (sizes.append(len(prompts)), whole(prompts, *more, **named))[1]
    tasks = [arms.Task(one, [97, 98]) for one in (*PROMPTS, *PROMPTS[:1])]
    params = runner.sampling_params(GREEDY, 5, 10)
    done = arm.run(arms.Work(tasks, params, GREEDY, 2, 10, [0]))
    assert sizes == [2, 2, 1] and done.seconds == 3 * 10.0 * 9 and done.steps == 5 * 9
    assert peers.MTP == "mtp" and done.tokens == 50

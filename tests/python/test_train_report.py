"""What a finished pair is said to do: in the loop, by category, beside what its training found on texts kept apart."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs import LLM, InvalidArgument, SamplingParams, cli  # noqa: E402
from dflash_rs.config import assets  # noqa: E402
from dflash_rs.train.report import held_out_taus, loop_report  # noqa: E402

pytestmark = pytest.mark.pair

LINES = [
    {"id": "1", "category": "code", "prompt": "def mean(values):\n"},
    {"id": "2", "category": "lists", "turns": ["x = [1, 2,", "y = [3,"]},
    {"id": "3", "category": "code", "prompt": "import os\n"},
]


@pytest.fixture
def draft(tmp_path):
    """The bundled drafter with notes of a training that kept texts apart."""
    folder = shutil.copytree(assets() / "draft", tmp_path / "draft")
    kept = {"code": {"random_anchor_tau": 3.25, "texts": 4, "loss": 1.0}, "prose": {"random_anchor_tau": None}}
    history = [{"step": 1, "held_out": {"code": {"random_anchor_tau": 1.0}}}, {"step": 2, "held_out": kept}]
    (folder / "training.json").write_text(json.dumps({"report": {"history": history}}))
    return folder


def test_conversations_are_reported_by_category_and_together(draft, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    rows = loop_report(assets() / "target", draft, prompts, 16)
    assert [(row["temperature"], row["category"], row["prompts"]) for row in rows] == [
        (temperature, kind, count)
        for temperature in (0.0, 0.7)
        for kind, count in (("code", 2), ("lists", 2), ("all", 4))
    ]
    assert [row["held_out_tau"] for row in rows[:3]] == [3.25, None, None]
    # The same by hand: a target without a template continues texts, and whole blocks are verified.
    for name, lookup in (("loop_tau", False), ("loop_tau_with_lookup", True)):
        with LLM(assets() / "target", draft, adaptive=False, lookup=lookup) as llm:
            outputs = llm.generate([LINES[0]["prompt"], LINES[2]["prompt"]], SamplingParams(max_tokens=16))
        gained, passes = sum(len(o.token_ids) - 1 for o in outputs), sum(o.metrics["steps"] for o in outputs)
        assert rows[0][name] == pytest.approx(gained / passes) and rows[0][name] > 1


def test_texts_are_reported_as_before(draft, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": LINES[0]["prompt"]}]))
    rows = loop_report(assets() / "target", draft, prompts, 8)
    assert [set(row) for row in rows] == [
        {
            "temperature",
            "loop_tau",
            "loop_tau_with_lookup",
            "ngram_tau",
            "repeated_4gram_share",
            "prompts",
            "max_tokens",
        }
    ] * 2


def test_a_broken_line_is_named_and_a_draft_without_notes_has_none(draft, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(LINES[0]) + "\n{\n")
    with pytest.raises(InvalidArgument, match="line 2 is not JSON"):
        loop_report(assets() / "target", draft, prompts, 8)
    words = ["train", "report", "--target", str(assets() / "target"), "--draft", str(draft), "--prompts", str(prompts)]
    assert cli.main(words) == 2
    assert held_out_taus(draft) == {"code": 3.25} and held_out_taus(assets() / "draft") == {}
    for text in ("", "[]", '{"report": {"history": []}}', '{"report": {"history": [{"held_out": 3}]}}'):
        (draft / "training.json").write_text(text)
        assert held_out_taus(draft) == {}

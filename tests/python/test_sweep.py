"""A few of the architectures that `make sweep` goes through (tests/sweep), and that the sweep can see what it looks for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from sweep.checks import examine  # noqa: E402
from sweep.tiny import WINDOW  # noqa: E402

PAGE = (TESTS.parent / "docs" / "models.md").read_text(encoding="utf-8")
# One of each kind: windows in masks only, soft caps, sinks, experts, latent attention, learned positions, heads of different sizes.
EXACT = ("phimoe", "gemma2", "gpt_oss", "gemma4_text", "qwen3_moe", "deepseek_v3", "gpt2")
# Recurrent layers, of a text model, of the text part of one with a tower for pictures, and among experts.
EXACT += ("qwen3_5_text", "qwen3_5", "qwen3_5_moe", "qwen3_next", "nemotron_h", "granitemoehybrid")
REFUSED = {
    "bloom": "BloomForCausalLM does not take its attention from the transformers registry",
    "minimax": "layer_types has 'linear_attention'",
    "llama4_text": "layer_types has 'chunked_attention'",
    "nemotron": "NemotronAttention does not pass extra arguments on to its attention",
    "doge": "DogeAttention: attention gets a mask that the layer or the model made itself",
    "diffllama": "layer 0 attends twice per forward",
    "camembert": "CamembertForCausalLM: its own forward",
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_tiny_model_gives_the_tokens_and_log_probabilities_of_transformers(kind):
    result = examine(kind)
    assert (result.status, result.detail) == ("exact", "")
    assert result.tau > 1.3 and result.distinct > 10
    assert re.search(rf"^\| {kind} \| {result.name} \|", PAGE, re.MULTILINE), (
        "docs/models.md says otherwise: make sweep"
    )


# Those with a switch for their window, which is a number either way.
SWITCHED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3", "got_ocr2")


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", SWITCHED)
def test_a_window_that_is_turned_off_is_none_and_one_that_is_used_is_exact(monkeypatch, kind, used):
    from dflash_rs.models.target import TargetModel

    windows = []
    real = TargetModel._probe

    def probe(self):
        found = real(self)
        windows.extend(kv.window for kv in found[0].values())
        return found

    monkeypatch.setattr(TargetModel, "_probe", probe)
    # Kinds of layers that are not given follow from the switch. Qwen3-MoE has none: the window is in all of its layers.
    kinds = ["sliding_attention", "full_attention"] * 2 if used and kind != "qwen3_moe" else None
    result = examine(kind, use_sliding_window=used, sliding_window=WINDOW, layer_types=kinds)
    # The notes say where transformers' generate differs.
    assert (result.status, result.detail, result.notes) == ("exact", "", [])
    assert result.tau > 1.3
    assert (set(windows) == {None}) != used and (not used or WINDOW in windows), windows


def test_a_window_of_nothing_is_refused_where_a_layer_attends_within_it():
    result = examine("qwen2_moe", use_sliding_window=False, layer_types=["sliding_attention"] * 4)
    assert result.status == "refused" and "its attention mask lets position 0 not see position 0" in result.detail


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tiny_model_that_cannot_be_exact_is_refused_by_name(kind):
    result = examine(kind)
    assert result.status == "refused" and re.search(REFUSED[kind], result.detail), (result.status, result.detail)
    refused = PAGE[PAGE.index("## Refused") :]
    assert re.search(rf"[|,] {kind}[ ,]", refused), "docs/models.md says otherwise: make sweep"


@pytest.mark.parametrize("fault", ["window", "softcap"])
def test_the_sweep_sees_a_difference_that_loading_lets_through(monkeypatch, fault):
    from dflash_rs.models.target import check, probe

    monkeypatch.setattr(check.Check, "agrees", lambda self, made: True)
    if fault == "window":
        monkeypatch.setattr(probe.Recorder, "_window_of", lambda self, mask, window, name: window)
    else:
        real = probe.Step.attend_layer
        monkeypatch.setattr(
            probe.Step, "attend_layer",
            lambda self, i, q, k, v, scale, window, softcap, *rest: real(self, i, q, k, v, scale, window, None, *rest),
        )  # fmt: skip
    result = examine("phimoe" if fault == "window" else "gemma2")
    assert result.status == "different" and result.detail.startswith("together: request"), (
        result.status,
        result.detail,
    )

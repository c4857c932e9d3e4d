"""docs/models.md from the results of a sweep."""

from __future__ import annotations

import re
from typing import Any

_HEAD = """\
# Models as targets

What became of a tiny random model of every architecture that transformers {version} has behind `AutoModelForCausalLM`, as a target of
`LLM` on a CPU in float32. `make sweep` makes this page.

- *Exact*: the log-probabilities of all tokens are the model's own (one forward over the whole text, no cache), for requests of different
  lengths together and alone, with prompts in chunks, after prefix hits, beyond the window of attention where there is one (8 tokens in
  the tiny models), and with drafts of which three of four are right; texts with and without drafts are equal, greedy and sampled.
- *Refused*: loading raises `UnsupportedModel` or `CheckpointError`, which says what is in the way. Nothing is generated.

{counts}.{verdict}

The architecture is what is tried here, not a checkpoint: variants of a configuration that the tiny model does not have are caught, as
those of code outside transformers are, by what `LLM` does with every target when it loads it. It evaluates the attention masks that the
model asks for at positions as far apart as the context allows, and compares a forward over pages with the model's own on a few tokens,
some of them at the end of the context.

What a drafter reads of a target differs. A look-up (`draft="lookup"`) reads nothing but the text and drafts for every exact target. A DFlash
reads outputs of layers, which a few of them do not have in that form (remarks). An MTP head reads what the target's own head reads, the
hidden states after the last norm; training one begins from the last layer, which has to be Llama-shaped (Llama, Mistral, Qwen2, Qwen3 and their like).
"""
_REASONS = (
    ("does not take its attention from", "attention that is not from transformers' registry"),
    ("layer_types has", "layers whose state is not in pages: recurrent, chunked, sparse or compressed attention"),
    (
        "attention ran in layers",
        "layers whose state is not in pages: recurrent, chunked, sparse or compressed attention",
    ),
    ("rope_type", "rotations that change with the longest request of a batch"),
    ("num_kv_shared_layers", "layers that share keys"),
    ("attends twice", "layers that attend twice"),
    ("attention option", "an argument of attention that is not supported"),
    ("attention gets a mask", "a mask that is no causal window"),
    ("attention mask", "a mask that is no causal window"),
    ("is not causal", "attention that is not causal"),
    ("encoder-decoder", "encoder-decoder"),
    ("layer_idx", "attention that cannot be told apart by layer"),
    ("no list of", "layers that are not one list"),
    ("differs from the model's own", "positions or states of its own: the forward over pages is not the model's"),
    ("fails", "a forward that does not run by token ids and positions alone"),
    ("extra arguments", "arguments that do not reach attention"),
)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _reason(detail: str) -> str:
    return next((reason for mark, reason in _REASONS if mark in detail), "other")


def render(results: dict[str, dict[str, Any]], version: str) -> str:
    """The page, from results by model type."""
    by = {
        s: [e for e in results.values() if e["status"] == s]
        for s in ("exact", "refused", "not built", "different", "error")
    }
    names = {"exact": "exact", "refused": "refused", "not built": "not tried"}
    counts = f"{len(results)} architectures: " + ", ".join(f"{len(by[s])} {name}" for s, name in names.items() if by[s])
    wrong = len(by["different"]) + len(by["error"])
    verdict = (
        f" **{wrong} wrong**: see the end of the page."
        if wrong
        else " None was different, and none raised anything else."
    )
    lines = [
        _HEAD.format(version=version, counts=counts, verdict=verdict),
        "## Exact\n",
        "| model type | class | tokens per pass with drafts | remarks |",
        "|---|---|---|---|",
    ]
    for entry in by["exact"]:
        remarks = ["short path for Llama-shaped models"] * (entry["path"] == "fused") + entry["notes"]
        tau = f"{entry['tau']:.1f}" if entry["tau"] else ""
        lines.append(f"| {entry['kind']} | {entry['name']} | {tau} | {_cell('; '.join(remarks))} |")
    lines += ["", "## Refused\n", "| what is in the way | model types |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for entry in by["refused"]:
        reasons.setdefault(_reason(entry["detail"]), []).append(entry["kind"])
    for reason, kinds in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {', '.join(kinds)} |")
    if by["not built"]:
        lines += [
            "",
            "## Not tried\n",
            "No small model could be made of them from their configuration alone, or not from text:",
            "",
        ]
        lines.append(", ".join(entry["kind"] for entry in by["not built"]) + ".")
    for status in ("different", "error"):
        lines += [f"\n**{entry['kind']}**: {status}: {_cell(entry['detail'])}" for entry in by[status]]
    return "\n".join(lines) + "\n"

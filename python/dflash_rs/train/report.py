"""Held-out acceptance of a pair in the real loop. Random-anchor figures from training overstate it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def loop_report(target: str | Path, draft: str | Path, prompts: Path | None, max_tokens: int) -> list[dict[str, Any]]:
    """One row per temperature (0, 0.7): tau of the drafter, tau with look-up beside it (None where it does not run), tau of a look-up alone and
    repeated 4-grams on the same outputs.

    `prompts`: a JSON list of texts (`train prompts`), which are continued; or JSON lines of conversations (`bench.workloads`), which are
    answered as chats where the target has a template; None for those of the package. Conversations have a row for every
    category, and one for all of them; `held_out_tau` is then that of the drafter's training on texts of the category that were kept apart, at random
    anchors, None where its folder does not tell.
    """
    from dflash_rs import LLM, SamplingParams
    from dflash_rs.bench.arms import conversations
    from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share
    from dflash_rs.bench.workloads import ALL, bundled_conversations, read_conversations

    texts, talks = [], []
    if prompts is None:
        talks = bundled_conversations()
    elif prompts.suffix == ".jsonl":
        talks = read_conversations([prompts])
    else:
        texts = [p["prompt"] for p in json.loads(prompts.read_text(encoding="utf-8"))]
    held_out = held_out_taus(Path(draft))
    rows = []
    # Whole blocks: what the drafter can do, not what pays on this machine.
    with LLM(model=target, draft=draft, adaptive=False, lookup=False) as llm:
        if talks:
            tasks, ends = conversations(llm, talks, max_tokens)
            ids, kinds = [task.ids for task in tasks], [task.prompt.category for task in tasks]
        else:
            ids, ends, kinds = [llm.encode(t) for t in texts], [], [""] * len(texts)
        params = {
            temperature: [
                SamplingParams(
                    temperature=temperature,
                    seed=i,
                    max_tokens=max_tokens,
                    # A text that is continued has no end of its own, an answer has.
                    ignore_eos=not talks,
                    stop_token_ids=tuple(ends),
                )
                for i in range(len(ids))
            ]
            for temperature in (0.0, 0.7)
        }
        alone = {temperature: llm.generate(ids, its) for temperature, its in params.items()}
        block_size = llm.block_size
    with LLM(model=target, draft=draft, adaptive=False) as llm:
        beside = {t: llm.generate(ids, its) if llm.lookup else [] for t, its in params.items()}
    for temperature, outputs in alone.items():
        for kind in [*dict.fromkeys(kinds), ALL] if talks else [""]:
            chosen = [i for i in range(len(ids)) if kind in (kinds[i], ALL)]
            own = [outputs[i] for i in chosen]
            row = {
                "temperature": temperature,
                "loop_tau": _tau(own),
                "loop_tau_with_lookup": _tau([beside[temperature][i] for i in chosen if beside[temperature]]),
                "ngram_tau": lookup_tau([(ids[i], outputs[i].token_ids) for i in chosen], block_size),
                "repeated_4gram_share": sum(repeated_ngram_share(o.token_ids, 4) for o in own) / len(own),
                "prompts": len(own),
                "max_tokens": max_tokens,
            }
            rows.append({"category": kind, **row, "held_out_tau": held_out.get(kind)} if talks else row)
    return rows


def _tau(outputs: list[Any]) -> float | None:
    """Tokens per pass; None without any."""
    passes = sum(o.metrics["steps"] for o in outputs)
    return sum(len(o.token_ids) - 1 for o in outputs) / passes if passes else None


def held_out_taus(draft: Path) -> dict[str, float]:
    """What a drafter's training says of the texts that it kept apart, by category: tau at random anchors, at its end. Nothing where its folder
    has no such notes."""
    try:
        notes = json.loads((draft / "training.json").read_text(encoding="utf-8"))
        last = notes["report"]["history"][-1]["held_out"]
        taus = {kind: found["random_anchor_tau"] for kind, found in last.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    return {kind: float(tau) for kind, tau in taus.items() if isinstance(tau, int | float)}

"""Held-out acceptance of a pair in the real loop. Random-anchor figures from training overstate it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def loop_report(target: Path, draft: Path, prompts: Path, max_tokens: int) -> list[dict[str, Any]]:
    """One row per temperature (0, 0.7): tau of the drafter, tau of an n-gram look-up and repeated 4-grams on the same outputs."""
    from dflash_rs import LLM, SamplingParams
    from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share

    texts = [p["prompt"] for p in json.loads(prompts.read_text(encoding="utf-8"))]
    rows = []
    # Whole blocks: what the drafter can do, not what pays on this machine.
    with LLM(model=target, draft=draft, adaptive=False) as llm:
        ids = [llm.encode(t) for t in texts]
        for temperature in (0.0, 0.7):
            params = [
                SamplingParams(temperature=temperature, seed=i, max_tokens=max_tokens, ignore_eos=True)
                for i in range(len(ids))
            ]
            outputs = llm.generate(ids, params)
            passes = sum(o.metrics["steps"] for o in outputs)
            gained = sum(len(o.token_ids) - 1 for o in outputs)
            pairs = [(p, o.token_ids) for p, o in zip(ids, outputs, strict=True)]
            rows.append(
                {
                    "temperature": temperature,
                    "loop_tau": gained / passes,
                    "ngram_tau": lookup_tau(pairs, llm.block_size),
                    "repeated_4gram_share": sum(repeated_ngram_share(o.token_ids, 4) for o in outputs) / len(outputs),
                    "prompts": len(ids),
                    "max_tokens": max_tokens,
                }
            )
    return rows

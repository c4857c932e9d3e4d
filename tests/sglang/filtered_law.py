"""The law of SGLang's filters (joint top-k and top-p, then min-p), and how far draws are from a law. As a program, prints the probability of every continuation of
a prompt under filters, by transformers. Its argument is JSON: the target's folder, token ids of the prompt, how many tokens follow, and the filters by the names
that SGLang has for them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Hashable, Mapping

import torch


def law(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Probabilities of the tokens that a row of logits ``[V]`` leaves."""
    probs, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True, stable=True)
    kept = probs[:top_k].clone()
    kept[(probs.cumsum(0) - probs)[:top_k] > top_p] = 0
    kept[kept < kept[0] * min_p] = 0
    kept /= kept.sum()
    return {int(token): float(p) for token, p in zip(order, kept) if p > 0}


def distance(seen: Mapping[Hashable, int], expected: Mapping[Hashable, float]) -> float:
    """How many standard deviations chi-square lies above its mean, for how often what was drawn; infinite where something came that cannot."""
    if not set(seen) <= set(expected):
        return math.inf
    draws = sum(seen.values())
    wanted = {what: p * draws for what, p in expected.items()}
    cells = [(seen.get(what, 0), e) for what, e in wanted.items() if e >= 5]
    rare = [what for what, e in wanted.items() if e < 5]
    if rare:
        cells.append((sum(seen.get(what, 0) for what in rare), sum(wanted[what] for what in rare)))
    freedom = len(cells) - 1
    assert freedom > 1, "too few kinds to tell laws apart"
    return (sum((n - e) ** 2 / e for n, e in cells) - freedom) / math.sqrt(2 * freedom)


def main() -> None:
    """One pass for every path so far."""
    from transformers import AutoModelForCausalLM

    target, prompt, length, shape = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    known = {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, p in known.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(path)])).logits[0, -1]
            longer |= {(*path, token): p * q for token, q in law(logits, **shape).items()}
        known = longer
    print(json.dumps([[list(path), p] for path, p in known.items()]))


if __name__ == "__main__":
    main()

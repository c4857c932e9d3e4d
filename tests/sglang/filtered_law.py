"""Prints the probability of every continuation of a prompt under filters, by transformers: joint top-k and top-p, then min-p. Its argument is JSON:
the target's folder, token ids of the prompt, how many tokens follow, and the filters by the names that SGLang has for them.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """One pass for every path so far."""
    target, prompt, length, shape = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    known = {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, p in known.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(path)])).logits[0, -1].double()
            probs, order = torch.softmax(logits / shape["temperature"], -1).sort(descending=True)
            kept = probs[: shape["top_k"]].clone()
            kept[(probs.cumsum(0) - probs)[: shape["top_k"]] > shape["top_p"]] = 0
            kept[kept < kept[0] * shape["min_p"]] = 0
            kept /= kept.sum()
            longer |= {(*path, int(t)): p * float(q) for t, q in zip(order, kept) if q > 0}
        known = longer
    print(json.dumps([[list(path), p] for path, p in known.items()]))


if __name__ == "__main__":
    main()

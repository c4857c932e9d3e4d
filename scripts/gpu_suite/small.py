"""Every kernel once on small shapes, for compute-sanitizer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import shapes  # noqa: E402

from dflash_rs import recurrent  # noqa: E402


def main(device: torch.device) -> None:
    """Runs the calls; the sanitizer judges them."""
    batch, longer = shapes.Batch(device, 3, 5, 21), shapes.Batch(device, 2, 5, 600)
    # More keys than a cluster takes; as many rows and blocks as wide tiles ask for.
    longest, many = shapes.Batch(device, 1, 5, 4700), shapes.Batch(device, 15, 272, 600)
    cases = [
        shapes.prepare_case(batch),
        shapes.prepare_case(batch, drafted=False),
        shapes.accept_case(batch),
        shapes.top_k_case(device, 4, 5000, 9),
        shapes.tree_case(device, 3, 4, 5, 17),
        shapes.compact_case(batch, 2, 2, 64),
    ]
    for dim in (64, 128, 256):
        cases.append(shapes.inject_case(device, 9, 2, 2, dim))
        for mask in ("causal", "block", "ancestors"):
            cases += [shapes.attention_case(b, 4, 2, dim, mask) for b in (batch, longer, longest)]
    cases.append(shapes.attention_case(many, 16, 4, 128, "causal"))
    cases += [shapes.delta_case(device, 3, 5, 1, 2, dim) for dim in recurrent.DELTA_KEY_DIMS]
    for name, options in {
        "greedy": {"temperature": 0},
        "plain": {},
        "top": {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
    }.items():
        cases.append(shapes.sample_case(device, 2, 4, 5003, name, options))
    for case in cases:
        case.call()
        torch.cuda.synchronize()
    print("small shapes done")


if __name__ == "__main__":
    main(torch.device("cuda", 0))

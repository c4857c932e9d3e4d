"""What a target with recurrent layers takes: memory of a request beside snapshots, and where a pass's time goes.

- Memory. A recurrent layer cannot take a rejected draft back. An engine that copies the state after every token of a block holds as many states for a
  request as a block has tokens; this one holds a single state, and what the tokens of the last block fed in. Measured on the bundled hybrid
  pair (bytes of the tensors that an engine has allocated, divided by its requests), computed for the layers of a model of 397 billion
  parameters by the very code that allocates them.
- Time. Tokens that were kept are folded in before a pass runs its own rows, so a pass pays for both. Watched, because a fold that costs as
  much as a row through the whole model would eat what drafting gains, and experts make a row dearer the more of them a block meets.

A pass is one of N requests with R rows each behind one token of context, after a pass of which K tokens were kept. Passes take turns; times
are medians. Where experts run in the extension, every round is taken with transformers' own code for them, too: what that costs is in the
columns that say torch. ``--threads 1,2`` takes every round with one thread and with two: rows that differ in
their threads only say what experts, which give the same bits either way, gain by the second. Speeds of whole texts are measured by ``dflash-rs bench --suite demo --model bundled-hybrid``.

Run in the environment of ``make install``: ``.venv/bin/python benchmarks/hybrid.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_rs import LLM
from dflash_rs.bench.report import header
from dflash_rs.models.batch import StepBatch
from dflash_rs.models.hybrid.gated_delta import GatedDelta

MODEL = "bundled-hybrid"
# The recurrent layers of a Qwen3.5 of 397 billion parameters, as its configuration has them, and a drafter's usual block.
LARGE = {
    "hidden_size": 4096,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
LARGE_LAYERS, LARGE_BLOCK = 45, 16
# Requests, rows of each, and tokens of the pass before that were kept.
PASSES = [(n, rows, kept) for n in (1, 2, 4, 8) for rows, kept in ((1, 1), (2, 1), (4, 2), (8, 1), (8, 3), (8, 8))]
PARTS = ("projections", "rule", "attention", "experts", "head", "rest")


def request_bytes(state: int, token: int, block: int) -> dict[str, int]:
    """Of a request: a state and what a block feeds in, and what a state after each token of a block would be."""
    return {"state": state, "fed_in": block * token, "snapshots": block * state}


def large() -> dict[str, int]:
    """Computed, without a weight: bfloat16 weights, float32 states."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

    with torch.device("meta"):
        mixer = GatedDelta(Qwen3_5MoeGatedDeltaNet(Qwen3_5MoeTextConfig(**LARGE), 0).to(torch.bfloat16))
    state, token = (
        LARGE_LAYERS * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
        for parts in (mixer.pieces, mixer.fed)
    )
    return request_bytes(state, token, LARGE_BLOCK)


def allocated(llm: LLM, requests: int) -> dict[str, int]:
    """Measured: bytes of the tensors that an engine of so many requests has, by request."""
    rooms = llm._target.state._rooms.values()
    pieces = sum(piece.nbytes for room in rooms for piece in room.pieces)
    kept = sum(part.nbytes for room in rooms for part in room.kept)
    found = request_bytes(pieces // requests, 0, llm.block_size) | {"fed_in": kept // requests}
    said = llm.stats()["state_bytes"]
    if pieces + kept != said:
        raise SystemExit(f"hybrid: tensors of {pieces + kept} bytes, but stats say {said}")
    return found


class Clock:
    """Seconds that a target's parts take, by part. Parts do not contain each other."""

    def __init__(self, target: Any):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._undo: list[Callable[[], None]] = []
        for mixer in target.state.mixers.values():
            for name, part in (("feed", "projections"), ("run", "rule"), ("finish", "projections")):
                self._wrap(mixer, name, part)
        for layer in target.decoder_layers:
            if hasattr(layer, "self_attn"):
                self._wrap(layer.self_attn, "forward", "attention")
            self._wrap(layer.mlp, "forward", "experts")
        self._wrap(target.lm_head, "forward", "head")

    def _wrap(self, thing: Any, name: str, part: str) -> None:
        run = getattr(thing, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            found = run(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - begun
            return found

        own = vars(thing).get(name)
        setattr(thing, name, timed)
        self._undo.append(lambda: delattr(thing, name) if own is None else setattr(thing, name, own))

    def remove(self) -> None:
        """Leaves the target as it was."""
        for undo in self._undo:
            undo()

    def take(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of a call by part, and "all"."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        begun = time.perf_counter()
        run()
        whole = time.perf_counter() - begun
        return self.seconds | {"rest": whole - sum(self.seconds.values()), "all": whole}


def batch(target: Any, requests: int, rows: int, block: int) -> StepBatch:
    """Rows of every request behind one token of context."""
    page, index = block + 1, np.arange(requests)
    positions = np.tile(np.arange(rows) + 1, requests)
    return StepBatch.from_arrays(
        token_ids=np.arange(requests * rows) * 37 % target.vocab_size,
        positions=positions,
        slots=np.repeat(index, rows) * page + positions,
        query_starts=np.arange(requests + 1) * rows,
        context_lens=np.ones(requests, dtype=np.int32),
        page_table=index[:, None].astype(np.int32),
        row_ids=index,
        logit_rows=np.arange(requests * rows),
        page_size=page,
        device=target.device,
    )


def measure(llm: LLM, rounds: int, threads: list[int]) -> list[dict[str, Any]]:
    """A row for each of `threads` and `PASSES`: milliseconds by part, and what experts and the whole take with transformers' experts, if ours
    are others."""
    target, block = llm._target, llm.block_size
    experts = target.experts
    ways = ("",) if experts is None or experts.given_up else ("", "torch_")
    taken: dict[tuple[str, int, tuple[int, int, int]], list[dict[str, float]]] = {
        (way, count, one): [] for way in ways for count in threads for one in PASSES
    }
    batches = {one: batch(target, one[0], one[1], block) for one in PASSES}
    before = {one: batch(target, one[0], max(one[1], one[2]), block) for one in PASSES}
    for turn in range(rounds + 1):
        for way, count in ((way, count) for count in threads for way in ways):
            torch.set_num_threads(count)
            if way:
                experts.undo()
            clock = Clock(target)
            try:
                for one in PASSES:
                    requests, _, kept = one
                    index, ones = np.arange(requests, dtype=np.int32), np.ones(requests, dtype=np.int32)
                    target.state.pretend(index, ones)
                    target.forward(before[one])
                    target.state.keep(index, np.full(requests, kept, dtype=np.int32))
                    target.state.pretend(index, ones)
                    found = clock.take(partial(target.forward, batches[one]))
                    target.state.keep(index, ones)
                    if turn:
                        taken[way, count, one].append(found)
            finally:
                clock.remove()
                if way:
                    experts.use()

    def median(way: str, count: int, one: tuple[int, int, int], part: str) -> float:
        return round(1000 * statistics.median(run[part] for run in taken[way, count, one]), 3)

    return [
        {"threads": count, "requests": one[0], "rows": one[1], "kept": one[2]}
        | {f"{part}_ms": median("", count, one, part) for part in (*PARTS, "all")}
        | {f"{way}{part}_ms": median(way, count, one, part) for way in ways[1:] for part in ("experts", "all")}
        for count in threads
        for one in PASSES
    ]


def numbers(text: str) -> list[int]:
    """Threads, separated by commas."""
    found = [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of at least 1, separated by commas")
    return found


def main() -> int:
    """Prints a line for each request's memory and for each pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="target with gated delta layers; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=numbers,
        default=[1],
        metavar="N,...",
        help="one number or several that take turns; default: 1",
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected at least 1")
    requests = max(one[0] for one in PASSES)
    draft = "auto" if args.model == MODEL else "lookup"
    with LLM(
        args.model,
        draft,
        threads=max(args.threads),
        max_running=requests,
        prefix_cache=False,
        adaptive=False,
        lookup=False,
    ) as llm:
        if llm._target.state is None:
            parser.error(f"--model: got {args.model}, expected a target with recurrent layers")
        head = header(sys.argv[1:], llm) | {"command": "python benchmarks/hybrid.py", "rounds": args.rounds}
        memory = [{"model": args.model, "block_size": llm.block_size, "how": "measured", **allocated(llm, requests)}]
        memory.append({"model": "397B", "block_size": LARGE_BLOCK, "how": "computed", **large()})
        passes = measure(llm, args.rounds, args.threads)
    for row in memory:
        sizes = [row[name] / 2**20 for name in ("state", "fed_in", "snapshots")]
        print(
            f"{row['model']}, {row['how']}, of a request: state {sizes[0]:.2f} MiB and {sizes[1]:.2f} MiB that a block of {row['block_size']} "
            f"feeds in; a snapshot after every token would be {sizes[2]:.2f} MiB"
        )
    columns = ("all", *PARTS, *(part for part in ("torch_experts", "torch_all") if f"{part}_ms" in passes[0]))
    print("threads requests rows kept " + " ".join(f"{part:>13}" for part in columns) + "  (ms)")
    for row in passes:
        times = " ".join(f"{row[f'{part}_ms']:13.2f}" for part in columns)
        print(f"{row['threads']:7} {row['requests']:8} {row['rows']:4} {row['kept']:4} {times}")
    if args.json is not None:
        args.json.write_text(
            json.dumps({"header": head, "memory": memory, "passes": passes}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""SGLang's Triton kernels as scripts/gpu_suite calls them, run by Triton's interpreter on the CPU: prints what each gives, as JSON.

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and a driver is looked for once.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sglang_host import cuda as host_cuda

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "gpu_suite"), str(ROOT / "tests" / "gpu")]
host_cuda.emulate()

import peers  # noqa: E402
import reference  # noqa: E402
import shapes  # noqa: E402
from shapes import Batch, Case  # noqa: E402

CPU = torch.device("cpu")


class OnDevice(torch.Tensor):
    """Passes for a tensor on a GPU where a launcher has another way for the CPU."""

    is_cuda = property(lambda self: True)


def attention(case: Case) -> Callable[[], object]:
    """float64, of a random tree where the mask is one."""
    x, batch = case.inputs, case.inputs.batch
    host = reference.Batch(
        batch.starts.numpy(), batch.lens.numpy(), batch.table.pages.numpy(), batch.table.row_ids.numpy(),
        batch.table.page_size, batch.num_slots,
    )  # fmt: skip
    parents = None
    if x.mask == "ancestors":
        rng = np.random.default_rng()
        parents = [reference.random_parents(rng, batch.n) for _ in range(batch.requests)]
        words = np.concatenate([reference.masks_of(p, 1) for p in parents])
        x.ancestors.copy_(torch.from_numpy(words.view(np.int64)))
    expected = reference.attention(host, x.q, x.k, x.v, *x.caches, scale=x.scale, mask=x.mask, parents=parents)
    # The interpreter multiplies matrices of bfloat16 as if they were integers; the same values in float32 it can.
    for name in ("q", "k", "v"):
        setattr(x, name, getattr(x, name).float())
    x.caches = [cache.float() for cache in x.caches]
    return lambda: x.out.copy_(expected)


def inject(case: Case) -> Callable[[], object]:
    x = case.inputs
    k, v = reference.inject(x.kv, x.norm, x.cos_sin, x.positions, x.eps)

    def call() -> None:
        for caches, values in ((x.caches.k, k), (x.caches.v, v)):
            for layer, cache in enumerate(caches):
                cache[x.slots] = values[:, layer].to(cache.dtype)

    return call


def accept(case: Case) -> Callable[[], object]:
    x, batch = case.inputs, case.inputs.batch
    ids, sampled = x.ids.view(-1, batch.n).numpy(), x.sampled.view(-1, batch.n).numpy()

    def call() -> None:
        x.out.out_tokens.fill_(-1)
        for r in range(batch.requests):
            path = reference.walk(ids[r], np.arange(-1, batch.n - 1), sampled[r])
            tokens = [*ids[r][path[1:]], sampled[r][path[-1]]]
            x.out.accepted[r], x.out.out_lens[r] = len(path) - 1, len(path)
            x.out.next_anchors[r], x.out.context_lens[r] = int(tokens[-1]), batch.context + len(path)
            x.out.out_tokens[r, : len(path)] = torch.tensor(tokens)

    return call


def prepare(case: Case) -> Callable[[], object]:
    x, batch = case.inputs, case.inputs.batch
    table = batch.table

    def call() -> None:
        for row in range(batch.tokens):
            r, i = divmod(row, batch.n)
            page, place = divmod(batch.context + i, table.page_size)
            x.out[0][row] = shapes.MASK_TOKEN if i else x.anchors[r]
            x.out[1][row] = batch.context + i
            x.out[2][row] = table.pages[table.row_ids[r], page] * table.page_size + place

    return call


def move(case: Case) -> Callable[[], object]:
    x, batch = case.inputs, case.inputs.batch
    slots = batch.slots()

    def call() -> None:
        for cache in (*x.caches.k, *x.caches.v):
            for r, path in enumerate(x.path.tolist()):
                nodes = [node for node in path if node >= 0]
                cache[slots[r, batch.context :][: len(nodes)]] = cache[slots[r, batch.context :][nodes]]

    return call


def argmax(case: Case) -> Callable[[], object]:
    return lambda: case.inputs.out.tokens.copy_(case.inputs.logits.argmax(-1))


def argmax_of_many(case: Case) -> Callable[[], object]:
    """The way that is taken for more than 64 rows, for one: the interpreter would need minutes for them."""
    if importlib.util.find_spec(peers.ARGMAX) is not None:
        module = importlib.import_module(peers.ARGMAX)
        module.row_argmax = module._medium_row_argmax
    return argmax(case)


def top_k(case: Case) -> Callable[[], object]:
    x = case.inputs
    logits, x.logits = x.logits, x.logits.as_subclass(OnDevice)
    if importlib.util.find_spec(peers.TOP_K) is not None:
        importlib.import_module(peers.TOP_K)._topk_lse_torch = None  # torch would give the same: not what is asked here

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, ids = logits.double().log_softmax(-1).topk(x.k)
        return ids, log_probs.float()

    return call


def spoil(case: Case) -> None:
    """One entry of what ours has written, the last one, for what returns nothing."""
    x = case.inputs
    if case.kernel.startswith("kv_inject"):
        x.caches.k[-1][x.slots[-1]] += 1
    elif case.kernel.startswith("compact_kv"):
        x.caches.v[-1].add_(1)
    else:
        out = (
            x.out[-1]
            if case.kernel.startswith("prepare")
            else getattr(x.out, "accepted", getattr(x.out, "tokens", x.out))
        )
        out[-1] += 1


def cases() -> Iterator[tuple[Callable[[], Case], Callable[[Case], Callable[[], object]]]]:
    """What to build, and what gives its reference."""
    yield lambda: shapes.prepare_case(Batch(CPU, 3, 5, 21), drafted=False), prepare
    yield lambda: shapes.accept_case(Batch(CPU, 9, 5, 21)), accept
    yield lambda: shapes.accept_case(Batch(CPU, 2, 1, 21)), accept
    yield lambda: shapes.top_k_case(CPU, 3, 9001, 8), top_k
    # More moves than one launch takes, and rows of more than one tile.
    yield lambda: shapes.compact_case(Batch(CPU, 40, 16, 21), 2, 2, 64), move
    yield lambda: shapes.sample_case(CPU, 2, 4, 5003, "greedy", {"temperature": 0}, torch.float32), argmax
    yield lambda: shapes.sample_case(CPU, 1, 1, 4099, "greedy", {"temperature": 0}, torch.float32), argmax_of_many
    for rows, dim in ((16, 64), (9, 128)):
        yield lambda r=rows, d=dim: shapes.inject_case(CPU, r, 2, 2, d), inject
    # verify_splitkv cuts the context into four or more parts of at least 32 keys, and reads memory that nobody wrote where one is empty.
    for mask in ("causal", "block", "ancestors"):
        yield lambda m=mask: shapes.attention_case(Batch(CPU, 2, 5, 101), 4, 2, 64, m), attention
    yield lambda: shapes.attention_case(Batch(CPU, 2, 7, 20), 2, 2, 128, "ancestors"), attention
    for kv_heads in (2, 4):
        yield lambda h=kv_heads: shapes.attention_case(Batch(CPU, 3, 1, 70), 4, h, 64, "causal"), attention


def main() -> None:
    version, detail = peers.sglang()
    found = {"version": version, "detail": detail, "peers": []}
    peers.multiprocessors = lambda device: 4
    for make, build in cases():
        case = make()
        ours, expected = case.call, build(case)
        for peer in peers.peers(case):
            result = {"case": f"{case.kernel} {case.shape}", "kernel": peer.kernel, "failed": peer.failed}
            found["peers"].append(result)
            if peer.peer is None:
                continue
            case.call = expected
            result["reference"] = peer.peer.differs()
            case.call = ours
            result["ours"] = peer.peer.differs()
            if build is not top_k:
                case.call = lambda expected=expected, case=case: (expected(), spoil(case))
                result["spoiled"] = peer.peer.differs()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

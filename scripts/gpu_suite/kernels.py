"""Time of every kernel at working sizes: medians, as a share of measured copy bandwidth, torch and SGLang beside it on the same inputs.

python scripts/gpu_suite/kernels.py OUT.json

Calls are captured in a graph, so that the host's time is not measured; big cases move several times what the L2 cache holds.
SGLang's Triton kernels (peers.py) take part where SGLang can be imported.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dflash_rs import cuda

sys.path.insert(0, str(Path(__file__).parent))
import peers  # noqa: E402
import shapes  # noqa: E402


def median_us(call: Callable[[], object], repeat: int = 15, inner: int = 10) -> float:
    """Microseconds of one call inside a graph of `inner`."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / inner)
    return statistics.median(times)


def eager_us(call: Callable[[], object], repeat: int = 15) -> float:
    """The same for what a graph cannot hold (torch.multinomial checks on the host)."""
    times = []
    for _ in range(repeat + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times[3:])


def peer_times(case: shapes.Case) -> list[dict]:
    """What was found out about SGLang's kernels for a case: `us`, or how one `differs` or why it `failed`, never two of them."""
    rows = []
    for found in peers.peers(case):
        row = {"kernel": found.kernel}
        rows.append(row)
        try:
            if found.peer is None:
                row["failed"] = found.failed
            elif (differs := found.peer.differs()) is not None:
                row["differs"] = differs
            else:
                row |= peer_time(found.peer.call)
        except Exception as error:  # whatever a compiler or a kernel of others raises, our rows go on
            row["failed"] = peers.reason(error)
    return rows


def peer_time(call: Callable[[], object]) -> dict:
    """Inside a graph, or launched anew each time where a graph cannot hold it."""
    try:
        return {"us": median_us(call), "timed": "graph"}
    except Exception as error:
        torch.cuda.synchronize()
        return {"us": eager_us(call), "timed": "eager", "not_captured": peers.reason(error)}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of torch's copy of 1 GiB, read and written."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_us(lambda: target.copy_(source), inner=2) / 1000


def all_cases(device: torch.device):
    """Built one after the other: together they would not fit."""
    chain = lambda context: shapes.Batch(device, 64, 8, context)  # noqa: E731
    for drafted in (True, False):
        yield lambda d=drafted: shapes.prepare_case(chain(1000), d)
    yield lambda: shapes.accept_case(chain(1000))
    yield lambda: shapes.tree_case(device, 64, 7, 8, 32)
    yield lambda: shapes.top_k_case(device, 448, 151936, 8)
    yield lambda: shapes.inject_case(device, 8192, 5, 8, 128)
    yield lambda: shapes.compact_case(shapes.Batch(device, 64, 32, 1000), 36, 8, 128)
    for requests in (1, 64):
        yield lambda r=requests: shapes.delta_case(device, r, 8, 16, 32, 128)
    for context in (1024, 8192):
        for dim, heads, kv_heads in ((64, 32, 8), (128, 32, 8), (256, 16, 4)):
            yield lambda c=context, d=dim, h=heads, k=kv_heads: shapes.attention_case(
                shapes.Batch(device, 32, 8, c), h, k, d, "causal"
            )
    for mask in ("block", "ancestors"):
        yield lambda m=mask: shapes.attention_case(shapes.Batch(device, 32, 16, 8192), 32, 8, 128, m)
    yield lambda: shapes.attention_case(shapes.Batch(device, 1, 16, 32000), 32, 8, 128, "causal")
    yield lambda: shapes.attention_case(shapes.Batch(device, 32, 1, 8192), 32, 8, 128, "causal")  # plain decoding
    for name, options in (
        ("greedy", {"temperature": 0}), ("temperature", {"temperature": 0.8}), ("min_p", {"min_p": 0.05}),
        ("top_p", {"top_p": 0.95}), ("top_k", {"top_k": 50}), ("penalties", {"presence_penalty": 0.5, "history": {5: 1, 9: 2}}),
    ):  # fmt: skip
        yield lambda n=name, o=options: shapes.sample_case(device, 64, 512, 151936, n, o)
    yield lambda: shapes.sample_case(device, 64, 512, 151936, "greedy", {"temperature": 0}, torch.float32)


def main(path: str) -> None:
    """Measures and writes."""
    device = torch.device("cuda", 0)
    cuda.load(device)
    bandwidth = copy_bandwidth(device)
    print(f"copy {bandwidth:.0f} GB/s")
    version, detail = peers.sglang()
    print(f"SGLang: {detail}", flush=True)
    found = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "copy_gb_s": bandwidth}
    found |= {"sglang": {"version": version, "detail": detail}, "rows": []}
    for make in all_cases(device):
        case = make()
        row = {"kernel": case.kernel, "shape": case.shape, "us": median_us(case.call)}
        if case.bytes is not None:
            row["bandwidth_share"] = case.bytes / row["us"] / 1000 / bandwidth
        if case.torch_call is not None:
            row["torch_us"] = eager_us(case.torch_call)
        if version is not None and (others := peer_times(case)):
            row["sglang"] = others
            if times := [other["us"] for other in others if "us" in other]:
                row["sglang_us"] = min(times)
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        # After every row: a kernel of others that leaves the device in error takes the process with it, not what was measured.
        Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])

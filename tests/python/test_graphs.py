"""Captures and their bookkeeping, with a stand-in for torch.cuda that knows which device is current."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dflash_rs.engine.device.graphs import Graphs


class Cuda:
    """As much of torch.cuda as a capture uses. `log` has what was done, with the device that was current."""

    def __init__(self):
        self.now = 0
        self.log: list[tuple] = []
        self.streams = 0
        self.pools = 0

    @contextlib.contextmanager
    def device(self, device):
        before, self.now = self.now, torch.device(device).index
        yield
        self.now = before

    def current_stream(self, device):
        return SimpleNamespace(
            device=torch.device(device).index, wait_stream=lambda other: None, synchronize=lambda: self.note("wait")
        )

    def note(self, what, *more):
        self.log.append((what, self.now, *more))

    def Stream(self, device):  # noqa: N802
        self.streams += 1
        return SimpleNamespace(name=f"{torch.device(device)} stream {self.streams}", wait_stream=lambda other: None)

    @contextlib.contextmanager
    def stream(self, stream):
        self.note("try", stream.name)
        yield

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.note("replay"), pool=lambda: "pool")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.note("capture", stream.name, pool)
        yield


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda()
    for name in ("device", "current_stream", "Stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_everything_of_a_capture_is_on_the_engines_own_device_and_one_stream(cuda):
    graphs = Graphs(torch.device("cuda:1"))
    for key in ("a", "b"):
        graphs.run(key, lambda: None)
    assert {device for _, device, *_ in cuda.log} == {1}, "cuda:0 is the one that is current"
    assert cuda.streams == 1
    assert [entry[0] for entry in cuda.log] == ["try", "capture", "replay"] * 2
    assert [entry[2:] for entry in cuda.log if entry[0] == "capture"] == [
        ("cuda:1 stream 1", None),
        ("cuda:1 stream 1", "pool"),
    ]
    assert cuda.now == 0


def test_two_engines_on_two_devices_capture_each_on_its_own(cuda):
    both = [Graphs(torch.device("cuda", index)) for index in (0, 1)]
    for turn in range(2):
        for graphs in both:
            graphs.run("step", lambda: None)
        assert [device for what, device, *_ in cuda.log if what == "replay"][-2:] == [0, 1], turn
    assert {entry[1]: entry[2] for entry in cuda.log if entry[0] == "capture"} == {
        0: "cuda:0 stream 1",
        1: "cuda:1 stream 2",
    }


def test_the_graph_that_was_not_used_for_longest_is_dropped_once_nothing_runs(cuda):
    graphs = Graphs(torch.device("cuda:0"), most=2)
    made = []

    def run(key):
        graphs.run(key, lambda: made.append(key))

    for key in ("a", "b", "a", "c"):
        run(key)
    assert list(graphs._captured) == ["a", "c"] and len(graphs) == 2
    new, again = ["try", "capture", "replay"], ["replay"]
    assert [entry[0] for entry in cuda.log] == [*new, *new, *again, "wait", *new]
    before = made.count("b")
    run("b")
    assert made.count("b") == before + 3, "captured anew: tried twice, captured once"
    run("b")
    assert made.count("b") == before + 3


def test_graphs_are_bounded_whatever_shapes_come(cuda):
    graphs = Graphs(torch.device("cuda:0"), most=16)
    generator = torch.Generator().manual_seed(5)
    for _ in range(500):
        requests, splits = (int(torch.randint(0, n, (1,), generator=generator)) for n in (9, 7))
        graphs.run((requests, splits), lambda: None)
        assert len(graphs) <= 16
    captures = [entry for entry in cuda.log if entry[0] == "capture"]
    assert 63 <= len(captures) < 500, "some are met again while they are there"


@pytest.mark.parametrize(("clusters", "first"), [(False, 8), (True, 1)])
def test_what_attention_takes_for_partial_results_is_bounded_for_long_prompts(monkeypatch, clusters, first):
    from dflash_rs import cuda

    monkeypatch.setattr(cuda, "clusters", lambda device: clusters)

    def bytes_of(tokens, queries, dim, keys):
        parts = cuda.attention_workspace(tokens, queries.stop - queries.start, dim, keys, "meta")
        return 0 if parts is None else sum(part.nbytes for part in parts)

    # A chunk of 1,024 tokens at the end of 32k in a model of 32 heads over 8: 1.1 GB in one launch, an eighth where groups are merged.
    assert bytes_of(1024, slice(0, 32), 128, 32768) == (8 if clusters else 64) * 1024 * 32 * 130 * 4
    assert [bytes_of(1, slice(0, 1), 64, keys) for keys in (0, 512, 513, 4096, 4097)] == [
        parts * 66 * 4 for parts in ((0, 0, 0, 0, 2) if clusters else (0, 0, 2, 8, 9))
    ]
    generator = torch.Generator().manual_seed(7)
    shapes = [(1024, 32, 8, 128, 32768), (1024, 32, 8, 128, 131072), (32768, 32, 8, 128, 32768), (8, 32, 8, 128, 300)]
    for _ in range(300):
        numbers = [int(torch.randint(1, n, (1,), generator=generator)) for n in (4096, 9, 9, 32768)]
        shapes.append((numbers[0], numbers[1] * numbers[2], numbers[2], 128, numbers[3]))
    several = 0
    for tokens, heads, kv_heads, dim, keys in shapes:
        pieces, group = cuda._heads_at_a_time(tokens, heads, kv_heads, dim, keys, "meta"), heads // kv_heads
        assert [h for q, _ in pieces for h in range(q.start, q.stop)] == list(range(heads)), "every head once, in order"
        for q, k in pieces:
            # Launched alone, heads have the key heads that they have among all.
            count, keyed = q.stop - q.start, k.stop - k.start
            assert [k.start + i // (count // keyed) for i in range(count)] == [
                h // group for h in range(q.start, q.stop)
            ]
            assert bytes_of(tokens, q, dim, keys) <= cuda.WORKSPACE_BYTES or count == 1
        several += len(pieces) > 1
    assert 20 < several < len(shapes) and len(cuda._heads_at_a_time(*shapes[0], "meta")) == first


def test_shapes_come_likeliest_first_and_each_once():
    from dflash_rs.engine.device.ahead import shapes

    found = list(shapes(6, [8, 1, 4], 1500))
    assert [tuple(shape) for shape in found[:4]] == [(n, 8, 1, False) for n in (1, 2, 4, 6)]
    assert len(found) == len(set(found)) == 4 * 3 * 3 * 2
    assert {shape.splits for shape in found} == {1, 2, 4}, (
        "1,500 keys are three splits of 512, for which graphs have four"
    )
    far = [8, 1, 4].index(found[-1].block) + found[-1].splits.bit_length() - 1 + found[-1].filters
    assert far == 2 + 2 + 1
    assert [tuple(shape) for shape in shapes(1, [1], 1)] == [(1, 1, 1, False), (1, 1, 1, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture_ahead": 257}, "capture_ahead: got 257, expected an integer in 0..256"),
        ({"capture_ahead": 4, "cuda_graphs": False}, "capture_ahead: got 4, expected 0 with cuda_graphs=False"),
        (
            {"capture_ahead": 4},
            "capture_ahead: got 4, expected 0 where steps do not stay on a GPU: there are no graphs",
        ),
    ],
)
def test_graphs_that_cannot_be_captured_ahead_are_refused(options, message):
    from dflash_rs import LLM, InvalidArgument

    with pytest.raises(InvalidArgument) as caught:
        LLM(device="cpu", **options)
    assert str(caught.value) == message

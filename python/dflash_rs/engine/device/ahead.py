"""Graphs that are captured before the first request: of made-up steps, the likeliest shapes first.

A graph is captured when a step of its shape is first met, which costs that step as much as several tens of others. What shapes a service will meet
nobody knows; they come in powers of two, so the small ones are few: whole blocks before shortened ones, short contexts before long ones, steps
without filters before those with, every number of requests.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ... import cuda
from .step import DeviceBackend, Wanted


class Shape(NamedTuple):
    """A decoding step: requests, tokens of each, splits of their keys, whether any of them filters its vocabulary."""

    requests: int
    block: int
    splits: int
    filters: bool


class Captured(NamedTuple):
    """How many graphs, how long it took, and by how much less memory of the device is free."""

    graphs: int
    seconds: float
    bytes: int


def shapes(rows: int, blocks: list[int], max_keys: int) -> Iterator[Shape]:
    """Every shape that steps of up to `rows` requests over up to `max_keys` keys can have, the likeliest first; `blocks` likewise."""
    counts = [*itertools.takewhile(lambda n: n < rows, (1 << i for i in itertools.count())), rows]
    most = max(0, (-(-max_keys // cuda.SPLIT_KEYS) - 1).bit_length())
    ranked = sorted(
        itertools.product(range(len(blocks)), range(most + 1), (False, True)), key=lambda each: (sum(each), each)
    )
    for (b, splits, filters), requests in itertools.product(ranked, counts):
        yield Shape(requests, blocks[b], 1 << splits, filters)


def row_lengths(backend: DeviceBackend) -> list[int]:
    """Tokens of a row that steps come in, the likeliest first: whole blocks or trees, none drafted, and what is left at a text's end."""
    if backend.tree_nodes:
        whole, others = backend.tree_nodes + 1, backend.widths
    else:
        whole, others = backend.block_size, list(range(1, backend.block_size))
    return list(dict.fromkeys([whole, 1, *sorted(others, reverse=True)]))


def run(backend: DeviceBackend, shape: Shape, room: int) -> None:
    """A made-up step of a shape, in up to `room` graphs more."""
    requests, block, splits, filters = shape
    backend.make_up(requests, block)
    keys, trees = splits * cuda.SPLIT_KEYS, backend.tree_nodes > 0 and block > 1
    if backend.draft is not None and block > 1:
        before = backend.num_graphs
        # Who filters samples: with every shape of a batch come both ways of drafting for it.
        backend.draft_graph(requests, block, keys, backend.block_size if trees else None, filters and not trees)
        room -= backend.num_graphs - before
    if room > 0 and backend.target_in_graph:
        backend.verify_graph(requests, block, keys, Wanted(filters, False, 0, backend.draft is not None, trees))


@torch.inference_mode()
def capture(backend: DeviceBackend, most: int) -> Captured:
    """Captures up to `most` graphs. No request may have been taken yet: the steps run, on page 0 and on rows that begin anew."""
    assert backend.graphs is not None
    begun, free = time.perf_counter(), _free(backend.device)
    for shape in shapes(backend.rows, row_lengths(backend), backend.limit):
        if backend.num_graphs >= most:
            break
        run(backend, shape, most - backend.num_graphs)
    left = _free(backend.device)
    return Captured(backend.num_graphs, time.perf_counter() - begun, max(0, free - left))


def _free(device: torch.device) -> int:
    """Bytes of the device that nobody has, with everything done that was launched."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]

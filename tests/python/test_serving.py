"""Planning KV room for requests that another engine keeps; and what the SGLang worker may import."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dflash_rs
from dflash_rs import InvalidArgument, serving


def request_with(committed: Any, allocated: Any) -> SimpleNamespace:
    return SimpleNamespace(kv=SimpleNamespace(kv_committed_len=committed, kv_allocated_len=allocated))


def arrays(rows: int) -> dict[str, np.ndarray]:
    """The arrays that are written, full of numbers that nothing computes."""
    kinds = {"committed": np.int64, "allocated": np.int32, "next": np.int32}
    return {name: np.full(rows, -7, kind) for name, kind in kinds.items()}


def test_every_request_gets_room_in_whole_pages_and_keeps_what_it_has():
    out = arrays(4)
    several = [request_with(10, 10), request_with(33, 64), request_with(96, 112)]
    assert serving.plan_decode(several, 16, 16, **out) == (22, 139, 208)
    assert out["committed"].tolist() == [10, 33, 96, -7]
    assert out["allocated"].tolist() == [10, 64, 112, -7]
    assert out["next"].tolist() == [32, 64, 112, -7]


def test_an_array_may_be_the_memory_of_another():
    memory = np.zeros((2, 3), np.int32)
    out = arrays(1) | {"allocated": memory[0], "next": memory[1]}
    serving.plan_decode([request_with(1, 3)], 4, 1, **out)
    assert memory.tolist() == [[3, 0, 0], [5, 0, 0]]


def test_no_requests_need_nothing():
    assert serving.plan_decode([], 16, 16, **arrays(0)) == (0, 0, 0)


def read_only(rows: int) -> np.ndarray:
    array = np.zeros(rows, np.int32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": (request_with(1, 1),)}, "requests: got a tuple, expected a list"),
        (
            {"requests": [request_with(-1, 1)]},
            r"requests: got -1 for kv\.kv_committed_len of request 0, expected slots in 0",
        ),
        ({"requests": [request_with(1, 2**31)]}, r"requests: got 2147483648 for kv\.kv_allocated_len of request 0"),
        ({"requests": [request_with(2**31 - 1, 0)]}, "requests: got 2147483664 for request 0, expected at most"),
        ({"ahead": -1}, "ahead: got -1, expected an integer in 0"),
        ({"page_size": 0}, "page_size: got 0, expected an integer in 1"),
        ({"committed": np.zeros(1, np.int32)}, "committed: got a int32 array .* expected a writable, contiguous int64"),
        (
            {"allocated": np.zeros(0, np.int32)},
            r"allocated: got a int32 array of shape \[0\], expected .* of at least 1 elements",
        ),
        ({"allocated": [0]}, "allocated: got a list, expected"),
        ({"next": read_only(1)}, "next: got .* expected a writable"),
        ({"next": np.zeros((4, 2), np.int32)[:, 0]}, "next: got .*not C-contiguous, expected a writable, contiguous"),
    ],
)
def test_what_cannot_be_planned_is_named(changes: dict[str, Any], message: str):
    given = {"requests": [request_with(1, 1)], "ahead": 16, "page_size": 16, **arrays(1)}
    with pytest.raises(InvalidArgument, match=message):
        serving.plan_decode(**given | changes)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SimpleNamespace(kv=None), "requests: got None without kv_committed_len for request 0, expected objects with"),
        (object(), "requests: got a object without kv for request 0, expected objects with"),
    ],
)
def test_a_request_without_the_lengths_is_named(request_, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        serving.plan_decode([request_], 16, 16, **arrays(1))


def test_the_sglang_worker_uses_the_public_package_only():
    files = sorted((Path(dflash_rs.__file__).parent / "sglang").glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            private = [name for name in (*names, module) if "_core" in name.split(".")]
            assert not private, f"{file.name}:{node.lineno}: {private}"

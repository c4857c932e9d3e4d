"""How many of torch's threads are worth having where the machine has more to do than processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of this thread since it began: nanoseconds on a processor, nanoseconds ready but without one, number of turns.
_SCHEDULE = Path("/proc/thread-self/schedstat")


def crowded() -> bool:
    """Whether this thread has waited for a processor for more than half as long as it had one; False where the system does not tell."""
    try:
        ran, waited, _ = map(int, _SCHEDULE.read_text().split())
    except (OSError, ValueError):
        return False
    return 2 * waited > ran


@contextmanager
def while_loading() -> Iterator[None]:
    """One thread of torch's on a crowded machine, else as many as before.

    Loading is thousands of short operations. Each ends when the last thread has, which without a processor is a turn of everybody
    else later; until then the others burn theirs.
    """
    threads = torch.get_num_threads()
    if crowded():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Whose threads work: torch's and the extension's, and how many of them are worth having.

Both wait awake for a while after each piece of work, in pools of their own. Where they take turns on the same processors each waits for
the other to fall asleep, which can take far longer than the work. So a pass whose products are all the extension's leaves torch one thread.

torch keeps a number per thread of the caller's. One that computes for the first time while another has handed its threads over begins with one
and stays so until it sets its own: slower, and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of this thread since it began: nanoseconds on a processor, nanoseconds ready but without one, number of turns.
_SCHEDULE = Path("/proc/thread-self/schedstat")
_here = threading.local()


def of_the_extension() -> int:
    """How many threads a call of the extension may use: as many as torch had before they were `handed_over`."""
    return getattr(_here, "threads", None) or torch.get_num_threads()


@contextmanager
def handed_over(when: bool = True) -> Iterator[None]:
    """Within it torch has one thread, and the extension those that torch had; nothing changes unless `when`."""
    threads = torch.get_num_threads()
    if threads == 1 or not when:
        yield
        return
    _here.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _here.threads = None


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

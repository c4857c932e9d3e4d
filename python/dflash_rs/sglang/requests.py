"""Which requests cannot be honoured exactly, and why."""

from __future__ import annotations

from typing import Any


def refusal(req: Any, enable_overlap: bool) -> str | None:
    """What to answer a request that cannot be honoured, naming the option; None serves it."""
    return None

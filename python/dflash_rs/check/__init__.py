"""Whether speculation leaves texts as they are: a battery of situations on `LLM` with any pair, and on two servers."""

from .battery import Battery, CaseResult
from .report import as_json, lines

__all__ = ["Battery", "CaseResult", "as_json", "lines"]

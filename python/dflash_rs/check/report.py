"""What a battery found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .battery import CaseResult


def lines(results: Sequence[CaseResult]) -> list[str]:
    """A line for every case, the differences below it, and the verdict."""
    width = max((len(result.name) for result in results), default=0)
    found = []
    for result in results:
        same = result.texts - len(result.different)
        word = "exact" if result.passed and not result.different else "tied" if result.passed else "WRONG"
        found.append(f"{result.name:{width}}  {word:5}  {same}/{result.texts} texts equal, tau {result.tau:.2f}")
        found += [f"    {problem}" for problem in result.problems]
        for one in result.different:
            how = "greedy" if one.temperature == 0 else f"temperature {one.temperature:g}"
            lead = (
                "one of the texts ends there"
                if one.lead is None
                else f"lead {one.lead:.3g}: {'rounding' if one.explained else 'no rounding'}"
            )
            found.append(
                f"    prompt {one.prompt + 1}, {how}, from token {one.position} on: {one.plain_token} plain, {one.other_token} here, {lead}"
                + (
                    ""
                    if one.layer is None
                    else f"; layer {one.layer} is the first whose output hangs on the passes before"
                )
            )
    wrong = [result.name for result in results if not result.passed]
    tied = sum(len(result.different) for result in results if result.passed)
    texts = sum(result.texts for result in results)
    if wrong:
        found.append(f"{len(wrong)} of {len(results)} cases are wrong: {'; '.join(wrong)}")
    elif tied:
        found.append(f"{texts} texts: {tied} differ where two tokens are tied up to rounding, all others are equal")
    else:
        found.append(f"{texts} texts, all equal to plain decoding")
    return found


def as_json(results: Sequence[CaseResult]) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "passed": all(result.passed for result in results),
        "cases": [asdict(result) | {"passed": result.passed} for result in results],
    }

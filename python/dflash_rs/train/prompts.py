"""Held-out prompts for demonstrations and benchmarks: functions cut off after their first lines.

Taken from the held-out files of a corpus only, a few per file, spread over files by a hash of their names.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path


def _candidates(text: str, head_lines: int, context_lines: int) -> list[str]:
    """Prompts of one file: the lines before a function, its signature and its first `head_lines` lines."""
    lines = text.split("\n")
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        if node.end_lineno - node.lineno < head_lines + 6:
            continue
        begin = max(0, node.lineno - 1 - context_lines)
        end = node.body[0].lineno - 1 + head_lines
        found.append("\n".join(lines[begin:end]).lstrip("\n") + "\n")
    return found


def held_out_prompts(corpus: Path, count: int, min_tokens: int = 24, max_tokens: int = 72) -> list[dict[str, str]]:
    """`count` prompts of `min_tokens`..`max_tokens` tokens from the held-out files, each with its source file's name."""
    from ..models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(corpus / "tokenizer")
    pools: list[tuple[str, list[str]]] = []
    for file in json.loads((corpus / "held_out.json").read_text(encoding="utf-8")):
        prompts = [
            p for p in _candidates(file["text"], 2, 4) if min_tokens <= len(tokenizer(p).input_ids) <= max_tokens
        ]
        prompts.sort(key=lambda p: hashlib.sha256(p.encode()).digest())
        pools.append((file["name"], prompts))
    pools.sort(key=lambda pool: hashlib.sha256(pool[0].encode()).digest())
    chosen: list[dict[str, str]] = []
    turn = 0
    while len(chosen) < count:
        row = [{"source": name, "prompt": prompts[turn]} for name, prompts in pools if turn < len(prompts)]
        if not row:
            raise ValueError(f"count: got {count}, but the held-out files give only {len(chosen)} prompts")
        chosen += row
        turn += 1
    return chosen[:count]

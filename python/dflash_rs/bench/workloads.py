"""What a benchmark runs: held-out prompts and the sampling settings they are run under."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dflash_rs import elsewhere
from dflash_rs.arguments import bad, shown_path
from dflash_rs.config import assets
from dflash_rs.errors import DflashError, InvalidArgument
from dflash_rs.sampling import SamplingParams

# What rows of all categories together are called.
ALL = "all"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the file it was cut from (empty when it came from nowhere in particular), and where it stands, for messages."""

    text: str
    source: str = ""
    where: str = field(default="", compare=False)
    # Of a conversation: its kind, and all messages of its user, of which `text` is the first.
    category: str = ""
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One way to sample. Prompt i runs with `seed + i`, so that equal prompts do not share their draws."""

    temperature: float
    seed: int | None = None

    @property
    def label(self) -> str:
        """How tables call it."""
        return "greedy" if self.temperature == 0 else f"T={self.temperature:g} seeded"


def held_out_prompts(limit: int | None = None) -> list[Prompt]:
    """The bundled prompts, cut from files that neither model of the bundled pair was trained on.

    Raises DflashError when the installation lacks them.
    """
    asset = resources.files("dflash_rs") / "assets" / "prompts.json"
    try:
        text = asset.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DflashError(
            f"the bundled prompts are missing ({asset}); reinstall dflash-rs, or pass --prompt-file"
        ) from None
    return _take(parse_prompts(text, str(asset)), limit, str(asset))


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Prompts from a file: a JSON list, JSON lines, or plain text with one prompt per line.

    JSON entries are strings or objects with "prompt" (and optionally "source"). Other keys are not looked at, but one that is named as a
    sampling option is refused. The file is UTF-8, with or without a byte
    order mark.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidArgument(f"prompt file {shown_path(path)}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"prompt file {path}: not UTF-8 text (byte {error.start})") from None
    return _take(parse_prompts(text, str(path)), limit, str(path))


def bundled_conversations(limit: int | None = None) -> list[Prompt]:
    """The package's own conversations for comparing engines: questions of code, mathematics and prose; see `read_conversations`.

    Raises DflashError when the installation lacks them.
    """
    asset = assets() / "bench_prompts.jsonl"
    if not asset.is_file():
        raise DflashError(f"the bundled prompts are missing ({asset}); reinstall dflash-rs, or pass --prompts FILE")
    return read_conversations([asset], limit)


def read_conversations(paths: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """What users say, by category, from files of JSON lines; of each category the first `limit`.

    A line is an object with "prompt" (one message) or "turns" (several, answered one by one), "category", and "id", which is a text and
    occurs once. Other keys are not looked at, but one that is named as a sampling option is refused. Raises InvalidArgument that names the file and the line.
    """
    found: list[Prompt] = []
    seen: dict[str, str] = {}
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InvalidArgument(f"prompt file {shown_path(path)}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"prompt file {path}: not UTF-8 text (byte {error.start})") from None
        here = len(found)
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            one = _conversation(line, where)
            if one.source in seen:
                raise InvalidArgument(
                    f"{where}: id: got {one.source!r}, which {seen[one.source]} has, too; expected another"
                )
            seen[one.source] = where
            found.append(one)
        if len(found) == here:
            raise InvalidArgument(f"{path}: contains no prompt")
    if limit is not None and limit < 1:
        raise InvalidArgument(f"--prompts: got {limit}, expected at least 1")
    kinds = dict.fromkeys(one.category for one in found)
    of = {kind: [one for one in found if one.category == kind][:limit] for kind in kinds}
    return [one for kind in kinds for one in of[kind]]


def _conversation(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except _NOT_JSON as error:
        raise InvalidArgument(f"{where} is not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InvalidArgument(
            f'{where}: got {type(entry).__name__}, expected an object with "id", "category" and "prompt" or "turns"'
        )
    for key in ("id", "category"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise InvalidArgument(f"{where}: {key}: got {entry.get(key)!r:.60}, expected a text")
    if entry["category"] == ALL:
        raise InvalidArgument(
            f"{where}: category: got {ALL!r}, which stands for all categories together, expected another"
        )
    if ("prompt" in entry) == ("turns" in entry):
        raise InvalidArgument(
            f'{where}: got {"both" if "prompt" in entry else "none"} of "prompt" and "turns", expected one of them'
        )
    turns = [entry["prompt"]] if "prompt" in entry else entry["turns"]
    if not isinstance(turns, list) or not turns:
        raise InvalidArgument(f"{where}: turns: got {turns!r:.60}, expected a list of messages")
    for i, turn in enumerate(turns):
        if not isinstance(turn, str) or not turn.strip() or any("\ud800" <= c <= "\udfff" for c in turn):
            name = "prompt" if "prompt" in entry else f"turns[{i}]"
            raise InvalidArgument(f"{where}: {name}: got {turn!r:.60}, expected a text")
    _refuse_options(entry, where)
    return Prompt(turns[0], entry["id"], where, entry["category"], tuple(turns))


def parse_prompts(text: str, name: str) -> list[Prompt]:
    """The prompts in `text`; `name` is used in messages."""
    # Prompts may well begin with a bracket: only a file that says so by its name, or is JSON, is read as JSON.
    declared = name.endswith((".json", ".jsonl"))
    stripped = text.lstrip()
    if stripped.startswith("[") and (declared or _is_json(text)):
        try:
            entries = json.loads(text)
        except _NOT_JSON as error:
            raise InvalidArgument(f"{name}: not a JSON list ({error})") from None
        return [_prompt(entry, f"{name}: entry {i}") for i, entry in enumerate(entries)]
    # Not splitlines(), which takes form feeds and the like for ends of lines.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith(".jsonl") or (stripped.startswith("{") and (declared or _is_json(lines[0][1]))):
        prompts = []
        for number, line in lines:
            try:
                entry = json.loads(line)
            except _NOT_JSON as error:
                raise InvalidArgument(f"{name}: line {number} is not JSON ({error})") from None
            prompts.append(_prompt(entry, f"{name}: line {number}"))
        return prompts
    return [Prompt(line, where=f"{name}: line {number}") for number, line in lines]


# Not well-formed, numbers of too many digits, nested too deeply.
_NOT_JSON = (ValueError, RecursionError)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except _NOT_JSON:
        return False
    return True


def _prompt(entry: object, where: str) -> Prompt:
    if isinstance(entry, str):
        text, source = entry, ""
    elif isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        text, source = entry["prompt"], str(entry.get("source", ""))
    elif isinstance(entry, dict) and "prompt" in entry:
        raise bad(f"{where}: prompt", entry["prompt"], "a text")
    else:
        raise bad(where, entry, 'a string or an object with "prompt"')
    if not text:
        raise InvalidArgument(f"{where}: the prompt is empty")
    if isinstance(entry, dict):
        _refuse_options(entry, where)
    return Prompt(text, source, where)


def _refuse_options(entry: dict[str, Any], where: str) -> None:
    """Refuses what reads as an option of this prompt alone: it would be left out in silence, as other keys are that say what the prompt is."""
    known = {option.name for option in fields(SamplingParams)} | elsewhere.SAMPLING.keys()
    option = next((key for key in entry if key in known), None)
    if option is not None:
        raise bad(f"{where}: {option}", entry[option], "no sampling option: those of the command hold for all prompts")


def _take(prompts: Sequence[Prompt], limit: int | None, name: str) -> list[Prompt]:
    if not prompts:
        raise InvalidArgument(f"{name}: contains no prompt")
    if limit is None:
        return list(prompts)
    if limit < 1:
        raise InvalidArgument(f"--prompts: got {limit}, expected at least 1")
    return list(prompts[:limit])

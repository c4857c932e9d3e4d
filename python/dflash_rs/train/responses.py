"""Training texts for a drafter: what the target itself writes.

A drafter meets its target's own text at run time, so it must be trained on it (DFlash, arXiv 2602.06036, section 4.2). The texts are
sampled at several temperatures above zero, because greedy text of a small model repeats itself. They answer prompts from a file, or
prompts that the target writes itself as the user of its chat template, or they continue random windows of a corpus's training files.
Work is cut into shards that are written whole, so an interrupted run continues at the next shard.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidArgument
from ..options import pick_device, pick_dtype
from .chats import Conversation, Template, pick_openings, read_openings, read_prompts
from .common import Limit, Progress, read_settings, same_settings, write_first
from .documents import Documents
from .settings import ResponseSettings

# An answer shorter than this teaches nothing; it needs so much room at least.
_SHORTEST = 8
# A small target as a user soon loses the thread at 1.
_USER_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Source:
    """Where the prompts of shard i come from: `prompts(settings, random numbers of this shard, i, engine)` are conversations to be continued.
    `name` tells it from others, in a folder of responses."""

    name: str
    prompts: Callable[[ResponseSettings, np.random.Generator, int, Any], list[Conversation]]


def from_corpus(data: Path) -> Source:
    """Random windows of a corpus's training files (`corpus.prepare`), continued."""
    tokens = np.load(data / "train.npy")

    def prompts(settings: ResponseSettings, rng: np.random.Generator, shard: int, llm: Any) -> list[Conversation]:
        lengths = rng.integers(settings.min_prompt, settings.max_prompt + 1, settings.batch_size)
        starts = rng.integers(0, tokens.size - settings.max_prompt, settings.batch_size)
        windows = [tokens[s : s + n].astype(np.int64).tolist() for s, n in zip(starts, lengths, strict=True)]
        return [Conversation("text", tokens=window, own=[False] * len(window)) for window in windows]

    return Source(f"corpus {_digest(data / 'train.npy')}", prompts)


def from_file(path: Path) -> Source:
    """The prompts of a JSON-lines file, in turn, as often as it takes."""
    conversations = read_prompts(path)

    def prompts(settings: ResponseSettings, rng: np.random.Generator, shard: int, llm: Any) -> list[Conversation]:
        first = shard * settings.batch_size
        return [copy.deepcopy(conversations[(first + j) % len(conversations)]) for j in range(settings.batch_size)]

    return Source(f"prompts {_digest(path)}", prompts)


def from_target() -> Source:
    """Prompts that the target writes itself, as the user of its chat template, after openings of several kinds. Those that do not end, are
    empty or were written twice are dropped, so that a shard holds fewer than `batch_size`."""

    def prompts(settings: ResponseSettings, rng: np.random.Generator, shard: int, llm: Any) -> list[Conversation]:
        template = Template(llm.tokenizer, llm.model_dir)
        openings = pick_openings(read_openings(settings.openings), settings.batch_size, rng)
        began = [Conversation(category) for category, _ in openings]
        asked = _ask(llm, template, settings, rng, began, [opening for _, opening in openings])
        found: dict[str, Conversation] = {}
        for conversation in asked:
            found.setdefault(conversation.messages[0]["content"], conversation)
        return list(found.values())

    return Source("own prompts", prompts)


def _digest(path: Path) -> str:
    """A file's name and a few digits of its hash."""
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _ask(
    llm: Any,
    template: Template,
    settings: ResponseSettings,
    rng: np.random.Generator,
    conversations: list[Conversation],
    openings: list[str],
) -> list[Conversation]:
    """Lets the target write the user's next message of each; those whose message is none are left out."""
    from dflash_rs import SamplingParams

    prompts = [template.to_ask(c.messages, opening) for c, opening in zip(conversations, openings, strict=True)]
    params = [
        SamplingParams(
            temperature=_USER_TEMPERATURE,
            top_p=0.95,
            seed=int(rng.integers(2**31)),
            max_tokens=settings.max_prompt,
            stop_token_ids=[template.turn_end],
        )
        for _ in prompts
    ]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + settings.max_prompt < settings.seq_len]
    outputs = llm.generate([prompts[i] for i in fitting], [params[i] for i in fitting]) if fitting else []
    kept = []
    for i, output in zip(fitting, outputs, strict=True):
        text = (openings[i] + output.text).strip()
        if output.finish_reason == "stop" and text and text != openings[i].strip() and "\ufffd" not in text:
            conversations[i].messages.append({"role": "user", "content": text})
            kept.append(conversations[i])
    return kept


def _answer(
    llm: Any, settings: ResponseSettings, rng: np.random.Generator, conversations: list[Conversation]
) -> list[Conversation]:
    """Lets the target write what comes next in each; those without room for it are left out."""
    from dflash_rs import SamplingParams

    chats = any(c.messages for c in conversations)
    template = Template(llm.tokenizer, llm.model_dir) if chats else None
    prompts = []
    for c in conversations:
        if c.messages:
            assert template is not None
            prompts.append(template.to_answer(c.messages))
        else:
            prompts.append(c.tokens or llm.encode(c.asked.pop(0)))
    params = [
        SamplingParams(
            temperature=settings.temperature_list[j % len(settings.temperature_list)],
            seed=int(rng.integers(2**31)),
            max_tokens=max(_SHORTEST, settings.seq_len - len(prompt)),
            ignore_eos=not c.messages,
        )
        for j, (c, prompt) in enumerate(zip(conversations, prompts, strict=True))
    ]
    fitting = [j for j, prompt in enumerate(prompts) if len(prompt) + _SHORTEST <= settings.seq_len]
    outputs = llm.generate([prompts[j] for j in fitting], [params[j] for j in fitting]) if fitting else []
    for j, output in zip(fitting, outputs, strict=True):
        conversations[j].add(list(prompts[j]), list(output.token_ids), output.text)
    return [conversations[j] for j in fitting]


def write_shard(llm: Any, source: Source, settings: ResponseSettings, shard: int) -> Documents:
    """The texts of one shard: it depends on the settings and its number only."""
    rng = np.random.default_rng((settings.seed, shard))
    running = source.prompts(settings, rng, shard, llm)
    finished: list[Conversation] = []
    for turn in range(1, max(settings.turns, 1 + max((len(c.asked) for c in running), default=0)) + 1):
        running = _answer(llm, settings, rng, running)
        finished += running
        chats = [c for c in running if c.messages]
        given = [c for c in chats if c.asked]
        for c in given:
            c.messages.append({"role": "user", "content": c.asked.pop(0)})
        more = [c for c in chats if not any(c is g for g in given)] if turn < settings.turns else []
        running = given + (
            _ask(llm, Template(llm.tokenizer, llm.model_dir), settings, rng, more, [""] * len(more)) if more else []
        )
        if not running:
            break
    # A chat stands there once for every turn; it is the same object, with all of its turns.
    texts = {id(c): c for c in finished if sum(c.own) >= _SHORTEST}
    return Documents.of([(c.tokens, c.own, c.category) for c in texts.values()])


def generate(
    target: str | Path,
    source: Source,
    out: Path,
    settings: ResponseSettings,
    part: tuple[int, int] = (0, 1),
    *,
    dtype: str = "auto",
    device: str = "auto",
    at_once: int | None = None,
    minutes: float | None = None,
) -> int:
    """Writes ``out/shard-NNNNN.npz`` (`Documents`) until `sequences` were asked for; returns how many shards of its part are still missing.

    That is none without `minutes`; with it, no shard is begun that would not end within them, going by the longest so far, but the first.

    A shard depends on the seed and its own number only, so several processes can share the work: `part` (k, n) writes every n-th shard,
    from shard k on. `dtype` and `device` are the engine's; `at_once` of a shard's sequences are written side by side (None: all), which
    changes no text. In a shard of several times as many, a finished one makes room for the next and few are left to end alone.
    """
    import torch

    settings.check()
    pick_dtype(torch, dtype, pick_device(torch, device))
    if settings.openings:
        read_openings(settings.openings)
    limit = Limit(minutes)
    at_once = settings.batch_size if at_once is None else at_once
    if at_once < 1:
        raise ValueError(f"at_once: got {at_once}, expected at least 1")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part: got {part[0]}/{part[1]}, expected K/N with 0 <= K < N")
    # How many there are to be is no part of what one of them is: more may be asked for later.
    kind = {name: value for name, value in asdict(settings).items() if name != "sequences"}
    kind |= {"target": str(target), "source": source.name}
    if (out / "settings.json").exists():
        _same_kind(out, read_settings("out", out / "settings.json"), kind)

    shards = -(-settings.sequences // settings.batch_size)
    missing = [i for i in range(part[0], shards, part[1]) if not (out / f"shard-{i:05}.npz").exists()]
    if not missing:
        print(f"all {len(range(part[0], shards, part[1]))} shards are in {out}", file=sys.stderr)
        return 0
    llm = _engine(target, settings, at_once, dtype, device)
    # Only now: what cannot be written is nothing that the folder holds.
    out.mkdir(parents=True, exist_ok=True)
    _same_kind(out, write_first(out / "settings.json", kind), kind)
    mine = len(range(part[0], shards, part[1]))
    progress = Progress(mine, "shards", every=30)
    texts = tokens = written = 0
    longest = 0.0
    for i in missing:
        if written and limit.over(ahead=longest):
            break
        begun = time.monotonic()
        documents = write_shard(llm, source, settings, i)
        documents.save(out / f"shard-{i:05}.npz")
        texts, tokens = texts + len(documents), tokens + int(documents.own.sum())
        written, longest = written + 1, max(longest, time.monotonic() - begun)
        said = f"{texts:,} texts, {tokens:,} tokens written by the target in this run"
        progress.show(mine - len(missing) + written, said, force=written == len(missing))
    llm.close()
    if (without := written * settings.batch_size - texts) > 0:
        print(
            f"{without:,} of {written * settings.batch_size:,} gave no text: a prompt that leaves no room for an answer within --seq-len, a message "
            f"of the target's own that did not end within --max-prompt or came twice, or an answer of less than {_SHORTEST} tokens",
            file=sys.stderr,
        )
    return len(missing) - written


def _same_kind(out: Path, before: dict, now: dict) -> None:
    """Raises ValueError where a folder holds something else. What an older one does not tell is taken to be the same."""
    same_settings("out", out, now | before, now)


def _engine(target: str | Path, settings: ResponseSettings, at_once: int, dtype: str, device: str) -> Any:
    """What writes. Raises InvalidArgument in the words of this command's settings."""
    from dflash_rs import LLM

    try:
        return LLM(
            model=target,
            draft=None,
            device=device,
            dtype=dtype,
            max_running=at_once,
            max_context=settings.seq_len,
            num_pages=at_once * (settings.seq_len // 16 + 2),
            page_size=16,
            max_batch_tokens=max(1024, at_once * settings.max_prompt // 4),
            prefix_cache=False,
        )
    except InvalidArgument as error:
        for theirs, ours in (("max_context", "seq_len"), ("num_pages, page_size", "at_once, seq_len")):
            if str(error).startswith(f"{theirs}:"):
                raise InvalidArgument(f"{ours}{str(error).removeprefix(theirs)}") from None
        raise


def load(folder: Path) -> Documents:
    """All finished shards, in order."""
    return Documents.load(folder)

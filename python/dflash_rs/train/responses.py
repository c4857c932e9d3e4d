"""Training sequences for a drafter: what the target itself would write after prompts from the corpus.

A drafter meets its target's own text at run time, so it must be trained on it (DFlash, arXiv 2602.06036, section 4.2). Prompts
are random windows of the *training* files; the responses are sampled at several temperatures above zero, because greedy text of
a small model repeats itself. Work is cut into shards that are written whole, so an interrupted run continues at the next shard.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .common import Progress
from .settings import ResponseSettings


def generate(target: Path, data: Path, out: Path, settings: ResponseSettings, part: tuple[int, int] = (0, 1)) -> None:
    """Writes ``out/shard-NNNNN.npy`` (``uint16 [batch_size, seq_len]``) until `sequences` are there.

    `target` is a model folder, `data` a corpus folder (`corpus.prepare`). A shard depends on the seed and its own number only, so
    several processes can share the work: `part` (k, n) writes every n-th shard, from shard k on.
    """
    from dflash_rs import LLM, SamplingParams

    settings.check()
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part: got {part[0]}/{part[1]}, expected K/N with 0 <= K < N")
    out.mkdir(parents=True, exist_ok=True)
    described = out / "settings.json"
    # How many there are to be is no part of what one of them is: more may be asked for later.
    kind = {name: value for name, value in asdict(settings).items() if name != "sequences"}
    if described.exists() and json.loads(described.read_text()) != kind:
        raise ValueError(f"out: {out} holds responses made with other settings; choose another folder")
    described.write_text(json.dumps(kind))

    tokens = np.load(data / "train.npy")
    shards = -(-settings.sequences // settings.batch_size)
    missing = [i for i in range(part[0], shards, part[1]) if not (out / f"shard-{i:05}.npy").exists()]
    if not missing:
        return
    llm = LLM(
        model=str(target),
        draft=None,
        max_running=settings.batch_size,
        num_pages=settings.batch_size * (settings.seq_len // 16 + 2),
        page_size=16,
        max_batch_tokens=settings.batch_size * settings.max_prompt,
        prefix_cache=False,
    )
    progress = Progress(shards, "shards", every=30)
    for i in missing:
        rng = np.random.default_rng((settings.seed, i))
        lengths = rng.integers(settings.min_prompt, settings.max_prompt + 1, settings.batch_size)
        starts = rng.integers(0, tokens.size - settings.max_prompt, settings.batch_size)
        prompts = [tokens[s : s + n].astype(np.int64).tolist() for s, n in zip(starts, lengths, strict=True)]
        params = [
            SamplingParams(
                temperature=settings.temperature_list[j % len(settings.temperature_list)],
                seed=int(rng.integers(2**31)),
                max_tokens=settings.seq_len - len(prompt),
                ignore_eos=True,
            )
            for j, prompt in enumerate(prompts)
        ]
        outputs = llm.generate(prompts, params)
        rows = np.asarray([p + o.token_ids for p, o in zip(prompts, outputs, strict=True)], dtype=np.uint16)
        temporary = out / f"shard-{i:05}.tmp.npy"
        np.save(temporary, rows)
        temporary.rename(out / f"shard-{i:05}.npy")
        progress.show(i + 1, f"{rows.size * (i + 1):,} tokens")
    llm.close()


def load(folder: Path) -> np.ndarray:
    """All finished shards as one ``uint16 [n, seq_len]`` array, in order."""
    shards = sorted(folder.glob("shard-?????.npy"))
    if not shards:
        raise ValueError(f"responses: no shard-*.npy in {folder}; run `dflash-rs train responses` first")
    return np.concatenate([np.load(s) for s in shards])

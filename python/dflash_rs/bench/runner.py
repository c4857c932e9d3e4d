"""How a benchmark is timed.

Promises:
- An arm is never compared with a number from another run: plain and drafted decoding share one engine, one set of prompts and
  one process, and take turns (the order flips every repeat), so that a machine that slows down slows both.
- Every pass over the prompts is one `generate` call; tokens/s counts all output tokens over the whole call, prefill
  and scheduling included. Reported is the median over the repeats; a speed-up is the median of those of the single repeats, whose passes
  follow each other.
- Nothing is timed before a warm-up of every arm.
- The texts are compared token by token. A difference is reported with its place and, where the engine can tell,
  the gap between the two tokens' logits: a gap at rounding level is rounding, anything else is a bug.

The engine is anything with the interface of `dflash_rs.LLM`; the tests drive it with a small fake.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share
from dflash_rs.bench.workloads import Prompt, Setting
from dflash_rs.config import LOOKUP
from dflash_rs.errors import DflashError, InvalidArgument

PLAIN, DFLASH, REFERENCE = "plain", "dflash", "z-lab"
# Behind the name of a drafter with look-up beside it.
BESIDE = f"+ {LOOKUP}"
TRANSFORMERS, TRANSFORMERS_LOOKUP = "transformers", "transformers look-up"
# Loops of others: their texts may differ by rounding, and their draws are others.
FOREIGN = (REFERENCE, TRANSFORMERS, TRANSFORMERS_LOOKUP)
STEPS = "steps"


@dataclass
class Divergence:
    """The first difference between a plain output and another arm's output for the same prompt."""

    prompt: int
    source: str
    position: int
    plain_token: int | None
    other_token: int | None
    logit_gap: float | None = None
    note: str = ""


@dataclass
class Row:
    """One line of the table: one arm under one setting at one concurrency."""

    mode: str
    concurrency: int
    temperature: float
    seed: int | None
    tokens_per_s: float
    tau: float
    speedup: float
    # None where the texts cannot be compared: an engine that draws otherwise.
    identical_to_plain: bool | None
    repeated_4gram_share: float
    ngram_tau: float
    identical: str = ""
    identical_to_first_concurrency: bool | None = None
    tokens_per_s_runs: list[float] = field(default_factory=list)
    output_tokens: int = 0
    steps: int = 0
    ttft_s: float = 0.0
    accept_histogram: list[int] = field(default_factory=list)
    accepted_per_position: list[float] = field(default_factory=list)
    stage_seconds: dict[str, float] | None = None
    engine_steps: float | None = None
    vs_reference: float | None = None
    # Places drafted per pass and the most a pass can draft, over all repeats; a step with a whole block in plain steps, as the planner
    # reckons it at the end. None where the engine does not tell.
    drafts_per_pass: float | None = None
    most_drafts: int | None = None
    block_cost: float | None = None
    # Of the suite of peers: which prompts, lower and upper quartile over the rounds, and what the drafter was limited to (tokens of a block
    # with its anchor, drafts of a tree, 0 for chains).
    category: str | None = None
    tokens_per_s_quartiles: list[float] = field(default_factory=list)
    speedup_quartiles: list[float] = field(default_factory=list)
    draft: str | None = None
    block_size: int | None = None
    tree_nodes: int | None = None
    divergences: list[Divergence] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A dict that json can write."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What to measure. `concurrency` is the number of requests that run at once; the rest of the prompts queue."""

    settings: tuple[Setting, ...]
    concurrency: tuple[int, ...] = (1,)
    repeat: int = 3
    max_tokens: int = 128
    profile: bool = False

    def __post_init__(self) -> None:
        if not self.settings:
            raise InvalidArgument("--temperature: got none, expected at least one")
        if not self.concurrency or min(self.concurrency) < 1:
            raise InvalidArgument(f"--concurrency: got {list(self.concurrency)}, expected numbers of at least 1")
        if self.repeat < 1:
            raise InvalidArgument(f"--repeat: got {self.repeat}, expected at least 1")
        if self.max_tokens < 2:
            raise InvalidArgument(
                f"--max-tokens: got {self.max_tokens}, expected at least 2 (the first token comes from the prefill)"
            )


@dataclass
class Pass:
    """One timed `generate` call over all prompts."""

    seconds: float
    outputs: list[Any]

    @property
    def tokens(self) -> int:
        """Output tokens of all prompts."""
        return sum(len(output.token_ids) for output in self.outputs)


def encode(llm: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts as token ids, by the engine's own tokenizer."""
    return [list(llm.encode(prompt.text)) for prompt in prompts]


def timed(llm: Any, prompt_ids: list[list[int]], params: list[Any], draft: bool) -> Pass:
    """Runs all prompts once. A request that did not finish fails the benchmark: its tokens/s would mean nothing."""
    start = time.perf_counter()
    outputs = llm.generate(prompt_ids, params, draft=draft)
    seconds = time.perf_counter() - start
    for i, output in enumerate(outputs):
        if output.finish_reason not in ("stop", "length"):
            raise DflashError(f"prompt {i + 1} ended with {output.finish_reason!r}: nothing to compare")
    return Pass(seconds, outputs)


def sampling_params(setting: Setting, count: int, max_tokens: int, stop_ids: Sequence[int] = ()) -> list[Any]:
    """One SamplingParams per prompt. Outputs end where the model ends them, and at `stop_ids`: equal texts are equal work."""
    from dflash_rs.sampling import SamplingParams

    return [
        SamplingParams(
            temperature=setting.temperature,
            seed=None if setting.seed is None else setting.seed + i,
            max_tokens=max_tokens,
            stop_token_ids=tuple(stop_ids),
        )
        for i in range(count)
    ]


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs (a missing token counts), None when the two are equal."""
    for i, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return i
    return None if len(left) == len(right) else min(len(left), len(right))


def compare(
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    gap: Callable[[int, int, int, int], float | None] | None = None,
) -> list[Divergence]:
    """Every prompt whose two outputs differ, at the first difference.

    `gap(prompt, position, plain_token, other_token)` gives the plain token's lead in logits over the other token
    after the common prefix, or None when the engine cannot tell.
    """
    found = []
    for i, (a, b) in enumerate(zip(plain, other)):
        position = first_difference(a, b)
        if position is None:
            continue
        left = a[position] if position < len(a) else None
        right = b[position] if position < len(b) else None
        lead = gap(i, position, left, right) if gap and left is not None and right is not None else None
        found.append(Divergence(i, prompts[i].source, position, left, right, lead))
    return found


def totals(outputs: Sequence[Any]) -> dict[str, Any]:
    """The outputs' metrics added up: tau is all tokens over all passes, not a mean of taus."""
    steps = sum(output.metrics["steps"] for output in outputs)
    decoded = sum(max(len(output.token_ids) - 1, 0) for output in outputs)
    histogram: list[int] = []
    for output in outputs:
        counts = output.metrics.get("accept_histogram") or []
        histogram += [0] * (len(counts) - len(histogram))
        for k, count in enumerate(counts):
            histogram[k] += count
    drafted = sum(histogram)
    # Position k was accepted by every pass that accepted at least k drafts.
    per_position = [sum(histogram[k:]) / drafted for k in range(1, len(histogram))] if drafted else []
    return {
        "steps": steps,
        "tau": decoded / steps if steps else 0.0,
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "ttft_s": statistics.median(output.metrics.get("ttft_s") or 0.0 for output in outputs),
        "accept_histogram": histogram,
        "accepted_per_position": per_position,
    }


def run_demo(
    make_engine: Callable[[int], Any],
    prompts: Sequence[Prompt],
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Plain decoding against the engine's drafter, on the same engine; the rows of the drafter are called by its kind.

    `make_engine(concurrency)` gives an engine that runs that many requests at once; it is closed here.
    """
    rows: list[Row] = []
    first_outputs: dict[Setting, list[list[int]]] = {}
    for concurrency in plan.concurrency:
        llm = make_engine(concurrency)
        try:
            prompt_ids = encode(llm, prompts)
            say(f"concurrency {concurrency}: warm-up")
            _warm_up(llm, prompt_ids, plan, concurrency)
            for setting in plan.settings:
                say(f"concurrency {concurrency}, {setting.label}: {plan.repeat} x {len(prompts)} prompts, two arms")
                pair = _measure(llm, prompts, prompt_ids, setting, plan, concurrency)
                baseline = first_outputs.setdefault(setting, pair[0][1])
                for row, tokens in pair:
                    row.identical_to_first_concurrency = tokens == baseline
                    rows.append(row)
        finally:
            llm.close()
    return rows


def drafting_arm(llm: Any) -> str:
    """What tables call an engine's own drafts: the drafter's kind, and look-up where it looks up beside it."""
    kind = getattr(llm, "draft_kind", None) or DFLASH
    return f"{kind} {BESIDE}" if getattr(llm, "lookup", False) else kind


def _warm_up(llm: Any, prompt_ids: list[list[int]], plan: Plan, concurrency: int) -> None:
    some = prompt_ids[: max(2, concurrency)]
    for draft in (False, True):
        timed(llm, some, sampling_params(plan.settings[0], len(some), min(plan.max_tokens, 24)), draft)


def _measure(
    llm: Any,
    prompts: Sequence[Prompt],
    prompt_ids: list[list[int]],
    setting: Setting,
    plan: Plan,
    concurrency: int,
) -> list[tuple[Row, list[list[int]]]]:
    params = sampling_params(setting, len(prompts), plan.max_tokens)
    drafted = drafting_arm(llm)
    passes: dict[str, list[Pass]] = {PLAIN: [], drafted: []}
    stages: dict[str, dict[str, float]] = {PLAIN: {}, drafted: {}}
    counts = {name: 0 for name in ("passes", "drafted")}
    for turn in range(plan.repeat):
        order = (PLAIN, drafted) if turn % 2 == 0 else (drafted, PLAIN)
        for mode in order:
            before = _stage_seconds(llm) if plan.profile else {}
            start = llm.stats()
            passes[mode].append(timed(llm, prompt_ids, params, draft=mode == drafted))
            if mode == drafted:
                end = llm.stats()
                counts = {name: counts[name] + end.get(name, 0) - start.get(name, 0) for name in counts}
            if plan.profile:
                for stage, seconds in _stage_seconds(llm).items():
                    spent = seconds - before.get(stage, 0.0)
                    stages[mode][stage] = stages[mode].get(stage, 0.0) + spent

    plain_ids = [list(output.token_ids) for output in passes[PLAIN][0].outputs]
    rates = {mode: [one.tokens / one.seconds for one in runs] for mode, runs in passes.items()}
    gap = logit_gap(llm, prompt_ids, plain_ids)
    block_size = getattr(llm, "block_size", 8) or 8
    result = []
    for mode in (PLAIN, drafted):
        rate = statistics.median(rates[mode])
        # Every repeat has to say the same, not only the first one.
        divergences: list[Divergence] = []
        for one in passes[mode]:
            divergences = compare(prompts, plain_ids, [output.token_ids for output in one.outputs], gap)
            if divergences:
                break
        ids = [list(output.token_ids) for output in passes[mode][0].outputs]
        # Averages over the repeats; a step is one pass of the engine over all running requests, prefill included.
        shares = {stage: total / plan.repeat for stage, total in stages[mode].items()} if plan.profile else None
        engine_steps = shares.pop(STEPS) if shares else None
        row = Row(
            mode=mode,
            concurrency=concurrency,
            temperature=setting.temperature,
            seed=setting.seed,
            tokens_per_s=rate,
            speedup=statistics.median(one / plain for one, plain in zip(rates[mode], rates[PLAIN], strict=True)),
            identical_to_plain=not divergences,
            identical=f"{len(prompts) - len(divergences)}/{len(prompts)}",
            repeated_4gram_share=statistics.fmean(repeated_ngram_share(tokens) for tokens in ids),
            ngram_tau=lookup_tau(list(zip(prompt_ids, ids)), block_size),
            tokens_per_s_runs=rates[mode],
            divergences=divergences,
            stage_seconds=shares,
            engine_steps=engine_steps,
            **totals(passes[mode][0].outputs),
        )
        if mode == drafted and counts["passes"]:
            row.drafts_per_pass, row.most_drafts = counts["drafted"] / counts["passes"], block_size - 1
            row.block_cost = block_cost(llm, block_size, min(concurrency, len(prompts)))
        result.append((row, ids))
    return result


def block_cost(llm: Any, block_size: int, requests: int) -> float | None:
    """What a step of `requests` whole blocks costs in plain steps, by what the planner knows now; None without costs."""
    loop = getattr(llm, "_loop", None)
    costs = None if loop is None else loop.policy.planner.costs
    if costs is None:
        return None
    target, draft = (np.asarray(points, float).T for points in costs[:2])
    plain = float(np.interp(requests, *target))
    rows = requests * block_size
    return (float(np.interp(rows, *target)) + float(np.interp(rows, *draft))) / plain if plain > 0 else None


def _stage_seconds(llm: Any) -> dict[str, float]:
    stats = llm.stats()
    if "stage_seconds" not in stats:
        raise DflashError("--profile: this engine does not report stage_seconds")
    return {**stats["stage_seconds"], STEPS: stats["steps"]}


def logit_gap(
    llm: Any, prompt_ids: list[list[int]], plain_ids: list[list[int]]
) -> Callable[[int, int, int, int], float | None] | None:
    """The engine's own account of a divergence, as `compare` wants it; None when the engine has none."""
    scorer = getattr(llm, "next_token_logits", None)
    if scorer is None:
        return None

    def gap(prompt: int, position: int, plain_token: int, other_token: int) -> float:
        logits = scorer(prompt_ids[prompt] + plain_ids[prompt][:position])
        return float(logits[plain_token]) - float(logits[other_token])

    return gap

"""The z-lab loop (PyPI package `dflash`, MIT) on the same checkpoint and prompts, one request at a time.

It is a dependency of this one suite only and is never imported elsewhere. Greedy only: its sampled mode draws from a
global generator, so its text cannot be compared with ours. The suite of peers runs it at temperatures above 0 as well, for the time it takes.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share
from dflash_rs.bench.runner import (
    DFLASH,
    PLAIN,
    REFERENCE,
    Plan,
    Row,
    compare,
    encode,
    logit_gap,
    sampling_params,
    timed,
)
from dflash_rs.bench.workloads import Prompt
from dflash_rs.errors import DflashError, InvalidArgument

# Its own dependencies are the data sets of its command line, which the loop does not need, so they stay out.
INSTALL = "pip install --no-deps dflash==0.1.0"


class ReferenceLoop:
    """The reference implementation with both models loaded."""

    @staticmethod
    def require() -> None:
        """Raises with the command that installs the package when it is missing."""
        if importlib.util.find_spec("dflash") is None:
            raise DflashError(f"--suite reference compares with the package dflash, which is not installed: {INSTALL}")

    @classmethod
    def beside(cls, llm: Any) -> ReferenceLoop:
        """The loop on the very checkpoints, dtype and device of an engine."""
        return cls(llm.model_dir, llm.draft_dir, llm.dtype, llm.device)

    def __init__(
        self, target_dir: str | Path, draft_dir: str | Path, dtype: Any, device: Any, target: Any | None = None
    ) -> None:
        """`target`: the model, where somebody has loaded it already."""
        self.require()
        try:
            from dflash.model import DFlashDraftModel, dflash_generate
        except ImportError as error:
            raise DflashError(f"the package dflash is installed but does not import ({error}): {INSTALL}") from None
        from dflash_rs.models.checkpoint import load_causal_lm, readable

        self._loop = dflash_generate
        self.target = load_causal_lm(target_dir, dtype)[0].to(device).eval() if target is None else target
        with readable(draft_dir, "draft"):
            draft = DFlashDraftModel.from_pretrained(str(draft_dir), dtype=dtype, trust_remote_code=False)
        self.draft = draft.to(device).eval()
        self.passes = 0
        # Its own statistics need a GPU's clock. Target forwards are counted instead; the first one is the prefill.
        self.target.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        stop_ids: list[int],
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> tuple[list[int], int]:
        """The continuation and the number of decode passes it took."""
        import torch

        if seed is not None:
            torch.manual_seed(seed)
        ids = torch.tensor([list(prompt_ids)], device=self.target.device)
        self.passes = 0
        with torch.inference_mode():
            output = self._loop(self.draft, self.target, ids, max_tokens, stop_ids, temperature=temperature)
        return output[0, len(prompt_ids) :].tolist(), self.passes - 1


Timed = tuple[float, list[list[int]], int]
"""Seconds, output token ids, decode passes."""


def _once(
    llm: Any,
    loop: ReferenceLoop | None,
    prompt_ids: list[list[int]],
    params: list[Any],
    mode: str,
    count: int,
    most: int,
) -> Timed:
    if mode != REFERENCE:
        one = timed(llm, prompt_ids[:count], params[:count], draft=mode == DFLASH)
        return one.seconds, [list(o.token_ids) for o in one.outputs], sum(o.metrics["steps"] for o in one.outputs)
    assert loop is not None
    start = time.perf_counter()
    results = [loop.generate(ids, most, list(llm.eos_token_ids)) for ids in prompt_ids[:count]]
    return time.perf_counter() - start, [ids for ids, _ in results], sum(steps for _, steps in results)


def run_reference(
    make_engine: Callable[[int], Any],
    make_reference: Callable[[Any], ReferenceLoop],
    prompts: Sequence[Prompt],
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Plain, DFlash and the reference loop in turns; the loop has no batch, so it runs at concurrency 1 only."""
    if any(setting.temperature != 0 for setting in plan.settings):
        raise InvalidArgument("--suite reference is greedy only: its loop has no seed per request")
    setting = plan.settings[0]
    rows: list[Row] = []
    reference_rate: float | None = None
    for concurrency in plan.concurrency:
        llm = make_engine(concurrency)
        try:
            prompt_ids = encode(llm, prompts)
            params = sampling_params(setting, len(prompts), plan.max_tokens)
            reference = make_reference(llm) if concurrency == plan.concurrency[0] else None
            modes = [PLAIN, DFLASH] + ([REFERENCE] if reference else [])
            say(f"concurrency {concurrency}: {plan.repeat} x {len(prompts)} prompts, arms {', '.join(modes)}")

            def once(
                mode: str, count: int, arms: tuple[Any, Any, Any, Any] = (llm, reference, prompt_ids, params)
            ) -> Timed:
                return _once(*arms, mode, count, plan.max_tokens)

            for mode in modes:
                once(mode, min(2, len(prompts)))
            runs: dict[str, list[Timed]] = {mode: [] for mode in modes}
            for turn in range(plan.repeat):
                for mode in modes[turn % len(modes) :] + modes[: turn % len(modes)]:
                    runs[mode].append(once(mode, len(prompts)))

            plain_ids = runs[PLAIN][0][1]
            rates = {m: [sum(map(len, ids)) / seconds for seconds, ids, _ in runs[m]] for m in modes}
            median = {mode: statistics.median(values) for mode, values in rates.items()}
            reference_rate = median.get(REFERENCE, reference_rate)
            gap = logit_gap(llm, prompt_ids, plain_ids)
            for mode in modes:
                _, ids, steps = runs[mode][0]
                divergences = compare(prompts, plain_ids, ids, gap)
                rows.append(
                    Row(
                        mode=mode,
                        concurrency=concurrency,
                        temperature=0.0,
                        seed=None,
                        tokens_per_s=median[mode],
                        tau=sum(max(len(one) - 1, 0) for one in ids) / steps if steps else 0.0,
                        speedup=statistics.median(a / b for a, b in zip(rates[mode], rates[PLAIN], strict=True)),
                        identical_to_plain=not divergences,
                        identical=f"{len(prompts) - len(divergences)}/{len(prompts)}",
                        repeated_4gram_share=statistics.fmean(repeated_ngram_share(one) for one in ids),
                        ngram_tau=lookup_tau(list(zip(prompt_ids, ids)), getattr(llm, "block_size", 8) or 8),
                        tokens_per_s_runs=rates[mode],
                        output_tokens=sum(map(len, ids)),
                        steps=steps,
                        vs_reference=median[mode] / reference_rate if mode == DFLASH and reference_rate else None,
                        divergences=divergences,
                    )
                )
        finally:
            llm.close()
    return rows

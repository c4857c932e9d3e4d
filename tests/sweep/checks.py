"""What an architecture is put through: refused by name before it generates, or exact in every way of running it."""

from __future__ import annotations

import contextlib
import io
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dflash_rs import LLM, SamplingParams
from dflash_rs.errors import CheckpointError, UnsupportedModel

from . import tiny
from .oracle import drafting

PROMPTS = [np.random.default_rng(5).integers(12, tiny.VOCAB, n).tolist() for n in (21, 3, 34, 1)]
LENGTH = 10
# Rounding between two orders of summation, on log-probabilities, and how close two tokens may be to count as tied.
TOLERANCE = 5e-3


@dataclass
class Result:
    kind: str
    name: str
    status: str  # exact, refused, different, error, not built
    detail: str = ""
    path: str = ""
    tau: float = 0.0
    distinct: int = 0
    notes: list[str] = field(default_factory=list)


class Different(Exception):
    pass


def _params(i: int, **more) -> SamplingParams:
    return SamplingParams(
        **({"max_tokens": LENGTH, "ignore_eos": True, "temperature": 1.0, "seed": 100 + i, "logprobs": 0} | more)
    )


def _run(llm: LLM, prompts, *, draft: bool = False, **more):
    outputs = llm.generate(prompts, [_params(i, **more) for i in range(len(prompts))], draft=draft)
    for output in outputs:
        if output.error is not None:
            raise Different(f"a request failed: {output.error}")
    return outputs


def _own_logprobs(model, prompt: list[int], output: list[int]) -> torch.Tensor:
    """float32 [outputs, V]: the model's own, by one forward over the whole text without a cache."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output]), use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def _compare_with_model(model, prompts, outputs, what: str, greedy: bool) -> None:
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        own = _own_logprobs(model, prompt, output.token_ids)
        if not bool(own.isfinite().all()):
            raise Different(f"{what}: the model's own logits are not finite")
        taken = own.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in output.logprobs])
        gap = (taken - got).abs()
        if float(gap.max()) > TOLERANCE:
            at = int((gap > TOLERANCE).nonzero()[0])
            raise Different(
                f"{what}: request {i} of {len(prompt)} tokens: log-probability of output token {at} is {float(got[at]):.4f}, the model's "
                f"own {float(taken[at]):.4f}"
            )
        if greedy and float((own.max(-1).values - taken).max()) > TOLERANCE:
            raise Different(f"{what}: request {i}: a token is not the likeliest of the model's own")


def _compare(plain, other, what: str, model, prompts) -> None:
    for i, (a, b) in enumerate(zip(plain, other, strict=True)):
        at = next((j for j, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), None)
        if at is None and len(a.token_ids) == len(b.token_ids):
            continue
        if at is not None:
            # A draw on the boundary between two tokens: rounding decides, if the two say the same of the token before them.
            same = max((abs(x.logprob - y.logprob) for x, y in zip(a.logprobs[:at], b.logprobs[:at])), default=0.0)
            own = _own_logprobs(model, prompts[i], b.token_ids[: at + 1])[at]
            if same < TOLERANCE and abs(float(own[b.token_ids[at]]) - b.logprobs[at].logprob) < 1e-4:
                continue
        raise Different(f"{what}: request {i} differs from token {at} on")


def examine(kind: str, *, seed: int = 0, std: float = 0.3, model=None, dtype: str = "float32", **options) -> Result:
    """Builds, saves, loads and runs a tiny model of type `kind`."""
    result = Result(kind, tiny.classes().get(kind, "?"), "exact")
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            model = tiny.build(kind, seed, std, **options) if model is None else model
            tiny.save(model, Path(folder))
        except Exception as error:
            result.status, result.detail = "not built", f"{type(error).__name__}: {_line(error)}"
            return result
        try:
            _through(result, folder)
        except (UnsupportedModel, CheckpointError) as error:
            result.status, result.detail = "refused", _line(error).replace(folder, "PATH")
            if "Unrecognized configuration class" in result.detail:  # the text part of a model that is none by itself
                result.status = "not built"
        except Different as error:
            result.status, result.detail = "different", str(error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result.status = "error"
            result.detail = f"{type(error).__name__}: {_line(error)} ({Path(where.filename).name}:{where.lineno})"
    return result


def _line(error: BaseException) -> str:
    return (str(error).strip() or "no message").split("\n")[0][:400]


def _through(result: Result, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    options = {"device": "cpu", "dtype": "float32", "max_running": 4, "num_pages": 0, "max_context": 96}
    with LLM(folder, draft=None, page_size=16, **options) as llm:
        result.path = llm._target.path
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        plain = _run(llm, PROMPTS)
        result.distinct = len({t for o in plain for t in o.token_ids})
        _compare_with_model(model, PROMPTS, plain, "together", greedy=False)
        alone = [llm.generate([p], _params(i))[0] for i, p in enumerate(PROMPTS[:2])]
        _compare(plain[:2], alone, "alone", model, PROMPTS[:2])
        greedy = _run(llm, PROMPTS, temperature=0.0)
        _compare_with_model(model, PROMPTS, greedy, "greedy", greedy=True)
    _generate(result, model, greedy)
    small = {"page_size": 4, "max_batch_tokens": 8, "adaptive": False}
    with drafting():
        try:
            llm = LLM(folder, "oracle", **small, **options)
        except UnsupportedModel as error:
            if "no features for a drafter" not in str(error):
                raise
            result.notes.append("without a drafter only: a drafter is refused by name")
            llm = LLM(folder, None, **small, **options)
    with llm:
        chunked = _run(llm, PROMPTS)
        _compare_with_model(model, PROMPTS, chunked, "in chunks", greedy=False)
        _compare(plain, chunked, "in chunks", model, PROMPTS)
        # The same prompts once more, and a longer text that begins with one: found in the cache.
        longer = [PROMPTS[0], PROMPTS[2], PROMPTS[0] + plain[0].token_ids[:9]]
        again = _run(llm, longer)
        if any(o.metrics["cached_prompt_tokens"] == 0 for o in again):
            raise Different("prefix hits: nothing was found in the cache")
        _compare_with_model(model, longer, again, "prefix hits", greedy=False)
        if llm._draft is None:
            return
        # The oracle knows the texts; what it says is right three times of four.
        for temperature, texts in ((1.0, plain), (0.0, greedy)):
            llm._draft.texts = [p + o.token_ids for p, o in zip(PROMPTS, texts)]
            drafted = _run(llm, PROMPTS, draft=True, temperature=temperature)
            what = f"drafted at temperature {temperature:g}"
            _compare_with_model(model, PROMPTS, drafted, what, greedy=temperature == 0)
            _compare(texts, drafted, what, model, PROMPTS)
            result.tau = sum(len(o.token_ids) for o in drafted) / max(1, sum(o.metrics["steps"] for o in drafted))
            if result.tau < 1.3:
                raise Different(f"{what}: {result.tau:.2f} tokens per pass, expected drafts to be accepted")


def _generate(result: Result, model, greedy) -> None:
    """transformers' own `generate`, which keeps a cache. It is noted where that differs from the model without one."""
    for prompt, output in list(zip(PROMPTS, greedy))[:1]:
        try:
            with torch.inference_mode():
                ids = torch.tensor([prompt])
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH,
                    eos_token_id=None, pad_token_id=0,
                )[0, len(prompt) :].tolist()  # fmt: skip
        except Exception as error:
            result.notes.append(f"generate fails ({type(error).__name__}: {_line(error)})")
            return
        if found != output.token_ids:
            at = next(j for j, (x, y) in enumerate(zip(found, output.token_ids)) if x != y)
            own = _own_logprobs(model, prompt, output.token_ids[: at + 1])[at]
            gap = abs(float(own[found[at]] - own[output.token_ids[at]]))
            if gap > TOLERANCE:
                result.notes.append(
                    f"transformers' generate differs from the model without a cache at output token {at} (gap {gap:.2g})"
                )
                return

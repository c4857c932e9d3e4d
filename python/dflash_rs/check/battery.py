"""The battery on `LLM`: situations in which speculation could change a text, each against the text of plain decoding alone.

    plain texts, one request at a time ──> the pair's own drafts, alone, together, in chunks, after prefix hits, beside neighbours that leave
                                       └─> drafts that are all right, half right, wrong at first, all wrong for hundreds of steps

A case also proves that it was what it says: where everything is to be accepted, everything was. A text that differs is explained by the
plain token's lead over the other one in what was compared to choose it: a lead of rounding size is rounding, anything else a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..sampling import SamplingParams
from .drafts import Scripted, Wrong, all_wrong, first_wrong, none_wrong, rest_wrong, some_wrong
from .layers import first_layer

# Leads below this are rounding, by the type that logits are computed in.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
_EIGHT = 8


@dataclass(frozen=True)
class Different:
    """A text that is not the plain one. `lead`: of the plain token over the other one in what they were compared by, None where one of the
    texts ended; `explained`: that is rounding. `layer`: where it is not, the first layer (from 0) whose output hangs on how the text came
    about, None where none was found or looked for. Tokens are ids, or what a server writes for them."""

    case: str
    prompt: int
    temperature: float
    position: int
    plain_token: int | str | None
    other_token: int | str | None
    lead: float | None
    explained: bool
    layer: int | None = None


@dataclass
class CaseResult:
    """What became of a case: texts compared, those that differ, tokens per pass, and what else is wrong with it."""

    name: str
    texts: int = 0
    different: list[Different] = field(default_factory=list)
    tau: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing is wrong that rounding does not explain."""
        return not self.problems and all(one.explained for one in self.different)


class Battery:
    """Cases over one target and, where there is one, its drafter.

    `engine(draft, **sizes)` gives an `LLM` of them with this drafter, or none. `prompts`: token ids, each different from the others in its
    last token or length. `temperatures`: 0 is greedy; the others are seeded.
    """

    def __init__(
        self,
        engine: Callable[..., Any],
        draft: Any | None,
        prompts: Sequence[list[int]],
        *,
        block_size: int,
        max_tokens: int = 64,
        rejected: int = 300,
        rounds: int = 5,
        temperatures: Sequence[float] = (0.0, 0.8),
        tolerance: float | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._engine, self._draft, self._prompts, self._block = engine, draft, [list(p) for p in prompts], block_size
        self._max_tokens, self._rejected, self._rounds = max_tokens, rejected, rounds
        self._temperatures, self._tolerance, self._say = tuple(temperatures), tolerance, say
        self._plain: dict[tuple[float, int], list[list[int]]] = {}

    def run(self) -> list[CaseResult]:
        """All cases, in order."""
        self._say("plain texts, one request at a time")
        with self._engine(None, max_running=1, prefix_cache=False) as llm:
            if self._tolerance is None:
                self._tolerance = TOLERANCE.get(str(llm.dtype).removeprefix("torch."), 1e-3)
            self._vocab, most = llm.vocab_size, llm.max_context
            longest = max(map(len, self._prompts))
            self._max_tokens = min(self._max_tokens, most - longest)
            self._rejected = min(self._rejected, most - min(map(len, self._prompts)))
            for temperature in self._temperatures:
                self._texts(llm, temperature, self._max_tokens, self._prompts)
            self._short = [min(self._prompts, key=len)]
            self._texts(llm, 0.0, self._rejected, self._short)
        cases = list(self._cases())
        found = []
        for name, case in cases:
            self._say(name)
            result = CaseResult(name)
            case(result)
            found.append(result)
        return found

    def _cases(self):
        yield "plain, eight at once", lambda r: self._together(r, None)
        if self._draft is not None:
            draft = self._draft
            yield "own drafts, alone", lambda r: self._alone(r, draft)
            yield f"own drafts, eight at once, {self._rounds} times", lambda r: self._together(r, draft)
            yield "own drafts, prompts in chunks", lambda r: self._chunks(r, draft)
            yield "own drafts, prefix hits", lambda r: self._hits(r, draft)
            yield "own drafts beside plain requests and some that leave", lambda r: self._mixed(r, draft)
        for name, wrong in (
            ("all drafts right", none_wrong),
            ("half of a block right", rest_wrong),
            ("first draft wrong", first_wrong),
            ("one draft of four wrong", some_wrong),
        ):
            yield name, lambda r, wrong=wrong: self._scripted(r, wrong)
        yield f"all drafts wrong, {self._rejected} tokens", self._all_rejected
        yield "one draft of four wrong, prefix hits in chunks", self._scripted_hits

    # ---- cases ---------------------------------------------------------------------------------------------------

    def _alone(self, result: CaseResult, draft: Any) -> None:
        with self._engine(draft, max_running=1, prefix_cache=False) as llm:
            for temperature in self._temperatures:
                outputs = [
                    llm.generate([prompt], self._params(i, temperature, self._max_tokens))[0]
                    for i, prompt in enumerate(self._prompts)
                ]
                self._compare(result, llm, temperature, outputs)
            result.tau = llm.stats()["tau"]

    def _together(self, result: CaseResult, draft: Any | None) -> None:
        with self._engine(draft, max_running=_EIGHT, prefix_cache=False) as llm:
            for _ in range(self._rounds):
                for temperature in self._temperatures:
                    self._compare(result, llm, temperature, self._generate(llm, temperature))
            result.tau = llm.stats()["tau"]

    def _chunks(self, result: CaseResult, draft: Any) -> None:
        with self._engine(draft, max_running=_EIGHT, prefix_cache=False, max_batch_tokens=24) as llm:
            for temperature in self._temperatures:
                self._compare(result, llm, temperature, self._generate(llm, temperature))
            result.tau = llm.stats()["tau"]

    def _hits(self, result: CaseResult, draft: Any, **sizes: Any) -> None:
        with self._engine(draft, max_running=_EIGHT, page_size=4, **sizes) as llm:
            if isinstance(draft, Scripted):
                draft.texts = self._known(self._temperatures[0], self._max_tokens, self._prompts)
            for turn in range(3):
                outputs = self._generate(llm, self._temperatures[0])
                self._compare(result, llm, self._temperatures[0], outputs)
                found = sum(output.metrics["cached_prompt_tokens"] for output in outputs)
                if turn and not found:
                    result.problems.append("no prompt was found in the cache, so no prefix hit was tried")
            result.tau = llm.stats()["tau"]

    def _mixed(self, result: CaseResult, draft: Any) -> None:
        with self._engine(draft, max_running=_EIGHT) as llm:
            for turn in range(self._rounds):
                temperature = self._temperatures[turn % len(self._temperatures)]
                leaving = llm.stream(self._prompts, self._all_params(temperature))
                plain = llm.stream(self._prompts, self._all_params(temperature), draft=False)
                next(leaving)
                outputs = self._generate(llm, temperature)
                leaving.close()
                self._compare(result, llm, temperature, outputs)
                ended = {event.index: event.output for event in plain if event.output is not None}
                self._compare(result, llm, temperature, [ended[i] for i in range(len(self._prompts))])
            result.tau = llm.stats()["tau"]

    def _scripted(self, result: CaseResult, wrong: Wrong) -> None:
        for temperature in self._temperatures:
            draft = Scripted(self._vocab, self._block, wrong)
            draft.texts = self._known(temperature, self._max_tokens, self._prompts)
            with self._engine(draft, max_running=_EIGHT, prefix_cache=False) as llm:
                outputs = self._generate(llm, temperature)
                self._compare(result, llm, temperature, outputs)
                result.tau = llm.stats()["tau"]
        if result.different:
            return
        # Texts that share an anchor and its place are drafted alike, and the last block of a text is shorter.
        half = 1 + max(1, (self._block - 1) // 2)
        bounds: dict[Wrong, tuple[float, float]] = {
            none_wrong: (0.6 * self._block, self._block),
            rest_wrong: (0.6 * half, half),
            first_wrong: (1.0, 1.0),
            some_wrong: (1.2, self._block),
        }
        expected, most = bounds[wrong]
        if self._max_tokens > 2 * self._block and not expected <= result.tau <= most:
            result.problems.append(
                f"{result.tau:.2f} tokens per pass, expected {expected:.2f} to {most:.2f}: the drafts were not what the case is about"
            )

    def _all_rejected(self, result: CaseResult) -> None:
        draft = Scripted(self._vocab, self._block, all_wrong)
        draft.texts = self._known(0.0, self._rejected, self._short)
        with self._engine(draft, max_running=_EIGHT, prefix_cache=False) as llm:
            output = llm.generate(self._short, self._params(0, 0.0, self._rejected))
            self._compare(result, llm, 0.0, output, self._rejected, self._short)
            result.tau = llm.stats()["tau"]
        if not result.different and result.tau != 1:
            result.problems.append(f"{result.tau:.2f} tokens per pass, expected 1: not everything was rejected")

    def _scripted_hits(self, result: CaseResult) -> None:
        self._hits(result, Scripted(self._vocab, self._block, some_wrong), max_batch_tokens=24)

    # ---- texts ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _params(i: int, temperature: float, most: int) -> SamplingParams:
        seed = None if temperature == 0 else 1000 + i
        return SamplingParams(temperature=temperature, seed=seed, max_tokens=most, ignore_eos=True)

    def _all_params(self, temperature: float) -> list[SamplingParams]:
        return [self._params(i, temperature, self._max_tokens) for i in range(len(self._prompts))]

    def _generate(self, llm: Any, temperature: float) -> list[Any]:
        return llm.generate(self._prompts, self._all_params(temperature))

    def _texts(self, llm: Any, temperature: float, most: int, prompts: Sequence[list[int]]) -> None:
        outputs = [
            llm.generate([prompt], self._params(i, temperature, most), draft=False)[0]
            for i, prompt in enumerate(prompts)
        ]
        self._plain[temperature, most] = [list(output.token_ids) for output in outputs]

    def _known(self, temperature: float, most: int, prompts: Sequence[list[int]]) -> list[list[int]]:
        return [prompt + text for prompt, text in zip(prompts, self._plain[temperature, most], strict=True)]

    def _compare(
        self,
        result: CaseResult,
        llm: Any,
        temperature: float,
        outputs: Sequence[Any],
        most: int | None = None,
        prompts: Sequence[list[int]] | None = None,
    ) -> None:
        plain = self._plain[temperature, self._max_tokens if most is None else most]
        for i, (output, text) in enumerate(zip(outputs, plain, strict=True)):
            result.texts += 1
            if output.error is not None:
                result.problems.append(f"prompt {i + 1} failed: {output.error}")
                continue
            other = list(output.token_ids)
            if other == text:
                continue
            at = next((j for j, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
            left, right = (tokens[at] if at < len(tokens) else None for tokens in (text, other))
            lead = None
            prompt = (self._prompts if prompts is None else prompts)[i]
            if left is not None and right is not None:
                lead = self._lead(llm, prompt + text[:at], left, right, i, temperature)
            explained = lead is not None and self._tolerance is not None and abs(lead) <= self._tolerance
            # Once in a case: it takes some tens of passes.
            known = None
            if not explained and not any(one.layer is not None for one in result.different):
                known = first_layer(llm, prompt + text[:at], self._block)
            layer = None if known is None else known[0]
            result.different.append(Different(result.name, i, temperature, at, left, right, lead, explained, layer))

    def _lead(self, llm: Any, ids: list[int], left: int, right: int, i: int, temperature: float) -> float:
        """How far ahead the plain token was, in logits; of a draw, in logits and what was drawn for the two."""
        logits = np.asarray(llm.next_token_logits(ids), dtype=np.float64)
        lead = float(logits[left] - logits[right])
        if temperature > 0:
            from ..verify import gumbel

            drawn = gumbel(1000 + i, len(ids), self._vocab)
            lead += temperature * float(drawn[left] - drawn[right])
        return lead

"""What may be drawn, of requests that say so: allowed tokens, bad words, processors of logits, grammars.

    target's rows ──> of constrained requests alone: edited, each by its own path ──> the core draws, and scores by what they were

The path of a row is the output so far and the drafts before it, along the branch of a tree; so a row is edited as plain decoding would edit it,
and the text is the same with and without drafts. Rows behind a draft that may not be drawn are left out: no walk reaches them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arguments import bad, shown
from ..errors import InvalidArgument
from ..sampling import SamplingParams
from ..structured import Grammar, Grammars, NoToken

# What a `SamplingParams` constrains with.
OPTIONS = ("allowed_token_ids", "bad_words", "logits_processors", "structured_outputs")


class Edited(NamedTuple):
    """Rows as `_core.Engine.accept` takes them: which of the plan's logits int64 [E], rising; raw and edited, float32 [E, vocab_size]; why a row
    has no token."""

    rows: np.ndarray
    raw: np.ndarray
    logits: np.ndarray
    reasons: list[str | None]


class Constraints:
    """Makes the constraints of an engine's requests."""

    def __init__(self, tokenizer: Any, token_bytes: Sequence[bytes] | None, vocab_size: int, eos: Sequence[int]):
        self._tokenizer, self._vocab, self._eos = tokenizer, vocab_size, tuple(eos)
        self._grammars = None if token_bytes is None else Grammars(token_bytes, self._encode)

    def make(self, params: SamplingParams) -> Constraint | None:
        """What these parameters constrain; None for nothing. Raises InvalidArgument naming the option, MissingPackage."""
        if all(getattr(params, option) in (None, ()) for option in OPTIONS):
            return None
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        allowed = None
        if params.allowed_token_ids is not None:
            allowed = np.zeros(self._vocab, dtype=bool)
            allowed[list(params.allowed_token_ids)] = True
        grammar = None
        if params.structured_outputs is not None:
            if self._grammars is None:
                raise InvalidArgument(
                    "structured_outputs: got some, expected none: this tokenizer's tokens have no bytes of their own"
                )
            if not ends:
                raise InvalidArgument(
                    "structured_outputs: got some and no token that may end a text, expected ignore_eos=False with a target that has an "
                    "end-of-text token, or stop_token_ids"
                )
            grammar = self._grammars.begin(params.structured_outputs, ends)
        words = [spelling for i, word in enumerate(params.bad_words) for spelling in self._spellings(i, word)]
        return Constraint(params, self._vocab, ends, allowed, words, grammar)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidArgument("bad_words: got some, expected none: this engine has no tokenizer to spell them")
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _spellings(self, place: int, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word, alone and behind a space."""
        found: list[tuple[int, ...]] = []
        for text in (word, " " + word.lstrip()):
            ids = tuple(self._encode(text))
            if not ids or max(ids) >= self._vocab:
                raise bad(f"bad_words[{place}]", word, "a word that this tokenizer has tokens for")
            if ids not in found:
                found.append(ids)
        return found


class Constraint:
    """What one request may draw, and where its text stands."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        ends: set[int],
        allowed: np.ndarray | None,
        bad_words: list[tuple[int, ...]],
        grammar: Grammar | None,
    ):
        self._vocab, self._ends, self._min_tokens = vocab_size, ends, params.min_tokens
        self._allowed, self._bad, self._grammar = allowed, bad_words, grammar
        self._processors = [(process, _takes_prompt(process)) for process in params.logits_processors]
        self._names = [option for option in OPTIONS if getattr(params, option) not in (None, ())]
        self._prompt: list[int] = []
        self._record: Any = None
        self._output: list[int] = []
        # Whether the grammar stands at the end of the output; an interruption may have left it elsewhere.
        self._stands = True

    def begin(self, prompt: list[int], record: Any) -> None:
        """For the request of this prompt, whose output is in this record of the core."""
        self._prompt, self._record = prompt, record

    def edit(self, raw: np.ndarray, tokens: list[int], parents: list[int]) -> list[tuple[int, np.ndarray, str | None]]:
        """Edits the rows that a walk may reach: (which, what may be drawn from it, why it has no token).

        `raw` float32 [n, vocab_size]: the logits after the request's last token and after each draft; `tokens` and `parents` [n] say which draft
        that is and behind which row it comes. Entry 0 is the last token itself.
        """
        children: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents[1:], 1):
            children[parent].append(node)
        edited: list[tuple[int, np.ndarray, str | None]] = []

        def visit(node: int, output: list[int]) -> None:
            try:
                row = self._row(raw[node], output)
            except NoToken as no:
                edited.append((node, raw[node], str(no)))
                return
            edited.append((node, row, None))
            for child in children[node]:
                token = tokens[child]
                # Behind a token that ends the text nobody listens.
                if np.isneginf(row[token]) or token in self._ends:
                    continue
                if self._grammar is None:
                    visit(child, [*output, token])
                    continue
                try:
                    self._grammar.push(token)
                except NoToken as no:
                    edited.append((child, raw[child], str(no)))
                    continue
                visit(child, [*output, token])
                self._grammar.pop()

        try:
            self._catch_up()
        except NoToken as no:
            return [(0, raw[0], str(no))]
        self._stands = False
        visit(0, self._output)
        self._stands = True
        return sorted(edited, key=lambda one: one[0])

    def _catch_up(self) -> None:
        """Takes in what was committed since."""
        output = self._record.tokens()
        known, self._output = len(self._output), output
        if self._grammar is None:
            return
        if not self._stands:
            self._grammar.reset()
            known = 0
        self._stands = False
        for token in output[known:]:
            self._grammar.push(token)
        self._stands = True

    def _row(self, raw: np.ndarray, output: list[int]) -> np.ndarray:
        row = raw.copy()
        # What the model itself has got wrong is not for a processor to answer for.
        sound = not self._processors or _unsound(raw) is None
        for place, (process, takes_prompt) in enumerate(self._processors):
            row = self._processed(place, process, takes_prompt, row, output)
            if sound and (token := _unsound(row)) is not None:
                raise NoToken(
                    f"logits_processors[{place}]: returned {row[token]} for token id {token}, expected a number, or -inf for what may not come"
                )
        if self._allowed is not None:
            row[~self._allowed] = -np.inf
        for word in self._bad:
            before = len(word) - 1
            if len(output) >= before and tuple(output[len(output) - before :]) == word[:-1]:
                row[word[-1]] = -np.inf
        if self._grammar is not None:
            row[~self._grammar.allowed(len(output) >= self._min_tokens)] = -np.inf
        if np.isneginf(row).all():
            raise NoToken(f"{', '.join(self._names)}: got no token that may come next, expected at least one")
        return row

    def _processed(
        self, place: int, process: Callable[..., Any], takes_prompt: bool, row: np.ndarray, output: list[int]
    ) -> np.ndarray:
        import torch

        name, given = f"logits_processors[{place}]", torch.from_numpy(row)
        try:
            made = process(list(self._prompt), list(output), given) if takes_prompt else process(list(output), given)
        except Exception as error:  # callers' code raises what it likes
            said = str(error).strip().partition("\n")[0]
            raise NoToken(f"{name}: raised {type(error).__name__}: {shown(said)}") from error
        if isinstance(made, torch.Tensor):
            made = made.detach().float().cpu().numpy()
        if not isinstance(made, np.ndarray) or made.shape != (self._vocab,) or made.dtype.kind != "f":
            raise NoToken(f"{name}: returned {shown(made)}, expected a row of {self._vocab} logits")
        with np.errstate(over="ignore"):  # a number too large is told as what it becomes
            return np.array(made, dtype=np.float32)


def _unsound(row: np.ndarray) -> int | None:
    """The first token whose logit is neither a number nor -inf."""
    wrong = np.isnan(row) | np.isposinf(row)
    return int(wrong.argmax()) if wrong.any() else None


_IN_ORDER = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _takes_prompt(process: Callable[..., Any]) -> bool:
    """Whether a processor takes the prompt's tokens before the output's: it has three parameters that have to be given."""
    try:
        parameters = inspect.signature(process).parameters.values()
        return sum(one.default is one.empty and one.kind in _IN_ORDER for one in parameters) == 3
    except (TypeError, ValueError):  # not every built-in has a signature
        return False


def edit(plan: Any, constrained: Mapping[int, Constraint], fetch: Callable[[np.ndarray], np.ndarray]) -> Edited | None:
    """The edited rows of a step whose drafts are set; None where it has none. `fetch` gives rows of its logits, float32 [n, vocab_size], by their
    numbers int64 [n]."""
    if not constrained:
        return None
    starts = plan.logit_starts.tolist()
    its = [
        (row, constrained[request])
        for row, request in enumerate(plan.request_ids.tolist())
        if request in constrained and starts[row + 1] > starts[row]
    ]
    if not its:
        return None
    raw = fetch(np.concatenate([np.arange(starts[row], starts[row + 1]) for row, _ in its]))
    rows: list[int] = []
    kept: list[int] = []
    logits: list[np.ndarray] = []
    reasons: list[str | None] = []
    at = 0
    for row, constraint in its:
        count = starts[row + 1] - starts[row]
        first, prompt = int(plan.query_starts[row]), bool(plan.is_prefill[row])
        tokens = [-1] if prompt else plan.token_ids[first : first + count].tolist()
        chain = prompt or not plan.parents.size
        parents = list(range(-1, count - 1)) if chain else plan.parents[first : first + count].tolist()
        for node, edited, why in constraint.edit(raw[at : at + count], tokens, parents):
            rows.append(starts[row] + node)
            kept.append(at + node)
            logits.append(edited)
            reasons.append(why)
        at += count
    return Edited(np.array(rows, dtype=np.int64), np.ascontiguousarray(raw[kept]), np.stack(logits), reasons)

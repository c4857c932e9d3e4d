"""The embedded engine's public face: options in, outputs out. What a step is stands in `dflash_rs.engine`."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import elsewhere
from .arguments import bad, flag, integer, one_name, thread_count
from .asynchronous import AsyncCalls, Driver
from .chat import Chats
from .config import EngineConfig, StepCosts
from .errors import DflashError, InvalidArgument
from .options import (
    Asked,
    StepOptions,
    Terms,
    asked,
    encodable,
    import_torch,
    known_tokens,
    pick_device,
    pick_dtype,
    pick_models,
    pick_precision,
)
from .outputs import Output, Prompt, RequestId, StreamEvent, TokenLogprob, prompt_scores
from .sampling import SamplingParams
from .streams import Stream
from .text import Detokenizer
from .turns import Turns

if TYPE_CHECKING:
    import torch

    from .engine.requests import Active

Params = SamplingParams | Mapping[str, Any] | None
# Numbers of the logits that a prompt is scored by at a time.
_MOST_LOGITS = 1 << 25


@elsewhere.explained(elsewhere.ENGINE)
class LLM(Chats, AsyncCalls):
    """A target, optionally with a DFlash drafter, behind continuous batching and a paged KV cache.

    - `model`: folder or hub name of a Hugging Face causal LM, a GGUF file of a Llama- or Qwen-shaped one (converted once, see
      `dflash_rs.models.gguf`), or the name of a known model that was fetched (``dflash-rs models list``); None, or "bundled", is the bundled pair,
      "bundled-hybrid" the one whose target has recurrent layers and experts. `draft`: folder or hub name of a DFlash checkpoint; None decodes
      plainly; "auto" is the drafter that comes with this package, and only goes with bundled models and known ones; "lookup" drafts what the text said before, with any model (a folder of that name is
      ``Path("lookup")`` or "./lookup").
    - `device`: "cpu", "cuda", "cuda:1" and so on, a torch.device of these, or "auto". `dtype`: "float32", "bfloat16", "float16", torch's own of
      these, or "auto" (float32 on a CPU, bfloat16 on a GPU). float32 makes rounding differences between block sizes as rare as they can be.
    - `matmul_precision`: "highest"; "medium", which multiplies bfloat16 values and adds up in float32 (what torch calls medium, too; for
      float32 on a CPU); or "auto", medium where the processor has an instruction for it. Medium costs some digits of the
      logits, as bfloat16 checkpoints do anywhere; with and without a drafter they are the same digits.
    - `block_size`: tokens of a block, anchor included; None is the drafter's own.
    - `threads`: torch's CPU threads for the whole process; None leaves them.
    - `adaptive`: draft and verify as many tokens as pay, judged by what a pass and a row of it cost here (measured when the
      models are loaded, see `costs`), by what was accepted so far, and by the drafter's own confidence. False drafts and
      verifies whole blocks. `costs`: the costs to judge by instead, a `StepCosts`. The text is the same in every case.
    - `tree_nodes`: drafts of a tree at most: where the drafter is unsure, several tokens are drafted for one place, and the target
      picks the path. 0 drafts chains of one token per place. Trees may be longer than a block; they pay where a row more costs little.
    - `cuda_graphs`: on a GPU, capture decoding steps in CUDA graphs. False launches every kernel anew, for looking for faults.
    - `capture_ahead`: capture up to so many of these graphs while loading, the likeliest shapes of steps first, instead of in the steps that
      first have them; at most as many as are kept, 256. ``stats()["captured_ahead"]`` says how many it were, the seconds, and the bytes of the
      device that they took. Refused where steps do not stay on a GPU.
    - `overlap`: launch the next step before the results of the last one are read, so that the device does not wait for the host. None is
      True where steps stay on a GPU. On a CPU, where nothing runs beside the host, it is for tests.
    - `lookup`: beside the drafter, look drafts up in each request's own text, as ``draft="lookup"`` does, and take whichever promises more; where
      the text promises more already, the drafter is not asked. None is True where that can be: for chains, on a CPU.
    - the rest: see `dflash_rs.config.EngineConfig`.

    Text is the same with and without a drafter, for every sampling option, up to rounding of the logits. An LLM may be used
    from several threads; the steps are taken one at a time. A signal handler may call `abort` and `close`, which then take effect at
    the end of the step it came into; a call that would take a step itself raises DflashError there, and so does every call in a forked
    child.

    Raises InvalidArgument for a bad option, CheckpointError for a checkpoint that is damaged or does not fit its target,
    MissingPackage without torch and transformers.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        draft: str | Path | None = "auto",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        matmul_precision: str = "highest",
        block_size: int | None = None,
        threads: int | None = None,
        page_size: int = 16,
        num_pages: int = 0,
        max_running: int = 32,
        max_context: int = 0,
        max_batch_tokens: int = 1024,
        prefix_cache: bool = True,
        adaptive: bool = True,
        costs: StepCosts | None = None,
        tree_nodes: int = 0,
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        lookup: bool | None = None,
        capture_ahead: int = 0,
    ):
        runtime = import_torch()

        from .engine.build import Models

        self.config = EngineConfig(page_size, num_pages, max_running, max_context, max_batch_tokens, prefix_cache)
        model, draft = pick_models(model, draft)
        options = StepOptions(
            block_size, adaptive, costs, tree_nodes, cuda_graphs, overlap, lookup, capture_ahead
        ).check()
        if threads is not None:
            runtime.set_num_threads(thread_count("threads", threads))
        self.device = pick_device(runtime, device)
        self.dtype = pick_dtype(runtime, dtype, self.device)
        self.model_dir, self.draft_dir = str(model), None if draft is None else str(draft)

        self.matmul_precision = pick_precision(matmul_precision, self.device, self.dtype)
        models = Models.load(model, draft, device=self.device, dtype=self.dtype, precision=self.matmul_precision)
        self._begin(models, options)

    @classmethod
    def from_parts(
        cls,
        target: Any,
        draft: Any = None,
        *,
        tokenizer: Any,
        token_bytes: list[bytes] | None,
        block_size: int | None = None,
        adaptive: bool = True,
        costs: StepCosts | None = None,
        tree_nodes: int = 0,
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        lookup: bool | None = None,
        capture_ahead: int = 0,
        **sizes: Any,
    ) -> LLM:
        """An engine of models that are made already: a `models.target.Target`, a `models.drafter.Drafter` or None, the tokenizer and the bytes
        of every token (None where they have none of their own). `sizes` are those of `EngineConfig`, the rest is as for `LLM`."""
        from .engine.build import Models

        import_torch()
        options = StepOptions(
            block_size, adaptive, costs, tree_nodes, cuda_graphs, overlap, lookup, capture_ahead
        ).check()
        llm = cls.__new__(cls)
        llm.config = EngineConfig(**sizes)
        llm.device, llm.dtype = target.device, target.dtype
        llm.model_dir, llm.draft_dir = type(target).__name__, None if draft is None else type(draft).__name__
        llm.matmul_precision = getattr(target, "matmul_precision", "highest")
        llm._begin(Models(target, draft, tokenizer, token_bytes), options)
        return llm

    def _begin(self, models: Any, options: StepOptions) -> None:
        from .engine.build import Sizes, build
        from .engine.constraints import Constraints

        sizes = Sizes.choose(models, self.config, options)
        self.block_size, self.tree_nodes, self.max_context = sizes.block_size, sizes.tree_nodes, sizes.max_context
        self._target, self._draft = models.target, models.draft
        self.draft_kind = None if models.draft is None else models.draft.kind
        self.lookup = sizes.look_up > 0
        self.tokenizer, self._bytes = models.tokenizer, models.bytes
        self.vocab_size, self.eos_token_ids = self._target.vocab_size, list(self._target.eos_token_ids)
        self._loop = build(models, self.config, sizes, options)
        self._requests = self._loop.requests
        self._constraints = Constraints(self.tokenizer, self._bytes, self.vocab_size, self.eos_token_ids)
        self.costs = self._loop.policy.costs
        self._closed = self._freed = False
        self._turns = Turns()
        self._driver = Driver()
        _MADE.add(self)
        # Requests to abort when whoever has the turn gives it up.
        self._leaving: deque[RequestId | None] = deque()

    # ---- requests ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as `generate` would make them."""
        return self._encode("text", text)

    def _encode(self, name: str, text: str) -> list[int]:
        if not isinstance(text, str) or not encodable(text):
            raise bad(name, text, "a string without lone surrogates")
        return list(self.tokenizer(text).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are not shown."""
        return Detokenizer(self.tokenizer, self._bytes).push(known_tokens("ids", ids, self.vocab_size), None, True)

    @elsewhere.explained(elsewhere.CALLS)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] = None,
        *,
        sampling_params: Params | Sequence[Params] = None,
        draft: bool = True,
        on_error: str = "raise",
        request_ids: str | Sequence[str] | None = None,
        use_tqdm: bool = False,
    ) -> list[Output]:
        """Completes prompts (strings, lists of token ids, or mappings with "prompt" or "prompt_token_ids") and returns one `Output` each, in
        order; where `SamplingParams.n` asks for more, the first answer, whose `outputs` are all of them.

        `params`, or by its other name `sampling_params`: one for all or one each, `SamplingParams` or mappings with their names.
        `draft=False` decodes plainly on the same engine: the same text, slower (`SamplingParams.max_drafts` says so for one request).
        `request_ids`: what the requests are called in outputs and by `abort`, a string for each; None numbers them. `use_tqdm`: a line of
        progress on standard error.

        A prompt that cannot be taken, or whose parameters cannot be honoured, is an InvalidArgument (or OutOfPages) that names it,
        ``prompts[2]: ...`` or ``params[2].logit_bias: ...``, before any runs. With ``on_error="return"`` the others run, and at its place
        comes an `Output` without tokens, with ``finish_reason="error"`` and that message as its `error`; what is wrong with the call
        as a whole raises all the same. A request that fails later always comes back with ``finish_reason="error"``.
        """
        bar: Any = None
        if flag("use_tqdm", use_tqdm):
            from .cli.display import Progress as bar
        with self.stream(
            prompts,
            params,
            sampling_params=sampling_params,
            draft=draft,
            on_error=on_error,
            request_ids=request_ids,
        ) as events:
            outputs = events._outputs(bar and bar(len(events._waiting), sys.stderr))
        return [outputs[i] for i in range(len(outputs))]

    @elsewhere.explained(elsewhere.CALLS)
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] = None,
        *,
        sampling_params: Params | Sequence[Params] = None,
        draft: bool = True,
        on_error: str = "raise",
        request_ids: str | Sequence[str] | None = None,
    ) -> Stream:
        """Like `generate`, but an iterator of tokens as they are committed. Closing or dropping it aborts what is unfinished:
        ``with llm.stream(...) as events:``. With ``on_error="return"`` refused prompts are the first events."""
        from .engine.requests import refused

        flag("draft", draft)
        if not isinstance(on_error, str) or on_error not in ("raise", "return"):
            raise bad("on_error", on_error, "'raise' or 'return'")
        self._check_open()
        stream = Stream(self)
        taken: list[tuple[Asked, list[int]]] = []
        terms = Terms(self._encode, self.vocab_size, self.max_context, self._bytes is not None, self._constraints)
        for one in asked(prompts, one_name("params", params, sampling_params), request_ids):
            try:
                taken.append((one, one.check(terms)))
            except InvalidArgument as error:
                if on_error == "raise":
                    raise
                stream._events.append(refused(one, str(error)))
        drafts, strict = draft and self._draft is not None, on_error == "raise"
        self._turns.take(lambda: self._submit(stream, taken, drafts, strict), self._settle)
        return stream

    def abort(self, request_id: RequestId | None) -> bool:
        """Ends a request wherever it is, all answers of one that its caller named; its pages return. False when it is unknown or already
        finished."""
        if request_id is not None and not isinstance(request_id, str):
            request_id = integer("request_id", request_id, 0, expected="the request_id of an event or output")
        if self._turns.mine():
            self._leaving.append(request_id)
            return bool(self._requests.runs(request_id))
        return self._turns.take(lambda: self._requests.abort(request_id), self._settle)

    def _drop(self, requests: list[int]) -> None:
        """Aborts requests, at once or when the running step ends; waits for nothing."""
        if requests:
            self._leaving.extend(requests)
            self._turns.soon(self._settle)

    def _settle(self) -> None:
        """Does what was asked for while somebody had the turn."""
        while self._leaving:
            self._requests.abort(self._leaving[0])
            self._leaving.popleft()
        if self._closed and not self._freed:
            # Once: by the time its last stream is dropped, its models may be those of another engine.
            self._freed = True
            for request in list(self._requests.active):
                self._requests.abort(request)
            self._loop.drop()
            self._target.free()
            if self._target.state is not None:
                self._target.state.free()
            if self._draft is not None:
                self._draft.free()

    def _check_open(self) -> None:
        if self._closed:
            raise DflashError("this LLM is closed: make a new one")

    def _submit(self, stream: Stream, taken: list[tuple[Asked, list[int]]], drafts: bool, strict: bool) -> None:
        """Hands over what can run. All or nothing if `strict`, else what the core refuses becomes an event of the stream."""
        self._check_open()
        running = next((one for one, _ in taken if one.request_id in self._requests.named), None)
        if running is not None:
            raise bad("request_ids", running.request_id, "one that no unfinished request has")
        for one, tokens in taken:
            most = one.params.prompt_logprobs
            if most is not None and len(tokens) < self.max_context:
                one.prompt_logprobs = self._scores(tokens, most)
        refuse: Callable[[StreamEvent], None] | None = None if strict else stream._events.append
        stream._waiting.update(self._requests.submit(taken, drafts, refuse, stream._ended))

    def _ready(self, waiting: dict[int, Active]) -> list[StreamEvent]:
        """What is new for these requests, after a step if nothing is. Finished requests leave `waiting`."""
        return self._turns.take(lambda: self._next(waiting), self._settle)

    def _next(self, waiting: dict[int, Active]) -> list[StreamEvent]:
        from .engine.requests import read

        events = read(waiting)
        if not events:
            self._loop.step()
            events = read(waiting)
        return events

    def _ready_for(self, waiting: list[dict[int, Active]]) -> list[list[StreamEvent]]:
        """What is new for each of these groups of requests, after a step if nothing is for any."""
        from .engine.requests import read

        def work() -> list[list[StreamEvent]]:
            news = [read(its) for its in waiting]
            if any(waiting) and not any(news):
                self._loop.step()
                news = [read(its) for its in waiting]
            return news

        return self._turns.take(work, self._settle)

    def _advance(self, ended: deque[Active]) -> None:
        """Takes a step, unless there is somebody who has ended."""
        self._turns.take(lambda: None if ended else self._loop.step(), self._settle)

    def _scores(self, tokens: list[int], most: int) -> list[TokenLogprob | None]:
        """How likely each token is after those before it, and the `most` likeliest ones in its place; None for the first."""
        chunk = max(1, min(self.config.max_batch_tokens, _MOST_LOGITS // self.vocab_size))
        scores: list[TokenLogprob | None] = [None]
        with self._target.scratch(len(tokens)):
            for first in range(0, len(tokens) - 1, chunk):
                part = tokens[first : min(first + chunk, len(tokens) - 1)]
                scores += prompt_scores(self._forward(part, first, len(tokens)), tokens[first + 1 :], most)
        return scores

    def _forward(self, tokens: list[int], first: int, room: int, last: bool = False) -> np.ndarray:
        """Float32 logits ``[n, vocab_size]`` after each of `tokens`, or after the `last` alone. They stand at positions from `first` on of a text
        that has `room` slots of scratch memory."""
        from .models.batch import StepBatch

        n = len(tokens)
        batch = StepBatch.from_arrays(
            token_ids=np.asarray(tokens, dtype=np.int64),
            positions=np.arange(first, first + n),
            slots=np.arange(first, first + n),
            query_starts=np.array([0, n]),
            context_lens=np.array([first]),
            page_table=np.zeros((1, 1), dtype=np.int32),
            row_ids=np.array([0]),
            logit_rows=np.arange(n)[-1:] if last else np.arange(n),
            page_size=room,
            device=self.device,
        )
        logits = self._target.forward(batch)[0].float().cpu().numpy()
        if (state := self._target.state) is not None:
            state.keep(np.zeros(1, dtype=np.int32), np.array([n], dtype=np.int32))
        return logits

    # ---- looking inside ------------------------------------------------------------------------------------------

    def next_token_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 logits ``[vocab_size]`` after `ids`, by one forward over all of them, without the running requests' cache."""
        self._check_open()
        tokens = known_tokens("ids", ids, self.vocab_size)
        n = len(tokens)
        if not 1 <= n <= self.max_context:
            raise InvalidArgument(f"ids: got {n} tokens, expected 1..{self.max_context}, this engine's max_context")

        def run() -> np.ndarray:
            self._check_open()
            with self._target.scratch(n):
                return self._forward(tokens, 0, n, last=True)[0]

        return self._turns.take(run, self._settle)

    def stats(self) -> dict[str, Any]:
        """Counters since the start: steps, steps_ahead (of those launched before the last one's results were read), seconds per stage, CUDA graphs captured, pages and requests, the bytes of states beside the pages of a target that has such, and acceptance over all requests.

        On a GPU "verify" holds drafting and injection as well: they are one stretch of device time.
        """

        def look() -> dict[str, Any]:
            loop = self._loop
            return {
                "steps": loop.steps,
                "steps_ahead": loop.steps_ahead,
                "stage_seconds": dict(loop.times.total),
                "cuda_graphs": loop.backend.num_graphs,
                **({"captured_ahead": loop.captured_ahead} if loop.captured_ahead else {}),
                **loop.core.counts(),
                **({"state_bytes": loop.state_bytes} if loop.state_bytes else {}),
                **loop.core.stats(),
            }

        return look() if self._turns.mine() else self._turns.take(look, self._settle)

    def close(self) -> None:
        """Aborts what is unfinished and frees the KV cache. Calls that would run the models raise DflashError afterwards; the tokenizer's and
        `stats` still answer, `abort` finds nothing; closing it again does nothing.

        From a signal handler it takes effect when the step it came into has ended; in a forked child it does nothing.
        """
        self._closed = True
        if not self._turns.forked() and not self._turns.mine():
            self._turns.take(lambda: None, self._settle)

    def __enter__(self) -> LLM:  # noqa: PYI034 (typing.Self needs Python 3.11)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_MADE: weakref.WeakSet[LLM] = weakref.WeakSet()
# A step takes far less, unless something hangs; then so does the process for that long, and no longer.
_PATIENCE_AT_EXIT_S = 30.0


@atexit.register
def _end() -> None:
    for llm in list(_MADE):
        llm._turns.end(_PATIENCE_AT_EXIT_S)

"""What is measured beside each other: engines of ours and loops of others, all run by the same call on the same tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dflash_rs.bench import runner
from dflash_rs.bench.generate import GenerateLoop
from dflash_rs.bench.reference import INSTALL, ReferenceLoop
from dflash_rs.bench.runner import REFERENCE, TRANSFORMERS, TRANSFORMERS_LOOKUP, sampling_params, timed
from dflash_rs.bench.workloads import Prompt, Setting
from dflash_rs.errors import DflashError, InvalidArgument


@dataclass(frozen=True)
class Task:
    """A prompt as tokens, and its place among all of them."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Work:
    """What one timed run is: these tasks, so many at once."""

    tasks: list[Task]
    params: list[Any]
    setting: Setting
    concurrency: int
    max_tokens: int
    stop_ids: list[int]


@dataclass
class Done:
    """A timed run: seconds, output tokens by task, target passes without those over prompts, and what an engine of ours tells besides."""

    seconds: float
    token_ids: list[list[int]]
    steps: int
    outputs: list[Any] | None = None
    passes: int = 0
    drafted: int = 0

    @property
    def tokens(self) -> int:
        """Output tokens of all tasks."""
        return sum(map(len, self.token_ids))


@dataclass
class Own:
    """An engine of ours, with or without its drafter."""

    name: str
    llm: Any
    drafts: bool = True
    draft: str | None = None
    tree_nodes: int | None = None
    # Its draws are those of plain decoding.
    comparable = True

    def run(self, work: Work) -> Done:
        """Runs once."""
        before = self.llm.stats()
        one = timed(self.llm, [task.ids for task in work.tasks], work.params, draft=self.drafts)
        after = self.llm.stats()
        gained = {name: after.get(name, 0) - before.get(name, 0) for name in ("passes", "drafted")}
        ids = [list(output.token_ids) for output in one.outputs]
        return Done(one.seconds, ids, sum(o.metrics["steps"] for o in one.outputs), one.outputs, **gained)


@dataclass
class Generate:
    """transformers' `generate`, in batches, or with its prompt look-up."""

    name: str
    loop: GenerateLoop
    comparable = False

    @property
    def looks_up(self) -> bool:
        """Whether it drafts."""
        return self.name == TRANSFORMERS_LOOKUP

    def refuses(self, concurrency: int) -> str | None:
        """Why it does not run like this; None where it does."""
        return "its prompt look-up takes one request at a time" if self.looks_up and concurrency > 1 else None

    def run(self, work: Work) -> Done:
        """Runs once."""
        found: list[list[int]] = []
        passes = 0
        begun = runner.time.perf_counter()
        for first in range(0, len(work.tasks), work.concurrency):
            batch = [task.ids for task in work.tasks[first : first + work.concurrency]]
            options = (work.max_tokens, work.stop_ids, work.setting.temperature, work.params[first].seed)
            texts, taken = self.loop.generate(batch, *options, look_up=self.looks_up)
            found += texts
            passes += taken - 1
        seconds = runner.time.perf_counter() - begun
        # In a batch every request has its own token of every pass until it ends.
        decoded = sum(max(len(ids) - 1, 0) for ids in found)
        return Done(seconds, found, passes if self.looks_up else decoded)


@dataclass
class Reference:
    """The z-lab loop."""

    name: str
    loop: ReferenceLoop
    comparable = False

    def refuses(self, concurrency: int) -> str | None:
        """Why it does not run like this; None where it does."""
        return "its loop takes one request at a time" if concurrency > 1 else None

    def run(self, work: Work) -> Done:
        """Runs once."""
        begun = runner.time.perf_counter()
        each = [
            self.loop.generate(task.ids, work.max_tokens, work.stop_ids, work.setting.temperature, params.seed)
            for task, params in zip(work.tasks, work.params)
        ]
        seconds = runner.time.perf_counter() - begun
        return Done(seconds, [ids for ids, _ in each], sum(steps for _, steps in each))


Foreign = Generate | Reference
Arm = Own | Foreign


def conversations(llm: Any, prompts: Sequence[Prompt], max_tokens: int) -> tuple[list[Task], list[int]]:
    """All turns of all prompts as tokens, and the tokens that end an answer beside the target's own.

    Raises InvalidArgument that names the prompt that is too long for the engine.
    """
    from dflash_rs.chat import Template

    template = None
    if getattr(getattr(llm, "tokenizer", None), "chat_template", None):
        template = Template.choose(
            llm.tokenizer,
            llm.model_dir,
            add_generation_prompt=True,
            continue_final_message=False,
            tools=None,
            chat_template=None,
            chat_template_kwargs=None,
        )
    end = None if template is None else template.turn_end()
    ends = [] if end is None or end in llm.eos_token_ids else [end]
    found: list[list[Task]] = [[] for _ in prompts]
    said: list[list[str]] = [[] for _ in prompts]
    most = getattr(llm, "max_context", None)
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        going = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in going:
            prompt = prompts[i]
            said[i].append(prompt.turns[turn])
            if template is None:
                ids = list(llm.encode("\n\n".join(said[i])))
            else:
                roles = ("user", "assistant")
                messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(said[i])]
                ids = list(template.encode(prompt.where or prompt.source, messages))
            if most is not None and len(ids) + max_tokens > most:
                raise InvalidArgument(
                    f"{prompt.where or prompt.source}: got {len(ids)} tokens and --max-tokens {max_tokens}, expected at most {most} together, "
                    "the engine's context"
                )
            source = prompt.source if turn == 0 else f"{prompt.source}, turn {turn + 1}"
            found[i].append(Task(Prompt(prompt.turns[turn], source, prompt.where, prompt.category), ids))
        more = [i for i in going if turn + 1 < len(prompts[i].turns)]
        if more:
            params = sampling_params(Setting(0.0), len(more), max_tokens, ends)
            answers = timed(llm, [found[i][-1].ids for i in more], params, draft=False).outputs
            for i, answer in zip(more, answers):
                said[i].append(answer.text)
    return [task for tasks in found for task in tasks], ends


def others_beside(llm: Any, draft: str | None) -> tuple[list[Foreign], str | None]:
    """transformers and the z-lab loop on the checkpoints of an engine and of a DFlash drafter; or why the z-lab loop is not there."""
    loop = GenerateLoop.beside(llm)
    found: list[Foreign] = [Generate(TRANSFORMERS, loop), Generate(TRANSFORMERS_LOOKUP, loop)]
    reason = None
    if draft is None:
        reason = "no DFlash drafter was given (--draft FOLDER)"
    else:
        try:
            ReferenceLoop.require()
        except DflashError:
            reason = f"the package dflash is not installed: {INSTALL}"
    if reason is None:
        try:
            found.append(
                Reference(REFERENCE, ReferenceLoop(llm.model_dir, str(draft), llm.dtype, llm.device, loop.target))
            )
        except Exception as error:  # another's code on a checkpoint that it may not know
            reason = f"it does not load this pair: {line_of(error)}"
    return found, reason


def line_of(error: Exception) -> str:
    """An error of somebody else's code, in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"

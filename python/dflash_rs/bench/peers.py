"""Every way of decoding faster that this machine can run, in one run on the same prompts: what a drafter is worth, and beside whom.

Promises:
- Engines of ours share one target, read once. All arms take turns within a round, the order shifts by one each time, and a speed-up divides two
  runs of the same round: a machine that is busy for a while hits all of them alike. Medians and quartiles are over rounds.
- A head that predicts several tokens (MTP) runs at the number of steps that was fastest in a short scan before, as its users would set it.
- What cannot run is a row of `skipped` with the reason, never a row that is missing.

Prompts are conversations where the target has a chat template, plain texts otherwise. A later turn follows the plain greedy answer to
the turn before, the same one for every arm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_rs.bench import runner
from dflash_rs.bench.arms import Arm, Done, Foreign, Own, Task, Work, conversations, line_of, others_beside
from dflash_rs.bench.ngram import lookup_tau, repeated_ngram_share
from dflash_rs.bench.runner import (
    BESIDE,
    DFLASH,
    PLAIN,
    REFERENCE,
    Plan,
    Row,
    block_cost,
    compare,
    logit_gap,
    sampling_params,
    timed,
    totals,
)
from dflash_rs.bench.workloads import ALL, Prompt, Setting
from dflash_rs.config import LOOKUP
from dflash_rs.errors import InvalidArgument

TREES, MTP = "trees", "mtp"
# Most steps of a head that the scan tries, its rounds, and what it runs.
_MOST_STEPS, _SCAN_ROUNDS, _SCAN_PROMPTS, _SCAN_TOKENS = 7, 3, 6, 48
# Drafts of a tree at most, unless the caller says otherwise.
TREE_NODES = 15


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why; at any number of requests and any setting where these are None."""

    arm: str
    reason: str
    concurrency: int | None = None
    temperature: float | None = None

    @property
    def line(self) -> str:
        """As tables say it."""
        where = "" if self.concurrency is None else f", batch {self.concurrency}"
        where += "" if self.temperature is None else f", {Setting(self.temperature).label}"
        return f"skipped: {self.arm}{where}: {self.reason}"


@dataclass(frozen=True)
class Scan:
    """Tokens per second of a head by its steps (k), at so many requests, over all settings together; `best` is what it ran with then."""

    arm: str
    concurrency: int
    tokens_per_s: dict[int, float]
    best: int

    @property
    def line(self) -> str:
        """As tables say it."""
        rates = ", ".join(f"{k}: {rate:.1f}" for k, rate in self.tokens_per_s.items())
        return f"{self.arm}, batch {self.concurrency}: {self.best} steps were fastest (tokens/s by steps: {rates})"


@dataclass
class Comparison:
    """What the suite found."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)


# (drafter, requests at once, tokens of a block or None, drafts of a tree or 0, whether to look up beside the drafter) -> engine. Without a drafter
# it decodes plainly.
Make = Callable[[str | None, int, int | None, int, bool], Any]
# (engine, the DFlash drafter or None) -> the loops of others that are here, and why the z-lab loop is not among them (None where it is).
Others = Callable[[Any, str | None], tuple[list[Foreign], str | None]]


@dataclass
class Suite:
    """One run: `make` gives engines, `drafts` are its drafters, `block_size` limits DFlash drafters and look-up, `tree_nodes` trees.

    `begun` is told of the plain engine once, before anything is timed.
    """

    make: Make
    drafts: Sequence[str]
    plan: Plan
    others: Others = others_beside
    block_size: int | None = None
    tree_nodes: int = TREE_NODES
    say: Callable[[str], None] = lambda line: None
    begun: Callable[[Any], None] = lambda llm: None

    def run(self, prompts: Sequence[Prompt]) -> Comparison:
        """Measures plain decoding, every drafter and the loops of others."""
        self.result = Comparison()
        self.tasks: list[Task] = []
        self.stop_ids: list[int] = []
        self.eos: list[int] = []
        self.firsts: dict[tuple[Setting, str, str], list[list[int]]] = {}
        foreign: list[Foreign] | None = None
        for concurrency in self.plan.concurrency:
            own: list[Own] = []
            try:
                plain = self.make(None, concurrency, None, 0, False)
                own.append(Own(PLAIN, plain, drafts=False))
                if not self.tasks:
                    self.tasks, self.stop_ids = conversations(plain, prompts, self.plan.max_tokens)
                    self.eos = list(plain.eos_token_ids)
                    self.begun(plain)
                dflash = self._add_drafters(own, concurrency)
                if foreign is None:
                    self.say("loading the loops of others")
                    foreign, missing = self.others(plain, dflash)
                    if missing is not None:
                        self._skip(Skipped(REFERENCE, missing))
                self._measure([*own, *self._that_run(foreign, concurrency)], concurrency)
            finally:
                for arm in own:
                    arm.llm.close()
        return self.result

    # ---- who takes part ------------------------------------------------------------------------------------------

    def _add_drafters(self, arms: list[Own], concurrency: int) -> str | None:
        """Appends the arms of our drafters and returns where the first DFlash drafter is. Scans the steps of heads, and says what kind is missing."""
        first = None
        kinds = []
        for draft in self.drafts:
            llm = self.make(draft, concurrency, None, 0, False)
            kind = getattr(llm, "draft_kind", None) or DFLASH
            name = _named(kind, draft, arms)
            kinds.append(kind)
            block = self.block_size
            if kind == MTP:
                # Engines of one drafter share its KV: one at a time.
                llm.close()
                scan = self._scan(name, draft, concurrency, llm.block_size - 1)
                block = scan.best + 1
            if kind == MTP or (block is not None and block != llm.block_size):
                llm.close()
                llm = self.make(draft, concurrency, block, 0, False)
            arms.append(Own(name, llm, draft=draft, tree_nodes=0))
            if kind != LOOKUP:
                self._add(arms, f"{name} {BESIDE}", draft, concurrency, block, 0, True)
            if kind in (LOOKUP, MTP):
                continue
            first = first or getattr(llm, "draft_dir", None) or draft
            self._add(arms, f"{name} {TREES}", draft, concurrency, block, self.tree_nodes, False)
        for kind, what in ((DFLASH, "DFlash drafter"), (MTP, "MTP head")):
            if not any(one.startswith(kind) for one in kinds):
                self._skip(Skipped(kind, f"no {what} was given (--draft FOLDER)"))
        return first

    def _add(
        self, arms: list[Own], name: str, draft: str, concurrency: int, block: int | None, nodes: int, lookup: bool
    ) -> None:
        """Appends a drafter's arm of another kind; what cannot be is skipped with the reason."""
        try:
            llm = self.make(draft, concurrency, block, nodes, lookup)
        except InvalidArgument as error:
            if not str(error).startswith(("tree_nodes:", "lookup:")):
                raise
            self._skip(Skipped(name, str(error)))
        else:
            arms.append(Own(_named(name, draft, arms), llm, draft=draft, tree_nodes=nodes))

    def _scan(self, arm: str, draft: str, concurrency: int, own: int) -> Scan:
        """Tries a head of `own` steps with 1 to 7 of them, in turns, on a few prompts at every setting."""
        self.say(f"concurrency {concurrency}: how many steps of {arm} are fastest")
        by_kind = [[task for task in self.tasks if task.prompt.category == kind] for kind in self._kinds()]
        in_turn = [pool[i] for i in range(max(map(len, by_kind))) for pool in by_kind if i < len(pool)]
        some = in_turn[: max(_SCAN_PROMPTS, concurrency)]
        rates: dict[int, list[float]] = {k: [] for k in range(1, min(own, _MOST_STEPS) + 1)}
        most = min(self.plan.max_tokens, _SCAN_TOKENS)
        for turn in range(min(self.plan.repeat, _SCAN_ROUNDS)):
            for k in _turned(list(rates), turn):
                llm = self.make(draft, concurrency, k + 1, 0, False)
                try:
                    tokens, seconds = 0, 0.0
                    for setting in self.plan.settings:
                        params = sampling_params(setting, len(some), most, self.stop_ids)
                        one = timed(llm, [task.ids for task in some], params, draft=True)
                        tokens, seconds = tokens + one.tokens, seconds + one.seconds
                finally:
                    llm.close()
                rates[k].append(tokens / seconds)
        found = {k: statistics.median(values) for k, values in rates.items()}
        scan = Scan(arm, concurrency, found, max(found, key=lambda k: found[k]))
        self.result.scans.append(scan)
        self.say(scan.line)
        return scan

    def _that_run(self, foreign: Sequence[Foreign], concurrency: int) -> list[Foreign]:
        """The loops of others that get through a few tokens here; of the others, an error of theirs is the reason why they are skipped."""
        kept = []
        for arm in foreign:
            reason = arm.refuses(concurrency)
            try:
                for setting in self.plan.settings if reason is None else ():
                    arm.run(self._work(arm, setting, concurrency, range(min(concurrency, len(self.tasks))), 8))
            except Exception as error:  # another's code on a model that it may not serve
                reason = f"it does not run this target: {line_of(error)}"
            if reason is None:
                kept.append(arm)
            else:
                self._skip(Skipped(arm.name, reason, concurrency))
        return kept

    def _skip(self, one: Skipped) -> None:
        if one not in self.result.skipped:
            self.result.skipped.append(one)
            self.say(one.line)

    # ---- what they do --------------------------------------------------------------------------------------------

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(task.prompt.category for task in self.tasks))

    def _work(
        self, arm: Arm, setting: Setting, concurrency: int, places: Sequence[int], most: int | None = None
    ) -> Work:
        """The tasks at these places; a prompt has the seed of its place."""
        tokens = min(self.plan.max_tokens, most or self.plan.max_tokens)
        params = sampling_params(setting, max(places) + 1, tokens, self.stop_ids)
        # A loop of others is told of all tokens that end a text, an engine of ours knows the target's own.
        ends = self.stop_ids if isinstance(arm, Own) else [*self.eos, *self.stop_ids]
        return Work([self.tasks[i] for i in places], [params[i] for i in places], setting, concurrency, tokens, ends)

    def _measure(self, arms: Sequence[Arm], concurrency: int) -> None:
        """All rounds at one number of requests."""
        places = {kind: [i for i, t in enumerate(self.tasks) if t.prompt.category == kind] for kind in self._kinds()}
        for setting in self.plan.settings:
            names = ", ".join(arm.name for arm in arms)
            self.say(
                f"concurrency {concurrency}, {setting.label}: {self.plan.repeat} x {len(self.tasks)} prompts, {names}"
            )
            for arm in arms:
                arm.run(self._work(arm, setting, concurrency, range(min(len(self.tasks), max(2, concurrency))), 24))
            runs: dict[str, dict[str, list[Done]]] = {arm.name: {kind: [] for kind in places} for arm in arms}
            number = 0
            for _ in range(self.plan.repeat):
                for kind, some in places.items():
                    for arm in _turned(arms, number):
                        runs[arm.name][kind].append(arm.run(self._work(arm, setting, concurrency, some)))
                    number += 1
            for kind, some in places.items():
                done = {arm.name: runs[arm.name][kind] for arm in arms}
                self.result.rows += self._rows(arms, done, kind, some, setting, concurrency)
            if len(places) > 1:
                done = {arm.name: _joined([runs[arm.name][kind] for kind in places]) for arm in arms}
                everything = [i for some in places.values() for i in some]
                self.result.rows += self._rows(arms, done, ALL, everything, setting, concurrency)

    def _rows(
        self,
        arms: Sequence[Arm],
        done: dict[str, list[Done]],
        kind: str,
        places: list[int],
        setting: Setting,
        concurrency: int,
    ) -> list[Row]:
        """The rows of a category, or of all."""
        prompts = [self.tasks[i].prompt for i in places]
        prompt_ids = [self.tasks[i].ids for i in places]
        plain_ids = done[PLAIN][0].token_ids
        plain_rates = [one.tokens / one.seconds for one in done[PLAIN]]
        plain = next(arm for arm in arms if isinstance(arm, Own))
        gap = logit_gap(plain.llm, prompt_ids, plain_ids)
        rows = []
        for arm in arms:
            own = done[arm.name]
            rates = [one.tokens / one.seconds for one in own]
            over = [rate / base for rate, base in zip(rates, plain_rates)]
            comparable = arm.comparable or setting.temperature == 0
            divergences: list[runner.Divergence] = []
            for one in own if comparable else ():
                # Every round has to say the same, not only the first one.
                divergences = compare(prompts, plain_ids, one.token_ids, gap)
                if divergences:
                    break
            ids = own[0].token_ids
            decoded = sum(max(len(one) - 1, 0) for one in ids)
            tau = decoded / own[0].steps if own[0].steps else 0.0
            counts: dict[str, Any] = {"steps": own[0].steps, "tau": tau, "output_tokens": own[0].tokens}
            if own[0].outputs is not None:
                counts = totals(own[0].outputs)
            block = arm.llm.block_size if isinstance(arm, Own) and arm.drafts else None
            row = Row(
                mode=arm.name,
                concurrency=concurrency,
                temperature=setting.temperature,
                seed=setting.seed,
                category=kind,
                tokens_per_s=statistics.median(rates),
                tokens_per_s_quartiles=quartiles(rates),
                tokens_per_s_runs=rates,
                speedup=statistics.median(over),
                speedup_quartiles=quartiles(over),
                identical_to_plain=not divergences if comparable else None,
                identical=f"{len(prompts) - len(divergences)}/{len(prompts)}" if comparable else "",
                repeated_4gram_share=statistics.fmean(repeated_ngram_share(one) for one in ids),
                ngram_tau=lookup_tau(list(zip(prompt_ids, ids)), block or 8),
                divergences=divergences,
                **counts,
            )
            if arm.comparable:
                first = self.firsts.setdefault((setting, kind, arm.name), ids)
                row.identical_to_first_concurrency = ids == first
            if isinstance(arm, Own) and block is not None:
                row.draft, row.block_size, row.tree_nodes = arm.draft, block, arm.tree_nodes
                if passes := sum(one.passes for one in own):
                    row.drafts_per_pass = sum(one.drafted for one in own) / passes
                    # A tree's limit is nothing that every pass should come near.
                    if not arm.tree_nodes:
                        row.most_drafts = block - 1
                        row.block_cost = block_cost(arm.llm, block, min(concurrency, len(prompts)))
            rows.append(row)
        return rows


def _turned(things: Sequence[Any], turn: int) -> list[Any]:
    """The same in turn, another one first each time."""
    first = turn % len(things)
    return [*things[first:], *things[:first]]


def _named(kind: str, draft: str, arms: Sequence[Own]) -> str:
    """What no other arm is called: two drafters of a kind have the names of their folders behind it."""
    taken = {arm.name for arm in arms}
    name = kind if kind not in taken else f"{kind} ({Path(draft).name})"
    while name in taken:
        name += "'"
    return name


def _joined(parts: Sequence[Sequence[Done]]) -> list[Done]:
    """Runs of the categories put together, round by round."""
    found = []
    for turn in range(len(parts[0])):
        one = [part[turn] for part in parts]
        outputs = [output for part in one for output in part.outputs or ()]
        found.append(
            Done(
                sum(part.seconds for part in one),
                [ids for part in one for ids in part.token_ids],
                sum(part.steps for part in one),
                outputs or None,
                sum(part.passes for part in one),
                sum(part.drafted for part in one),
            )
        )
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]

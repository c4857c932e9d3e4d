"""Whether this drafter fits this target, said in one line of the log before the server takes requests.

A drafter of another checkpoint, another chat template or a target that is quantised too hard is accepted so rarely that it costs more than it gains,
and nothing else shows it: the text is right. So a server that warms up answers a few built-in prompts first, in whole blocks and greedily, through the
tokenizer's chat template, and tells what a pass of the target yielded. SGLang runs it as one of its ``--warmups``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from dflash_rs.config import assets
from dflash_rs.sglang import ALGORITHM, config
from dflash_rs.sglang.limits import KEY

logger = logging.getLogger(__name__)

NAME = "dflash_rs"
# Of each category of the built-in prompts, and how many tokens are written for each of them.
PROMPTS, TOKENS = 2, 48


def ask_for(args: Any) -> None:
    """Has the server run the probe where it warms up at all; `args` has ServerArgs' attributes."""
    if args.skip_server_warmup or args.disaggregation_mode != "null":
        return
    asked = args.warmups.split(",") if args.warmups else []
    if NAME not in asked:
        args.warmups = ",".join([*asked, NAME])


def register() -> None:
    """Makes the probe known to SGLang's ``--warmups``."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(NAME)(run)


async def run(disaggregation_mode: str, manager: Any) -> None:
    """Answers the built-in prompts through SGLang's tokenizer manager and logs what they show."""
    tokenizer = manager.tokenizer
    if tokenizer is None:
        logger.info("%s: the drafter was not tried: the server has no tokenizer for the built-in prompts", ALGORITHM)
        return
    from sglang.srt.managers.io_struct import GenerateReqInput

    asked = prompts()
    template = getattr(tokenizer, "chat_template", None) is not None
    params = {"temperature": 0, "max_new_tokens": TOKENS, "custom_params": {KEY: {"whole_blocks": True}}}
    answers: list[dict[str, Any]] = []
    try:
        texts = [_turn(tokenizer, prompt) if template else prompt for _, prompt in asked]
        async for found in manager.generate_request(GenerateReqInput(text=texts, sampling_params=params), None):
            answers = found
    except Exception as error:
        # Whatever a template or a server has against these prompts is no reason not to serve.
        logger.error("%s: the drafter could not be tried, the built-in prompts failed: %s", ALGORITHM, error)
        return
    level, line = verdict(
        [kind for kind, _ in asked], [a["meta_info"] for a in answers], template, config.load().alarm_tau
    )
    logger.log(level, "%s: %s", ALGORITHM, line)


def _turn(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def prompts() -> list[tuple[str, str]]:
    """The first few built-in prompts of each category, with it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (assets() / "bench_prompts.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found.setdefault(entry["category"], []).append((entry["category"], entry["prompt"]))
    return [one for kind in found.values() for one in kind[:PROMPTS]]


def verdict(
    categories: Sequence[str], answers: Sequence[dict[str, Any]], template: bool, alarm_tau: float
) -> tuple[int, str]:
    """The line and its level, from the ``meta_info`` of an answer to a prompt of each of `categories`. The first token of an answer is the
    prefill's; the others came from ``spec_verify_ct`` passes of the target."""
    gained: dict[str, int] = {}
    passes: dict[str, int] = {}
    for kind, info in zip(categories, answers, strict=True):
        gained[kind] = gained.get(kind, 0) + int(info["completion_tokens"]) - 1
        passes[kind] = passes.get(kind, 0) + int(info.get("spec_verify_ct") or 0)
    how = "in the tokenizer's chat template" if template else "as they are (the tokenizer has no chat template)"
    over = f"over {len(answers)} built-in prompts {how}"
    if not (total := sum(passes.values())):
        return logging.WARNING, f"what the drafter is worth is not known: the target drafted nothing {over}"
    tau = sum(gained.values()) / total
    kinds = ", ".join(f"{kind} {gained[kind] / count:.2f}" for kind, count in passes.items() if count)
    line = f"this drafter gives {tau:.2f} tokens per pass of the target ({kinds}), {over}; plain decoding gives 1"
    if alarm_tau == 0 or tau > alarm_tau:
        return logging.INFO, line
    return (
        logging.WARNING,
        f"{line}. Is it the one trained for this target, and the template the one it was trained with?",
    )

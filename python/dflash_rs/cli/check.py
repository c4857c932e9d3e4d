"""`dflash-rs check`: whether texts are those of plain decoding, in the situations where speculation could change them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dflash_rs.cli import console, engine
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug, add_engine, positive
from dflash_rs.errors import InvalidArgument

# Tokens of the long prompt, where the context has room for it.
_LONG = 1024


def add(commands: Any) -> None:
    """Adds the command."""
    check = commands.add_parser(
        "check",
        help="compare drafted texts with plain ones in every situation",
        description=(
            "Compare drafted texts with those of plain decoding: alone, eight at once, in chunks, in a long context, after prefix hits, beside requests\n"
            "that leave, with drafts that are all right, half right, wrong at first, and all wrong for hundreds of steps; greedy and seeded.\n"
            "With --plain and --speculative, two servers with OpenAI's /v1/completions are compared instead, greedily."
        ),
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs check
  dflash-rs check --model path/to/model --draft path/to/drafter --prompts 4 --json check.json
  dflash-rs check --model path/to/model --draft lookup --max-tokens 128
  dflash-rs check --plain http://127.0.0.1:30000 --speculative http://127.0.0.1:30001

"""
        + EXIT_CODES,
    )
    add_engine(check)
    check.add_argument(
        "--no-draft", action="store_true", help="no drafter of your own: only drafts that are right or wrong on purpose"
    )
    group = check.add_argument_group("the battery")
    group.add_argument(
        "--prompt-file", metavar="FILE", help="your prompts: JSON list, JSON lines, or one per line; UTF-8"
    )
    group.add_argument("--prompts", type=positive, default=8, metavar="N", help="use the first N prompts; default: 8")
    group.add_argument("--max-tokens", type=positive, default=64, metavar="N", help="per text; default: 64")
    group.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="repeats of what is run at once; default: 5"
    )
    group.add_argument(
        "--rejected",
        type=positive,
        default=300,
        metavar="N",
        help="tokens of the text all of whose drafts are wrong; default: 300",
    )
    group.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="lead in logits that is rounding; default: 0.001 in float32, 0.5 in bfloat16 and between servers, 0.1 in float16",
    )
    servers = check.add_argument_group("two servers")
    servers.add_argument("--plain", metavar="URL", help="a server that decodes plainly")
    servers.add_argument("--speculative", metavar="URL", help="one that speculates, with the same target")
    servers.add_argument("--served-name", metavar="NAME", help="what both call the model; default: the first they list")
    check.add_argument("--json", metavar="PATH", help="write what was found; - writes to standard output")
    add_debug(check)
    check.set_defaults(run=run)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 100")
    return value


def run(args: argparse.Namespace) -> int:
    """`dflash-rs check`."""
    from dflash_rs.bench.workloads import held_out_prompts, read_prompts
    from dflash_rs.check import as_json, lines

    if (args.plain is None) != (args.speculative is None):
        there, lacks = ("--plain", "--speculative") if args.speculative is None else ("--speculative", "--plain")
        raise InvalidArgument(f"{there}: got it without {lacks}, expected both or none")
    if args.plain is not None and (args.model is not None or args.draft is not None):
        raise InvalidArgument("--plain: got --model or --draft, too, expected either two servers or models to load")
    prompts = read_prompts(args.prompt_file, args.prompts) if args.prompt_file else held_out_prompts(args.prompts)
    found = _servers(args, prompts) if args.plain is not None else _battery(args, prompts)
    text = "\n".join(lines(found)) + "\n"
    if args.json == "-":
        console.say(text.rstrip("\n"))
        console.emit(json.dumps(as_json(found), indent=1) + "\n")
    else:
        console.emit(text)
        if args.json is not None:
            Path(args.json).write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    return console.OK if all(result.passed for result in found) else console.FAILED


def _servers(args: argparse.Namespace, prompts: Any) -> Any:
    from dflash_rs.check.servers import Server, compare_servers

    plain, speculative = Server(args.plain, args.served_name), Server(args.speculative, args.served_name)
    return compare_servers(
        plain,
        speculative,
        [prompt.text for prompt in prompts],
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        tolerance=0.5 if args.tolerance is None else args.tolerance,
        say=console.say,
    )


def _battery(args: argparse.Namespace, prompts: Any) -> Any:
    from dflash_rs.check import Battery

    llm = engine.make_engine(args, max_running=1)
    texts = [llm.encode(prompt.text) for prompt in prompts]
    for i, ids in enumerate(texts):
        if not 0 < len(ids) < llm.max_context:
            raise InvalidArgument(
                f"{engine.called(i, prompts)}: got {len(ids)} tokens, expected 1..{llm.max_context - 1}, below max_context"
            )
    # One that is long: all of them in a row, as far as the context goes.
    room = min(llm.max_context - args.max_tokens, _LONG)
    row = [token for _ in range(1 + room // sum(map(len, texts))) for ids in texts for token in ids][:room]
    if len(row) > max(map(len, texts)):
        texts.append(row)
    target, draft = llm._target, llm._draft
    block, nodes = (8 if draft is None else llm.block_size), llm.tree_nodes
    made = {"tokenizer": llm.tokenizer, "token_bytes": llm._bytes, "max_context": args.max_context or 0}
    llm.close()

    def engine_of(drafter: Any, **sizes: Any) -> Any:
        # The pair's own drafter as it was asked for; one that is scripted in whole blocks, whatever pays.
        own: dict[str, Any] = {"lookup": False}
        if drafter is draft and draft is not None:
            own = {"block_size": block, "tree_nodes": nodes, "lookup": args.lookup}
        return type(llm).from_parts(target, drafter, adaptive=False, **made, **own, **sizes)

    return Battery(
        engine_of,
        draft,
        texts,
        block_size=block,
        max_tokens=args.max_tokens,
        rejected=args.rejected,
        rounds=args.rounds,
        tolerance=args.tolerance,
        say=console.say,
    ).run()

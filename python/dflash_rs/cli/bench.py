"""`dflash-rs bench`: measures with and without drafting."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Sequence
from typing import Any

from dflash_rs.cli import console, engine
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug, add_engine, integers, positive, seed
from dflash_rs.config import LOOKUP
from dflash_rs.errors import InvalidArgument


def add(commands: Any) -> None:
    """Adds the command."""
    bench = commands.add_parser(
        "bench",
        help="measure drafters against plain decoding",
        description=(
            "Measure tokens/s with and without drafting on the same engine in one run, and check that the texts agree.\n"
            "Beside each tau stand the tau of a prompt look-up on the same outputs and their share of repeated 4-grams.\n"
            "The suite peers runs, by kind of text: plain decoding, every --draft (DFlash as chains and as trees, an MTP head at its\n"
            "best number of steps), look-up, transformers' generate without and with its prompt look-up, and the z-lab loop."
        ),
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs bench --suite demo
  dflash-rs bench --suite demo --concurrency 1,2,4,8 --json results.json --plot speedup.png
  dflash-rs bench --suite demo --profile --temperature 0
  dflash-rs bench --draft auto --draft lookup --temperature 0
  dflash-rs bench --suite reference --json -      (needs: pip install --no-deps dflash==0.1.0)
  dflash-rs bench --suite peers --concurrency 1,4 --json peers.json --plot peers.png
  dflash-rs bench --suite peers --model smollm2 --draft runs/draft --draft runs/mtp --prompts humaneval.jsonl --prompts 16

"""
        + EXIT_CODES,
    )
    bench.add_argument("--suite", choices=("demo", "reference", "peers"), default="demo", help="default: demo")
    bench.add_argument(
        "--concurrency", type=integers, metavar="N,N", help="requests at once; default: 1 (peers: 1,2,4,8)"
    )
    bench.add_argument(
        "--temperature",
        type=_temperatures,
        metavar="T,T",
        help="default: 0,0.7 (reference: 0; peers: 0,0.7,1); above 0 runs are seeded",
    )
    bench.add_argument(
        "--seed", type=seed, default=1, metavar="N", help="prompt i is sampled with seed + i; default: 1"
    )
    bench.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs per arm; default: 3")
    bench.add_argument(
        "--prompts",
        type=_prompts,
        action="append",
        default=[],
        metavar="N|FILE",
        help="use the first N prompts (peers: of each category); default: all. Or a file, as --prompt-file; may be given for both, for "
        "peers several files",
    )
    bench.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="your prompts instead of the bundled held-out ones: JSON list, JSON lines, or one per line; UTF-8. peers: JSON lines with "
        "id, category, and prompt or turns",
    )
    bench.add_argument("--max-tokens", type=positive, default=96, metavar="N", help="per prompt; default: 96")
    add_engine(bench, drafters=True)
    bench.add_argument("--json", metavar="PATH", help="write header and rows; - writes to standard output")
    bench.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw speed-up over concurrency and the acceptance histogram; peers: speed-up by kind of text",
    )
    bench.add_argument("--profile", action="store_true", help="show where the step's time goes")
    add_debug(bench)
    bench.set_defaults(run=run)


def _prompts(text: str) -> int | str:
    """How many, or a file."""
    return positive(text) if re.fullmatch(r"[+-]?\d+", text.strip()) or not text.strip() else text


def _temperatures(text: str) -> tuple[float, ...]:
    from dflash_rs.sampling import SamplingParams

    try:
        return tuple(float(SamplingParams(temperature=float(part)).temperature) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected temperatures, for example 0,0.7") from None


def run(args: argparse.Namespace) -> int:
    """`dflash-rs bench`."""
    from dflash_rs.bench import report
    from dflash_rs.bench.runner import Plan, run_demo
    from dflash_rs.bench.workloads import Setting, held_out_prompts, read_prompts
    from dflash_rs.sampling import SamplingParams

    default = {"reference": (0.0,), "peers": (0.0, 0.7, 1.0)}.get(args.suite, (0.0, 0.7))
    temperatures = args.temperature or default
    settings = tuple(Setting(t, args.seed if t > 0 else None) for t in temperatures)
    concurrency = args.concurrency or ((1, 2, 4, 8) if args.suite == "peers" else (1,))
    plan = Plan(settings, concurrency, args.repeat, args.max_tokens, args.profile)
    files, limit = _which_prompts(args)
    drafts = args.draft or [None]
    if args.suite == "reference" and (len(drafts) > 1 or LOOKUP in drafts):
        raise InvalidArgument(f"--draft: got {', '.join(drafts)}, expected one DFlash drafter for --suite reference")
    if args.lookup is not None and args.suite != "demo":
        what = "measures drafters with and without it" if args.suite == "peers" else "is about the drafter alone"
        raise InvalidArgument(
            f"--lookup, --no-lookup: got one with --suite {args.suite}, which {what}, expected neither"
        )
    if args.plot is not None and args.json is not None and os.path.realpath(args.plot) == os.path.realpath(args.json):
        raise InvalidArgument(f"--plot: got {args.plot}, expected another file than --json")
    if args.suite == "peers":
        return _run_peers(args, plan, files, limit)
    if len(files) > 1:
        raise InvalidArgument(f"--prompts: got {len(files)} files, expected one for --suite {args.suite}")
    prompts = read_prompts(files[0], limit) if files else held_out_prompts(limit)
    _need_places(args)

    heads: list[dict[str, Any]] = []

    def engine_for(concurrency: int, draft: str | None = drafts[0]) -> Any:
        # Without prefix reuse: every run computes its prompts itself, whichever arm ran before.
        one = argparse.Namespace(**{**vars(args), "draft": draft})
        # Beside another loop it is the drafter alone that is compared.
        alone = {"lookup": False} if args.suite == "reference" else {}
        llm = engine.make_engine(one, max_running=concurrency, prefix_cache=False, **alone)
        if not heads:
            try:
                engine.begin(llm, prompts, SamplingParams(max_tokens=args.max_tokens)).close()
            except BaseException:
                llm.close()
                raise
            heads.append(report.header(args.words, llm))
        return llm

    if args.suite == "reference":
        from dflash_rs.bench.reference import ReferenceLoop, run_reference

        ReferenceLoop.require()
        rows = run_reference(engine_for, ReferenceLoop.beside, prompts, plan, console.say)
    else:
        rows = []
        for draft in drafts:
            rows += run_demo(functools.partial(engine_for, draft=draft), prompts, plan, console.say)

    lines = [report.table(rows), report.machine(heads[0]), *report.remarks(rows)]
    if args.profile:
        lines.append(report.profile_table(rows))
    _tell(args, lines, heads[0], rows)
    if args.plot is not None:
        report.plot(args.plot, heads[0], rows)
    return _verdict(heads[0], rows)


def _which_prompts(args: argparse.Namespace) -> tuple[list[str], int | None]:
    """The files that were named, and how many prompts."""
    files = [one for one in args.prompts if isinstance(one, str)]
    limits = [one for one in args.prompts if isinstance(one, int)]
    if len(limits) > 1:
        raise InvalidArgument(f"--prompts: got the numbers {', '.join(map(str, limits))}, expected one")
    if args.prompt_file is not None:
        files.append(args.prompt_file)
    return files, limits[0] if limits else None


def _need_places(args: argparse.Namespace) -> None:
    """Refuses before a long run what could not be written after it."""
    from dflash_rs.bench import report

    if args.plot is not None:
        report.need_matplotlib(args.plot)
        report.need_place("--plot", args.plot)
    if args.json not in (None, "-"):
        report.need_place("--json", args.json)


def _tell(args: argparse.Namespace, lines: Sequence[str], head: dict[str, Any], rows: Any, **more: Any) -> None:
    """Shows the table, and writes what programs read."""
    from dflash_rs.bench import report

    text = "\n".join(lines)
    if args.json == "-":
        console.say(text)
        with console.writing():
            report.write_json(args.json, head, rows, **more)
        return
    console.emit(text + "\n")
    if args.json is not None:
        report.write_json(args.json, head, rows, **more)


def _verdict(head: dict[str, Any], rows: Any) -> int:
    """Failed, where a text of an engine of ours differs in float32."""
    from dflash_rs.bench.runner import FOREIGN

    differs = any(row.identical_to_plain is False for row in rows if row.mode not in FOREIGN)
    return console.FAILED if differs and head.get("dtype") == "float32" else console.OK


def _run_peers(args: argparse.Namespace, plan: Any, files: list[str], limit: int | None) -> int:
    """`--suite peers`."""
    from dataclasses import asdict

    from dflash_rs import known_models
    from dflash_rs.bench import report
    from dflash_rs.bench.peers import TREE_NODES, Suite
    from dflash_rs.bench.peers_plot import plot_peers
    from dflash_rs.bench.workloads import ALL, bundled_conversations, read_conversations

    if args.profile:
        raise InvalidArgument(
            "--profile: got it with --suite peers, expected --suite demo: stages are those of engines of ours"
        )
    prompts = read_conversations(files, limit) if files else bundled_conversations(limit)
    _need_places(args)
    known = None if args.model is None else known_models.find(args.model)
    drafts = args.draft or (["auto"] if args.model is None or (known is not None and known.drafter is not None) else [])
    drafts = list(dict.fromkeys([*drafts, LOOKUP]))
    heads: list[dict[str, Any]] = []
    suite = Suite(
        engine.Shared(args),
        drafts,
        plan,
        block_size=args.block_size,
        tree_nodes=args.tree_nodes or TREE_NODES,
        say=console.say,
        begun=lambda llm: heads.append(report.header(args.words, llm)),
    )
    found = suite.run(prompts)
    # Every row has its own limits of drafts.
    head = {name: value for name, value in heads[0].items() if name not in ("block_size", "tree_nodes", "lookup")}
    head |= {"load_average_at_end": report.load_average(), "dflash": report.version("dflash")}
    whole = [row for row in found.rows if row.category == ALL] or found.rows
    # By category at the first number of requests, all together at the others: the rest is for programs.
    shown = [row for row in found.rows if row.concurrency == plan.concurrency[0] or row in whole]
    lines = [report.table(shown), report.machine(head), *(scan.line for scan in found.scans)]
    lines += [*report.remarks(whole), *(one.line for one in found.skipped)]
    more = {"scans": [asdict(one) for one in found.scans], "skipped": [asdict(one) for one in found.skipped]}
    _tell(args, lines, head, found.rows, **more)
    if args.plot is not None:
        plot_peers(args.plot, head, found.rows)
    return _verdict(head, found.rows)

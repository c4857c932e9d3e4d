"""`dflash-rs bench`: measures with and without drafting."""

from __future__ import annotations

import argparse
import functools
import os
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
            "Beside each tau stand the tau of a prompt look-up on the same outputs and their share of repeated 4-grams."
        ),
        formatter_class=FORMATTER,
        epilog="""examples:
  dflash-rs bench --suite demo
  dflash-rs bench --suite demo --concurrency 1,2,4,8 --json results.json --plot speedup.png
  dflash-rs bench --suite demo --profile --temperature 0
  dflash-rs bench --draft auto --draft lookup --temperature 0
  dflash-rs bench --suite reference --json -      (needs: pip install --no-deps dflash==0.1.0)

"""
        + EXIT_CODES,
    )
    bench.add_argument("--suite", choices=("demo", "reference"), default="demo", help="default: demo")
    bench.add_argument("--concurrency", type=integers, default=(1,), metavar="N,N", help="requests at once; default: 1")
    bench.add_argument(
        "--temperature",
        type=_temperatures,
        metavar="T,T",
        help="default: 0,0.7 (reference: 0); above 0 runs are seeded",
    )
    bench.add_argument(
        "--seed", type=seed, default=1, metavar="N", help="prompt i is sampled with seed + i; default: 1"
    )
    bench.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs per arm; default: 3")
    bench.add_argument("--prompts", type=positive, metavar="N", help="use the first N prompts; default: all")
    bench.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="your prompts instead of the bundled held-out ones: JSON list, JSON lines, or one per line; UTF-8",
    )
    bench.add_argument("--max-tokens", type=positive, default=96, metavar="N", help="per prompt; default: 96")
    add_engine(bench, drafters=True)
    bench.add_argument("--json", metavar="PATH", help="write header and rows; - writes to standard output")
    bench.add_argument("--plot", metavar="FILE.png", help="draw speed-up over concurrency and the acceptance histogram")
    bench.add_argument("--profile", action="store_true", help="show where the step's time goes")
    add_debug(bench)
    bench.set_defaults(run=run)


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

    default = (0.0,) if args.suite == "reference" else (0.0, 0.7)
    temperatures = args.temperature or default
    settings = tuple(Setting(t, args.seed if t > 0 else None) for t in temperatures)
    plan = Plan(settings, args.concurrency, args.repeat, args.max_tokens, args.profile)
    drafts = args.draft or [None]
    if args.suite == "reference" and (len(drafts) > 1 or LOOKUP in drafts):
        raise InvalidArgument(f"--draft: got {', '.join(drafts)}, expected one DFlash drafter for --suite reference")
    if args.plot is not None and args.json is not None and os.path.realpath(args.plot) == os.path.realpath(args.json):
        raise InvalidArgument(f"--plot: got {args.plot}, expected another file than --json")
    prompts = read_prompts(args.prompt_file, args.prompts) if args.prompt_file else held_out_prompts(args.prompts)
    if args.plot is not None:
        report.need_matplotlib(args.plot)
        report.need_place("--plot", args.plot)
    if args.json not in (None, "-"):
        report.need_place("--json", args.json)

    heads: list[dict[str, Any]] = []

    def engine_for(concurrency: int, draft: str | None = drafts[0]) -> Any:
        # Without prefix reuse: every run computes its prompts itself, whichever arm ran before.
        one = argparse.Namespace(**{**vars(args), "draft": draft})
        llm = engine.make_engine(one, max_running=concurrency, prefix_cache=False)
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
    if args.json == "-":
        console.say("\n".join(lines))
    else:
        console.emit("\n".join(lines) + "\n")
    if args.json == "-":
        with console.writing():
            report.write_json(args.json, heads[0], rows)
    elif args.json is not None:
        report.write_json(args.json, heads[0], rows)
    if args.plot is not None:
        report.plot(args.plot, heads[0], rows)
    differs = any(not row.identical_to_plain for row in rows if row.mode != "z-lab")
    return console.FAILED if differs and heads[0].get("dtype") == "float32" else console.OK

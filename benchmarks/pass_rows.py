"""What a verify pass of 1, 2, 4 and 8 rows takes: the price of a draft, for every instruction set of this processor and both matmul precisions.

A pass of few rows is the memory's time, of many the arithmetic's; where it turns decides how many drafts pay. Watched, because a product that
reads its weights twice, or a kernel that falls back to a lesser instruction set, costs every drafter its speed-up and changes no text.

An instruction set is chosen when a process starts, so every set and precision has a process of its own. They hold the target in memory side by
side and take turns, all but one waiting: a busy moment hits all of them alike. "over_one" divides by the one row of the same round.

Run in the environment of ``make install``: ``.venv/bin/python benchmarks/pass_rows.py --json OUT``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dflash_rs import _core, known_models
from dflash_rs.bench.report import header
from dflash_rs.config import assets

# Ours, and what torch and oneDNN have to be told so that they are held to the same set.
SETS = {
    "portable": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
}
PRECISIONS = ("highest", "medium")


def default_sets() -> list[str]:
    """Those of this processor. Without its vector instructions an x86-64 computes fused sums in software, a thousand times slower: not a
    set that anybody decodes with."""
    there = _core.cpu_isas()
    return [isa for isa in there if isa != "portable"] or there


class Child:
    """A process with the target in memory, which measures when it is asked."""

    def __init__(self, args: argparse.Namespace, isa: str, precision: str):
        self.isa, self.precision = isa, precision
        torchs, dnns = SETS[isa]
        switches = {"DFLASH_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": torchs, "ONEDNN_MAX_CPU_ISA": dnns}
        words = [sys.executable, __file__, "--measure", precision, "--model", args.model, "--rows", args.rows]
        words += ["--context", str(args.context), "--threads", str(args.threads), "--passes", str(args.passes)]
        self.process = subprocess.Popen(
            words, env=os.environ | switches, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = self._answer()
        self.reason: str | None = ready.get("reason")
        self.rounds: list[dict[int, float]] = []

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"pass_rows: the process of {self.isa}, {self.precision} ended with {self.process.wait()}")
        return json.loads(line)

    def round(self) -> None:
        """Measures every number of rows."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append({int(rows): ms for rows, ms in self._answer().items()})

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """A row of the results for every number of rows."""
        found = []
        for rows in self.rounds[0]:
            ms = [one[rows] for one in self.rounds]
            over = [one[rows] / one[1] for one in self.rounds] if 1 in self.rounds[0] else []
            found.append(
                {
                    "isa": self.isa,
                    "precision": self.precision,
                    "rows": rows,
                    "ms": round(statistics.median(ms), 3),
                    "ms_quartiles": [round(value, 3) for value in quartiles(ms)],
                    "ms_fastest": round(min(ms), 3),
                    "over_one": round(statistics.median(over), 3) if over else None,
                    "over_one_quartiles": [round(value, 3) for value in quartiles(over)] if over else None,
                }
            )
        return found


def quartiles(values: list[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(args: argparse.Namespace) -> None:
    """A child's life: says that it is ready, or why not, and answers every line with milliseconds by rows, medians of a few passes."""
    import numpy as np
    import torch

    from dflash_rs.errors import DflashError
    from dflash_rs.models.batch import StepBatch
    from dflash_rs.models.target import TargetModel
    from dflash_rs.models.target.load import describe
    from dflash_rs.options import pick_models

    torch.set_num_threads(args.threads)
    place, _ = pick_models(args.model, None)
    if (known := known_models.find(args.model)) is not None:
        place = known_models.folder_of(known)
    try:
        target = TargetModel.load(describe(place), dtype=torch.float32, matmul_precision=args.measure)
    except DflashError as error:
        print(json.dumps({"reason": str(error)}), flush=True)
        return
    numbers = [int(rows) for rows in args.rows.split(",")]
    slots = args.context + max(numbers)
    target.alloc_kv(slots)

    def batch(context: int, rows: int) -> StepBatch:
        places = np.arange(context, context + rows)
        return StepBatch.from_arrays(
            token_ids=places % target.vocab_size,
            positions=places,
            slots=places,
            query_starts=np.array([0, rows]),
            context_lens=np.array([context]),
            page_table=np.zeros((1, 1), dtype=np.int32),
            row_ids=np.array([0]),
            logit_rows=np.arange(rows),
            page_size=slots,
            device=target.device,
        )

    if args.context:
        target.forward(batch(0, args.context))
    batches = {rows: batch(args.context, rows) for rows in numbers}
    for one in batches.values():
        target.forward(one)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        found: dict[int, list[float]] = {rows: [] for rows in numbers}
        for _ in range(args.passes):
            for rows, one in batches.items():
                begun = time.perf_counter()
                target.forward(one)
                found[rows].append(1000 * (time.perf_counter() - begun))
        print(json.dumps({rows: statistics.median(ms) for rows, ms in found.items()}), flush=True)


def main() -> int:
    """Prints a line per instruction set, precision and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="target; default: smollm2 where it has been fetched, else the bundled one")
    parser.add_argument("--rows", default="1,2,4,8", help="rows of a pass, with commas; default: %(default)s")
    parser.add_argument("--context", type=int, default=128, help="tokens before them; default: %(default)s")
    parser.add_argument(
        "--isa",
        default=",".join(default_sets()),
        help="instruction sets, with commas; default: those of this processor, %(default)s",
    )
    parser.add_argument("--precision", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=5, help="of each number of rows in a round; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--measure", choices=PRECISIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("threads", "rounds", "passes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    if args.context < 0:
        parser.error(f"--context: got {args.context}, expected at least 0")
    if not all(part.isdigit() and int(part) > 0 for part in args.rows.split(",")):
        parser.error(f"--rows: got {args.rows!r}, expected numbers of at least 1 with commas")
    if args.model is None:
        args.model = "smollm2" if known_models.KNOWN["smollm2"].is_here else str(assets() / "target")
    if args.measure:
        measure(args)
        return 0
    asked, precisions = args.isa.split(","), args.precision.split(",")
    for name, given, known in (("isa", asked, _core.cpu_isas()), ("precision", precisions, PRECISIONS)):
        wrong = [one for one in given if one not in known]
        if wrong:
            parser.error(f"--{name}: got {wrong[0]!r}, expected {' or '.join(known)}")
    children: list[Child] = []
    skipped = []
    try:
        for isa in asked:
            for precision in precisions:
                child = Child(args, isa, precision)
                if child.reason is None:
                    children.append(child)
                else:
                    skipped.append({"isa": isa, "precision": precision, "reason": child.reason})
                    print(f"skipped: {isa}, {precision}: {child.reason}", file=sys.stderr, flush=True)
        for number in range(args.rounds + 1):
            turn = number % max(1, len(children))
            for child in children[turn:] + children[:turn]:
                child.round()
            if number == 0:  # warms up
                for child in children:
                    child.rounds.clear()
    finally:
        for child in children:
            child.end()
    rows = [row for child in children for row in child.rows()]
    for row in rows:
        over = "" if row["over_one"] is None else f", {row['over_one']:.2f} times one row"
        low, high = row["ms_quartiles"]
        print(
            f"{row['isa']:12} {row['precision']:8} {row['rows']:3} rows: {row['ms']:8.2f} ms ({low:.2f} to {high:.2f}){over}",
            flush=True,
        )
    if args.json is not None:
        head = header(sys.argv[1:])
        head |= {"command": "python benchmarks/pass_rows.py", "model": Path(args.model).name, "threads": args.threads}
        head |= {"context": args.context, "rounds": args.rounds, "passes": args.passes}
        args.json.write_text(
            json.dumps({"header": head, "rows": rows, "skipped": skipped}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

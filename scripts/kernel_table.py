"""What every kernel takes of a multiprocessor, for every architecture, compared with the committed cuda/registers.txt; and what a
warp issues on the ways that decide the speed, compared with cuda/instructions.txt (instruction_table.py has the counting and the model).

    python scripts/kernel_table.py           build, compare, list what differs; exit code 1 if anything got worse
    python scripts/kernel_table.py --write   build, write the tables

Fewer registers, spilled bytes or instructions than the tables say are welcome and pass. More, and a kernel that the table does not know or that
is gone, do not: look at the kernel, then write the tables again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import instruction_table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "cuda" / "registers.txt"
ISSUED = ROOT / "cuda" / "instructions.txt"
HEAD = "kernel arch registers spilled_bytes shared_bytes".split()


@dataclass(frozen=True)
class Usage:
    """Registers per thread, bytes spilled per thread (stores and loads together), bytes of static shared memory per block."""

    registers: int
    spilled: int
    shared: int


Table = dict[tuple[str, str], Usage]


def parse_log(text: str) -> Table:
    """The table in the words of `ptxas -v`."""
    table: Table = {}
    key, spilled = None, 0
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            key, spilled = (found[1], found[2]), 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # The properties of device functions that were not inlined follow their kernel's.
            spilled += int(found[1]) + int(found[2])
        elif key is not None and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            table[key] = Usage(int(found[1]), spilled, int(shared[1]) if shared else 0)
            key = None
    return table


def parse_table(text: str) -> Table:
    """The committed table."""
    table: Table = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith(("#", HEAD[0] + " ")):
            kernel, arch, *numbers = line.split()
            table[kernel, arch] = Usage(*map(int, numbers))
    return table


def to_text(table: Table, nvcc: str) -> str:
    """The table as it is committed."""
    rows = [HEAD, *([*key, *map(str, astuple(table[key]))] for key in sorted(table, key=_order))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        " ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return f"# Written by scripts/kernel_table.py --write, with nvcc {nvcc}; compared by `make kernels`.\n" + "\n".join(
        [*lines, ""]
    )


def _order(key: tuple[str, str]) -> tuple[str, int]:
    return key[0], int(re.sub(r"\D", "", key[1]))


def usages(table: Table) -> instruction_table.Usages:
    """The table as instruction_table.py wants it."""
    return {key: (usage.registers, usage.shared) for key, usage in table.items()}


def differences(old: Table, new: Table) -> tuple[list[str], list[str]]:
    """What got worse, and what got better."""
    worse, better = [], []
    for key in sorted(old.keys() | new.keys(), key=_order):
        name = " ".join(key)
        if key not in new:
            worse.append(f"{name}: in the table, not compiled")
        elif key not in old:
            worse.append(f"{name}: compiled, not in the table")
        else:
            for field in ("registers", "spilled", "shared"):
                before, now = getattr(old[key], field), getattr(new[key], field)
                if before != now:
                    (worse if now > before else better).append(f"{name}: {field} {before} -> {now}")
    return worse, better


def build() -> tuple[Path, str]:
    """Compiles all kernels for all architectures through build.rs; the folder of its outputs and the compiler's version."""
    environment = {k: v for k, v in os.environ.items() if k != "DFLASH_CUDA_ARCHS"} | {"DFLASH_CUDA": "1"}
    if sys.prefix != sys.base_prefix:
        environment["PYO3_PYTHON"] = sys.executable
    command = ["cargo", "build", "--locked", "--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    for message in map(json.loads, done.stdout.splitlines()):
        if message.get("reason") == "build-script-executed":
            variables = dict(message["env"])
            if "DFLASH_BUILT_NVCC" in variables:
                return Path(message["out_dir"]), variables["DFLASH_BUILT_NVCC"]
    sys.exit("cargo build reported no run of build.rs")


def main() -> int:
    """Builds, then writes or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write cuda/registers.txt and cuda/instructions.txt")
    args = parser.parse_args()
    folder, nvcc = build()
    table = parse_log((folder / "kernels.ptxas").read_text(encoding="utf-8"))
    if not table:
        sys.exit("ptxas reported no kernel")
    counts = instruction_table.count_all(instruction_table.disassemble(folder / "kernels.fatbin"), ROOT / "cuda")
    architectures = sorted({arch for _, arch in table}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    summary = f"{len({kernel for kernel, _ in table})} kernels for {', '.join(architectures)} by nvcc {nvcc}"
    names = " and ".join(str(path.relative_to(ROOT)) for path in (TABLE, ISSUED))
    if args.write:
        TABLE.write_text(to_text(table, nvcc), encoding="utf-8")
        ISSUED.write_text(instruction_table.to_text(counts, usages(table), nvcc), encoding="utf-8")
        print(f"{names}: {summary}")
        return 0
    old, old_counts = (path.read_text(encoding="utf-8") if path.is_file() else "" for path in (TABLE, ISSUED))
    worse, better = (
        [*of_table, *of_counts]
        for of_table, of_counts in zip(
            differences(parse_table(old), table),
            instruction_table.differences(instruction_table.parse_text(old_counts), counts),
            strict=True,
        )
    )
    for line in better:
        print(f"better  {line}")
    for line in worse:
        print(f"WORSE   {line}")
    if worse:
        print(f"{names}: {len(worse)} entries differ; if that is wanted: scripts/kernel_table.py --write")
        return 1
    print(f"{summary}: none takes or issues more than {names} say")
    return 0


if __name__ == "__main__":
    sys.exit(main())

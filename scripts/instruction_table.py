"""What a warp issues for its share of the work, and what speed that allows: cuda/instructions.txt, written by kernel_table.py.

The instructions are counted in the machine code for sm_90a (sass.py says what a walk is). The shares of bandwidth are *derived*, by
nothing but this model; no GPU had a part in them:

- A multiprocessor has four schedulers; each issues at most one instruction of one warp per clock. A warp alone does not fill its
  scheduler, as it waits for its own results: it is taken to issue in ISSUED_PER_WARP of the clocks, several warps in as many times that,
  until every clock is used. That figure is an assumption; the column "full" is what would be possible without it.
- An mma.m16n8k16 keeps a scheduler's tensor core busy for TENSOR_CLOCKS clocks.
- Memory moves HBM_BYTES per second. What attention's splits write and read again (float32 partial results) moves, too; K and V are
  taken to come from memory once, whoever reads them again finding them in the second-level cache.
- Blocks are dealt out evenly, whole ones: the multiprocessor with the most of them decides. Launches, the opening and the end of a
  block, waiting for memory, and attention's combining kernel are left out, so all shares are upper bounds.
- The time is the longest of the three; the share is (bytes that must move once) / (time x HBM_BYTES).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import sass

ARCH = "sm_90a"
# H100 SXM: multiprocessors; clocks per second at which its published peak rates hold; bytes per second of its memory.
MULTIPROCESSORS, CLOCK, HBM_BYTES = 132, 1.83e9, 3.35e12
SCHEDULERS, WARPS, REGISTERS, SHARED = 4, 64, 65536, 228 * 1024
ISSUED_PER_WARP = 0.275
TENSOR_CLOCKS = 8
# Keys of a split (dflash_rs.cuda.SPLIT_KEYS), rows of queries in a block, warps of a block.
SPLIT_KEYS, ROWS, BLOCK_WARPS = 512, 64, 4


@dataclass(frozen=True)
class Walk:
    """A walk through a kernel. Patterns match opcodes, or `function:opcode` for those inlined from that function.

    With `loop` it goes once round the loop that has all instructions of this pattern. `issued`: how many instructions of a pattern
    it has to have; where fewer lie on one way, the loop inside that has them is turned as often as it takes.
    """

    kernel: str
    name: str
    unit: str
    wanted: str
    unwanted: str = ""
    loop: str = ""
    issued: tuple[str, int] | None = None


def _attention(dim: int) -> Walk:
    """A tile without masks, for the warps that also look the tile after the next up in the page table (half of them, or fewer)."""
    keys = 32 if dim > 128 else 64
    copies = 2 * keys * dim // 8 // (32 * BLOCK_WARPS)
    return Walk(
        f"block_attention_{dim}",
        "full_tile",
        f"{keys}_keys",
        "HMMA|LDGSTS|slot_of:|key_place:",
        loop="HMMA",
        issued=("LDGSTS", copies),
    )


def _scan(kind: str, load: str) -> list[Walk]:
    kernel, unit = f"sample_scan_{kind}", "16_columns"
    edits = "edit4:|open_path:|open_row:|mark_tokens:|mark_edits:"
    read, gumbel = f"load4:{load}|put_maximum:SHFL|merge_block:SHFL", "gumbel_of_word:"
    return [
        Walk(kernel, "greedy", unit, read, f"{edits}|draw4:|philox4x32_10:|{gumbel}"),
        Walk(kernel, "draw_all_below_the_bar", unit, f"{read}|philox4x32_10:", f"{edits}|{gumbel}"),
        Walk(kernel, "draw_all_computed", unit, f"{read}|philox4x32_10:|{gumbel}", edits),
    ]


def _top_p(kind: str, load: str) -> list[Walk]:
    edits = "edit4:|open_path:|open_row:|mark_tokens:|mark_edits:"
    read = f"load4:{load}|merge_block:SHFL|bin_of:"
    return [
        Walk(f"sample_mass_{kind}", "top_p_none_weighs", "16_columns", read, f"{edits}|weight:|atomic_add:"),
        Walk(f"sample_mass_{kind}", "top_p_all_weigh", "16_columns", f"{read}|weight:|atomic_add:", edits),
        Walk(
            f"sample_pick_{kind}",
            "nothing_drawn",
            "16_columns",
            "merge_block:SHFL|raise_bar:SHFL|edge_lane:SHFL",
            f"{edits}|draw4:",
        ),
    ]


WALKS = [
    *map(_attention, (64, 128, 256)),
    *_scan("bf16", r"LDG\.E\.64"),
    *_scan("f32", r"LDG\.E\.128"),
    *_top_p("bf16", r"LDG\.E\.64"),
]


def _test(pattern: str) -> sass.Test:
    if not pattern:
        return lambda instruction: False
    compiled = re.compile(pattern)
    return lambda i: bool(compiled.match(i.opcode) or any(compiled.match(f"{name}:{i.opcode}") for name in i.functions))


def count(blocks: list[sass.Block], walk: Walk) -> list[sass.Instruction]:
    """Instructions of the walk."""
    loop = sass.loop_of(blocks, _test(walk.loop)) if walk.loop else None
    code = sass.walk(blocks, _test(walk.wanted), _test(walk.unwanted), loop)
    if not any(map(_test(walk.wanted), code)):
        raise sass.Unclear(f"nothing of {walk.wanted} on the walk")
    if walk.issued is None or loop is None:
        return code
    pattern, number = walk.issued
    test = _test(pattern)
    if sum(map(test, code)) == number:
        return code
    inner = [
        (header, body)
        for header, body in sass.loops(blocks).items()
        if body < loop[1] and any(test(i) for block in body for i in blocks[block].code)
    ]
    if len(inner) != 1:
        raise sass.Unclear(
            f"{sum(map(test, code))} {pattern} on the walk, {number} expected, {len(inner)} loops inside"
        )
    # Of several ways round, the one that computes an address.
    turn = sass.walk(blocks, _test(pattern + "|IMAD"), _test(""), inner[0])
    skipping = re.sub(rf"\|?{pattern}", "", walk.wanted)
    code = sass.walk(blocks, _test(skipping), test, loop)
    missing = number - sum(map(test, code))
    if missing % sum(map(test, turn)):
        raise sass.Unclear(f"{number} {pattern} are no whole number of turns of {sum(map(test, turn))}")
    return code + turn * (missing // sum(map(test, turn)))


# ---- the table ----------------------------------------------------------------------------------------------------------

Counts = dict[tuple[str, str], tuple[str, dict[str, int]]]  # (kernel, walk) -> unit, instructions by kind
Usages = dict[tuple[str, str], tuple[int, int]]  # (kernel, arch) -> registers, static shared bytes
COLUMNS = [*sass.KINDS]


def tool(name: str) -> Path:
    """A tool of the CUDA packages, or of the installation on PATH."""
    spec = find_spec("nvidia")
    folders = [Path(folder) / "cu13" / "bin" for folder in (spec.submodule_search_locations or [] if spec else [])]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    if found := shutil.which(name):
        return Path(found)
    sys.exit(f"{name}: not among the Python packages and not on PATH; pip install -r scripts/sass-requirements.txt")


def disassemble(fatbin: Path) -> str:
    """The machine code for ARCH with the source lines it comes from."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", ARCH, fatbin.resolve()], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        cubins = list(Path(folder).glob("*.cubin"))
        if len(cubins) != 1:
            sys.exit(f"{fatbin}: {len(cubins)} binaries for {ARCH}, expected one")
        command = [tool("nvdisasm"), "-c", "-gi", cubins[0]]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def count_all(text: str, sources: Path) -> Counts:
    """Every walk of WALKS. A walk that cannot be found ends the program."""
    source, code = sass.Source(sources), sass.sections(text)
    counts: Counts = {}
    for walk in WALKS:
        try:
            if walk.kernel not in code:
                raise sass.Unclear("no such kernel")
            issued = count(sass.parse(code[walk.kernel], source), walk)
        except sass.Unclear as why:
            sys.exit(f"{walk.kernel}, {walk.name}: {why}; look at the code, then at WALKS in {Path(__file__).name}")
        kinds = Counter(instruction.kind for instruction in issued)
        counts[walk.kernel, walk.name] = walk.unit, {kind: kinds[kind] for kind in COLUMNS}
    return counts


def attention_shared(dim: int) -> int:
    """Dynamic shared memory of a block (params.h, block_attention_launch)."""
    keys = 32 if dim > 128 else 64
    return 2 * dim * (ROWS + 4 * keys) + 2 * keys * 16


def resident(usages: Usages, kernel: str) -> tuple[int, int]:
    """Blocks of a multiprocessor at a time, and warps of each."""
    registers, shared = usages[kernel, ARCH]
    warps = BLOCK_WARPS if kernel.startswith("block_attention") else 8
    if kernel.startswith("block_attention"):
        shared += attention_shared(int(kernel.rsplit("_", 1)[1]))
    by_registers = REGISTERS // (ceil(registers / 8) * 8 * 32 * warps)
    by_shared = SHARED // (ceil(shared / 128) * 128 + 1024)  # the system takes one KiB of each block
    return min(by_registers, by_shared, WARPS // warps, 32), warps


@dataclass(frozen=True)
class Shape:
    """Work of one launch after the other: (kernel, walk, blocks, units per warp of a block)."""

    name: str
    stages: list[tuple[str, str, int, int]]
    must: int
    moved: int


def attention(requests: int, context: int, kv_heads: int, group: int, block: int, dim: int = 128) -> Shape:
    keys, own = 32 if dim > 128 else 64, context + block
    tiles_of_queries, splits = ceil(block * group / ROWS), ceil(own / SPLIT_KEYS)
    must = requests * kv_heads * dim * 2 * (2 * own + 2 * block * group)
    partials = splits * requests * block * kv_heads * group * (dim + 2) * 4 * 2 if splits > 1 else 0
    blocks = requests * kv_heads * tiles_of_queries * splits
    name = f"attention batch {requests}, context {context}, {kv_heads} KV heads x {group}, block {block}"
    return Shape(name, [(f"block_attention_{dim}", "full_tile", blocks, SPLIT_KEYS // keys)], must, must + partials)


def sampling(name: str, walks: list[tuple[str, str, bool]], rows: int, vocab: int) -> Shape:
    """Walks as (stage, walk, whether it reads the logits)."""
    blocks, must = rows * ceil(vocab / 4096), rows * vocab * 2
    stages = [(f"sample_{stage}_bf16", walk, blocks, 1) for stage, walk, _ in walks]
    return Shape(f"sampling {name}, {rows} rows of {vocab}", stages, must, must * sum(reads for *_, reads in walks))


def shapes() -> list[Shape]:
    """What the shares are given for."""
    rows, vocab = 1024, 151936
    return [
        *(attention(requests, 8192, 8, group, 16) for group in (4, 8) for requests in (64, 1)),
        sampling("greedy", [("scan", "greedy", True)], rows, vocab),
        sampling("at a temperature, all below the bar", [("scan", "draw_all_below_the_bar", True)], rows, vocab),
        sampling("at a temperature, all computed", [("scan", "draw_all_computed", True)], rows, vocab),
        sampling(
            "with top-p, light columns",
            [("scan", "greedy", True), ("mass", "top_p_none_weighs", True), ("pick", "nothing_drawn", False)],
            rows,
            vocab,
        ),
        sampling(
            "with top-p, all columns weigh",
            [("scan", "greedy", True), ("mass", "top_p_all_weigh", True), ("pick", "nothing_drawn", False)],
            rows,
            vocab,
        ),
    ]


def derive(counts: Counts, usages: Usages, shape: Shape) -> dict[str, str]:
    """One row of the second table."""
    full = issue = tensor = 0.0
    for kernel, walk, blocks, units in shape.stages:
        kinds = counts[kernel, walk][1]
        at_once, warps = resident(usages, kernel)
        busiest = ceil(blocks / MULTIPROCESSORS)
        rate = min(1.0, ISSUED_PER_WARP * min(at_once, busiest) * warps / SCHEDULERS)
        turns = busiest * units * warps / SCHEDULERS / CLOCK
        full += turns * sum(kinds.values())
        issue += turns * sum(kinds.values()) / rate
        tensor += turns * kinds["tensor"] * TENSOR_CLOCKS
    memory = shape.moved / HBM_BYTES
    times = {"memory": memory, "issue": issue, "tensor": tensor}
    bound = max(times, key=lambda name: times[name])
    best = shape.must / HBM_BYTES

    def us(seconds: float) -> str:
        return f"{seconds * 1e6:.1f}"

    return {
        "must_move_MB": f"{shape.must / 1e6:.1f}",
        "moves_MB": f"{shape.moved / 1e6:.1f}",
        "memory_us": us(memory),
        "tensor_us": us(tensor),
        "issue_us": us(issue),
        "bound": bound,
        "share": f"{best / max(times.values()):.0%}",
        "share_full": f"{best / max(memory, tensor, full):.0%}",
        "shape": shape.name,
    }


def _aligned(rows: list[list[str]], left: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def to_text(counts: Counts, usages: Usages, nvcc: str) -> str:
    """Both tables as they are committed."""
    head = ["kernel", "walk", "unit", "issued", *COLUMNS, "blocks"]
    rows = [
        [kernel, walk, unit, str(sum(kinds.values())), *map(str, kinds.values()), str(resident(usages, kernel)[0])]
        for (kernel, walk), (unit, kinds) in counts.items()
    ]
    derived = [derive(counts, usages, shape) for shape in shapes()]
    head_derived = list(derived[0])
    return "\n".join(
        [
            f"# Written by scripts/kernel_table.py --write, with nvcc {nvcc}; compared by `make kernels`.",
            f"# Counted in the machine code for {ARCH}: instructions that a warp issues for a unit of its work, by kind; blocks of a",
            "# multiprocessor at a time. Walks are described in scripts/instruction_table.py.",
            *_aligned([head, *rows], {0, 1, 2}),
            "",
            "# Derived from the above and not measured: upper bounds for an H100 SXM by the model in scripts/instruction_table.py. share: of",
            f"# {HBM_BYTES / 1e12:.2f} TB/s, where a warp issues in {ISSUED_PER_WARP} of the clocks; share_full: where every issue slot is used.",
            *("= " + line for line in _aligned([head_derived, *(list(row.values()) for row in derived)], {5, 8})),
            "",
        ]
    )


def parse_text(text: str) -> Counts:
    """Counts of the committed table."""
    counts: Counts = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith(("#", "=", "kernel ")):
            kernel, walk, unit, _, *numbers = line.split()
            counts[kernel, walk] = unit, dict(zip(COLUMNS, map(int, numbers[:-1]), strict=True))
    return counts


def differences(old: Counts, new: Counts) -> tuple[list[str], list[str]]:
    """What got worse, and what got better: by all instructions of a walk together."""
    worse, better = [], []
    for key in [*old, *(key for key in new if key not in old)]:
        name = ", ".join(key)
        if key not in new:
            worse.append(f"{name}: in the table, not counted")
        elif key not in old:
            worse.append(f"{name}: counted, not in the table")
        else:
            before, now = (sum(counts[key][1].values()) for counts in (old, new))
            if before != now:
                (worse if now > before else better).append(f"{name}: instructions {before} -> {now}")
    return worse, better

"""What a warp issues for its share of the work, and what speed that allows: cuda/instructions.txt, written by kernel_table.py.

The instructions are counted in the machine code for sm_90a (sass.py says what a walk is). The shares of bandwidth are *derived*, by
nothing but this model; no GPU had a part in them:

- A multiprocessor has four schedulers; each issues at most one instruction of one warp per clock. A warp alone does not fill its
  scheduler, as it waits for its own results: it is taken to issue in ISSUED_PER_WARP of the clocks, several warps in as many times that,
  until every clock is used. That figure is an assumption; the column "full" is what would be possible without it.
- An mma.m16n8k16 keeps a scheduler's tensor core busy for TENSOR_CLOCKS clocks.
- Memory moves HBM_BYTES per second. What attention's clusters write and read again (float32 partial results of MERGED splits each)
  moves, too; K and V are taken to come from memory once, whoever reads them again finding them in the second-level cache.
- Blocks are dealt out evenly, whole ones: the multiprocessor with the most of them decides. Of sampling's blocks all warps are taken to
  do what the first does. Left out are launches, waiting for memory, the opening and the end of attention's and the delta rule's blocks
  (what they fetch to shared memory among it, and what a cluster merges), multiprocessors that no whole cluster fits on, and kernels before and behind these (attention's combining one, sampling's finishing one,
  the delta rule's inputs), so all shares are upper bounds.
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
# Keys of a split (dflash_rs.cuda.SPLIT_KEYS), splits that a cluster merges, rows of queries in a block and in a wide one, of a warp.
SPLIT_KEYS, MERGED, ROWS, WIDE_ROWS, WARP_ROWS = 512, 8, 64, 128, 16
# Blocks from which on they are wide.
WIDE_BLOCKS = 1024
# Columns of a state in a block of delta_rule.
DELTA_COLUMNS = 64
# Columns of a chunk, and chunks of a block where rows are many (params.h); turns in which a block's threads look at four counters of
# sample_mass each (logic_tally.cuh).
CHUNK, PARTS = 4096, 8
TURNS = 24 * 256 // (4 * 256)


@dataclass(frozen=True)
class Walk:
    """A walk through a kernel. Patterns match opcodes, or `function:opcode` for those inlined from that function.

    With `loop` it goes once round the loop that has all instructions of this pattern, with `inner` round the innermost one that has most
    of them. `issued`: how many instructions of a pattern
    it has to have; where fewer lie on one way, the loop inside that has them is turned as often as it takes.
    """

    kernel: str
    name: str
    unit: str
    wanted: str
    unwanted: str = ""
    loop: str = ""
    issued: tuple[str, int] | None = None
    inner: bool = False


def _attention_kernel(dim: int, rows: int) -> str:
    return f"block_attention_wide_{dim}" if rows == WIDE_ROWS else f"block_attention_{dim}"


def _attention(dim: int, rows: int = ROWS) -> Walk:
    """A tile without masks, for the warps that also look the tile after the next up in the page table (half of them, or fewer)."""
    keys = 32 if dim > 128 else 64
    copies = 2 * keys * dim // 8 // (32 * rows // WARP_ROWS)
    return Walk(
        _attention_kernel(dim, rows),
        "full_tile",
        f"{keys}_keys",
        "HMMA|LDGSTS|slot_of:|key_place:",
        loop="HMMA",
        issued=("LDGSTS", copies),
    )


# What few rows ask for, and columns that cannot be loaded at once.
RARE = "edit4:|edit_columns:|edited:|open_path:|open_row:|mark_shared:|mark_tokens:|mark_edits:|load_apart:|raw_mass:|take_edited:|add_small:"
AGAIN = "_again"  # the end of a walk's name: another chunk of the block


def _scan(kind: str, load: str) -> list[Walk]:
    """All are the first warp's, which merges what all have found: a block with its first chunk, and each of its other chunks."""
    kernel, read = f"sample_scan_{kind}", f"load_words:{load}|merge_tops:REDUX|raw_of:LDG"
    maxima, draw, exact = "put_maximum:", "philox4x32_10:", "gumbel_of_word:"
    ways = {
        "greedy": (read, f"{RARE}|{maxima}|{draw}|{exact}"),
        "filtered": (f"{read}|put_maximum:SHFL", f"{RARE}|{draw}|{exact}"),
        "draw_none_computed": (f"{read}|bound4:", f"{RARE}|{maxima}|draw4:|{exact}"),
        "draw_one_computed": (f"{read}|bound4:|{exact}", f"{RARE}|{maxima}"),
    }
    return [
        walk
        for name, (wanted, unwanted) in ways.items()
        for walk in (
            Walk(kernel, name, "block", wanted, unwanted),
            Walk(kernel, f"{name}{AGAIN}", "16_columns", wanted, unwanted, loop="scan_thread:FMNMX"),
        )
    ]


def _filters(load: str) -> list[Walk]:
    """The first warp's, too, of bfloat16 logits; of a block other than the row's last, which finds the edge.

    A block of sample_mass counts the columns of one chunk after the other, and then goes through its counters: of four either none has
    counted anything, or each has, and goes into a bin for top-k and top-p both. `block` has one turn of each loop.
    """
    mass, pick, block = "sample_mass_bf16", "sample_pick_bf16", "top_of_chunks:"
    chunk, counters, heavy = f"load_words:{load}|count_columns:ATOMS", r"load_words:LDS\.128", "add_counted:ATOMS"
    none, all_ = f"{RARE}|find_edge:|add_columns:|flush:RED", f"{RARE}|find_edge:"
    return [
        Walk(mass, "block_none_weigh", "block", f"{block}|{chunk}|{counters}|is_last:BAR", none),
        Walk(mass, "block_all_weigh", "block", f"{block}|{chunk}|{counters}|{heavy}|flush:|is_last:BAR", all_),
        Walk(mass, f"chunk{AGAIN}", "16_columns", chunk, RARE, loop="count_columns:ATOMS"),
        Walk(mass, "counters_none_weigh", "4_counters", counters, none, loop=counters),
        Walk(mass, "counters_all_weigh", "4_counters", f"{counters}|{heavy}", all_, loop=counters),
        Walk(pick, "nothing_drawn", "block", f"{block}|is_seen:", f"{RARE}|pick4:"),
    ]


def _delta(dim: int) -> Walk:
    """A token that another one of the stage follows; the lanes that give its result out."""
    return Walk(f"delta_rule_{dim}", "token", "token", "fused:FFMA|delta_give:STG", loop="fused:FFMA", inner=True)


WALKS = [
    *map(_attention, (64, 128, 256)),
    _attention(128, WIDE_ROWS),
    *_scan("bf16", r"LDG\.E\.128"),
    *_scan("f32", r"LDG\.E\.128"),
    *_filters(r"LDG\.E\.128"),
    *map(_delta, (32, 64, 96, 128, 192, 256)),
]


def _test(pattern: str) -> sass.Test:
    if not pattern:
        return lambda instruction: False
    compiled = re.compile(pattern)
    return lambda i: bool(compiled.match(i.opcode) or any(compiled.match(f"{name}:{i.opcode}") for name in i.functions))


def count(blocks: list[sass.Block], walk: Walk) -> list[sass.Instruction]:
    """Instructions of the walk."""
    find = sass.inner_loop_of if walk.inner else sass.loop_of
    loop = find(blocks, _test(walk.loop)) if walk.loop else None
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


def attention_shared(dim: int, rows: int = ROWS) -> int:
    """Dynamic shared memory of a block (params.h, block_attention_launch)."""
    keys = 32 if dim > 128 else 64
    return 2 * dim * (rows + 4 * keys) + 2 * keys * 16


def delta_shared(dim: int) -> int:
    """The same of delta_rule."""
    return 4 * 16 * (2 * (dim + 8) + DELTA_COLUMNS + 2)


def resident(usages: Usages, kernel: str) -> tuple[int, int]:
    """Blocks of a multiprocessor at a time, and warps of each."""
    registers, shared = usages[kernel, ARCH]
    width = kernel.rsplit("_", 1)[1]
    if kernel.startswith("sample"):
        warps = 8
    elif kernel.startswith("block_attention"):
        rows = WIDE_ROWS if "wide" in kernel else ROWS
        warps = rows // WARP_ROWS
        shared += attention_shared(int(width), rows)
    else:
        warps = 4
        shared += delta_shared(int(width))
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
    splits = ceil(own / SPLIT_KEYS)
    many = requests * kv_heads * ceil(block * group / WIDE_ROWS) * splits >= WIDE_BLOCKS
    rows = WIDE_ROWS if dim == 128 and block * group > ROWS and many else ROWS
    tiles_of_queries = ceil(block * group / rows)
    must = requests * kv_heads * dim * 2 * (2 * own + 2 * block * group)
    parts = ceil(splits / MERGED)
    partials = parts * requests * block * kv_heads * group * (dim + 2) * 4 * 2 if parts > 1 else 0
    blocks = requests * kv_heads * tiles_of_queries * splits
    name = f"attention batch {requests}, context {context}, {kv_heads} KV heads x {group}, block {block}"
    return Shape(name, [(_attention_kernel(dim, rows), "full_tile", blocks, SPLIT_KEYS // keys)], must, must + partials)


def drawing(name: str, scan: str, rows: int, vocab: int, weigh: str = "") -> Shape:
    """Rows that the scan draws alone, or with top-p: then logits are read twice, and `weigh` says whose walks those of sample_mass are."""
    must, chunks = rows * vocab * 2, ceil(vocab / CHUNK)
    blocks = rows * ceil(chunks / PARTS)
    again = rows * chunks - blocks  # chunks that are not their block's first
    stages = [("sample_scan_bf16", scan, blocks, 1), ("sample_scan_bf16", f"{scan}{AGAIN}", again, 1)]
    if weigh:
        stages += [
            ("sample_mass_bf16", f"block_{weigh}", blocks, 1),
            ("sample_mass_bf16", f"chunk{AGAIN}", again, 1),
            ("sample_mass_bf16", f"counters_{weigh}", blocks, TURNS - 1),
            ("sample_pick_bf16", "nothing_drawn", blocks, 1),
        ]
    return Shape(f"sampling {name}, {rows} rows of {vocab}", stages, must, must * (2 if weigh else 1))


def delta(requests: int, heads: int, folded: int, block: int, dim: int = 128) -> Shape:
    """States are read and written, float32; tokens are of a size that does not matter beside them."""
    blocks, must = requests * heads * ceil(dim / DELTA_COLUMNS), requests * heads * dim * dim * 4 * 2
    name = f"delta rule batch {requests}, {heads} states of {dim} x {dim}, {folded} tokens folded in, block {block}"
    return Shape(name, [(f"delta_rule_{dim}", "token", blocks, folded + block)], must, must)


def shapes() -> list[Shape]:
    """What the shares are given for."""
    rows, vocab = 1024, 151936
    return [
        *(attention(requests, 8192, 8, group, 16) for group in (4, 8) for requests in (64, 1)),
        drawing("greedy", "greedy", rows, vocab),
        drawing("at a temperature, no warp computes", "draw_none_computed", rows, vocab),
        drawing("at a temperature, every warp computes once", "draw_one_computed", rows, vocab),
        drawing("with top-p, light columns", "filtered", rows, vocab, weigh="none_weigh"),
        drawing("with top-p, all columns weigh", "filtered", rows, vocab, weigh="all_weigh"),
        *(delta(requests, 32, 4, 16) for requests in (64, 1)),
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

"""Machine code of the kernels as nvdisasm prints it: blocks, loops, and the walk that a warp takes through them.

A walk is a way through one turn of a loop, or through a whole kernel, that issues as many of the wanted instructions as any way does,
of those the fewest unwanted ones, and of those the fewest in all. Every loop within it is taken once. An instruction whose predicate
is false counts: it takes an issue slot like any other. What cannot be followed (indirect branches, calls on the walk, loops with two
entries) is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Kinds of instructions, by how their opcode begins; the first that fits. What fits none is integer work.
KINDS = {
    "tensor": r"HMMA|HGMMA|IMMA|QGMMA",
    "global": r"LDG|STG|ATOMG|ATOM\b|RED\b|LD\b|ST\b|CCTL|UBLKCP",
    "shared": r"LDS|STS|ATOMS|SHFL|VOTE|REDUX|MATCH",
    "float": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSET|FCHK|F2FP|DADD|DMUL|DFMA|DSET|HADD|HMUL|HFMA|HSET",
    "special": r"MUFU|I2F|F2I|F2F|FRND|I2I|POPC|FLO|BREV|S2R|S2UR|CS2R",
    "control": r"BRA|BSSY|BSYNC|BREAK|BAR|WARPSYNC|EXIT|CALL|RET|NOP|DEPBAR|LDGDEPBAR|LDC|ULDC|ERRBAR|MEMBAR|NANOSLEEP|YIELD|BMOV",
    "integer": r"",
}
# They begin like memory accesses.
_CONTROL = re.compile(KINDS["control"])


class Unclear(Exception):
    """The code has a shape that no walk can be read off."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `functions` are those of the source it was inlined from, the innermost first."""

    opcode: str
    predicate: str
    operands: str
    functions: tuple[str, ...]

    @property
    def kind(self) -> str:
        if _CONTROL.match(self.opcode):
            return "control"
        return next(kind for kind, pattern in KINDS.items() if re.match(pattern, self.opcode))


@dataclass
class Block:
    """Instructions that follow each other, and the blocks that may follow them; `leaves` if the kernel may end here."""

    code: list[Instruction] = field(default_factory=list)
    follow: list[int] = field(default_factory=list)
    leaves: bool = False


_LABEL = re.compile(r"^([.$\w]+):")
_CODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_LEAVING = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")
_TARGET = re.compile(r"`\(([.$\w]+)\)")


def sections(text: str) -> dict[str, list[str]]:
    """Lines of every kernel's section, by the kernel's name."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("//-----"):
            name = re.search(r"\.text\.(\w+)", line)
            lines = found.setdefault(name[1], []) if name else None
        elif lines is not None:
            lines.append(line)
    return found


class Source:
    """Which function a line of a source file belongs to: the last one defined at or above it."""

    _DEFINITION = re.compile(
        r"^(?: {4})?(?:template.*> )?(?:static )?(?:DFLASH_HD|__device__|extern \"C\" __global__)\b.*?(\w+)\("
    )

    def __init__(self, folder: Path) -> None:
        self._functions: dict[str, list[str]] = {}
        for path in sorted(folder.glob("*.cu*")):
            names, name = [], ""
            for line in path.read_text(encoding="utf-8").splitlines():
                if found := self._DEFINITION.match(line):
                    name = found[1]
                names.append(name)
            self._functions[path.name] = names

    def function(self, file: str, line: int) -> str:
        names = self._functions.get(Path(file).name, [])
        return names[line - 1] if line <= len(names) else ""


def parse(lines: Iterable[str], source: Source) -> list[Block]:
    """Blocks of one kernel in the order of their addresses, the entry first."""
    blocks, labels, targets = [Block()], {}, {}
    places: list[str] = []
    told = False  # the lines above the next instruction say where it comes from

    def cut() -> None:
        if blocks[-1].code:
            blocks.append(Block())

    for line in lines:
        if "//##" in line:
            if not told:
                places, told = [], True
            if place := _PLACE.search(line):
                places.append(source.function(place[1], int(place[2])))
            continue
        if label := _LABEL.match(line):
            cut()
            labels[label[1]] = len(blocks) - 1
            continue
        if not (found := _CODE.match(line)):
            continue
        told = False
        predicate, opcode, operands = found[1] or "", found[2], found[3].strip()
        block = blocks[-1]
        block.code.append(Instruction(opcode, predicate, operands, tuple(places)))
        if opcode.startswith(_LEAVING):
            if listed := re.search(r'BRANCH_TARGETS ([^"]+)"', line):
                targets[len(blocks) - 1] = listed[1].split(",")
            elif target := _TARGET.search(operands):
                targets[len(blocks) - 1] = [target[1]]
            elif opcode.startswith(("BR", "J")):
                raise Unclear(f"a branch without known targets: {opcode} {operands}")
            block.leaves = opcode.startswith(("EXIT", "RET"))
            # A second condition may stand among the operands: "BRA.DIV UR4, ..", "BRA P1, ..".
            if predicate or ".DIV" in opcode or re.match(r"!?U?[PR]\d|~", operands):
                block.follow.append(len(blocks))
            cut()
    if not blocks[-1].code:
        blocks.pop()
    for index, block in enumerate(blocks):
        last = block.code[-1].opcode if block.code else ""
        if not last.startswith(_LEAVING) and index + 1 < len(blocks):
            block.follow.append(index + 1)
        for target in targets.get(index, []):
            if target not in labels:
                raise Unclear(f"a branch to {target}, which is not in the kernel")
            block.follow.append(labels[target])
        block.follow = sorted({follower for follower in block.follow if follower < len(blocks)})
    return blocks


def back_edges(blocks: list[Block]) -> set[tuple[int, int]]:
    """Edges that close a loop: to a block that every way to their start passes."""
    edges, seen, open_, stack = set(), {0}, {0}, [(0, iter(blocks[0].follow))]
    while stack:
        block, rest = stack[-1]
        follower = next(rest, None)
        if follower is None:
            stack.pop()
            open_.discard(block)
        elif follower in open_:
            edges.add((block, follower))
        elif follower not in seen:
            seen.add(follower)
            open_.add(follower)
            stack.append((follower, iter(blocks[follower].follow)))
    for start, header in edges:
        if start != header and header != 0 and start in reach(blocks, 0, without=header):
            raise Unclear(f"a loop with two entries around block {header}")
    return edges


def reach(blocks: list[Block], start: int, without: int) -> set[int]:
    """Blocks that can be reached from `start` without passing `without`."""
    seen, waiting = {start}, [start]
    while waiting:
        for follower in blocks[waiting.pop()].follow:
            if follower != without and follower not in seen:
                seen.add(follower)
                waiting.append(follower)
    return seen


def loops(blocks: list[Block]) -> dict[int, set[int]]:
    """Blocks of every loop, by its header."""
    before: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for follower in block.follow:
            before.setdefault(follower, []).append(index)
    found: dict[int, set[int]] = {}
    for start, header in back_edges(blocks):
        body = found.setdefault(header, {header})
        waiting = [start]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting.extend(before.get(block, []))
    return found


Test = Callable[[Instruction], bool]


def loop_of(blocks: list[Block], mark: Test) -> tuple[int, set[int]]:
    """Header and blocks of the smallest loop that has every marked instruction of the kernel."""
    marked = {index for index, block in enumerate(blocks) if any(map(mark, block.code))}
    if not marked:
        raise Unclear("none of the instructions that mark the loop")
    around = [(len(body), header) for header, body in loops(blocks).items() if marked <= body]
    if not around:
        raise Unclear("no loop around all of the instructions that mark it")
    header = min(around)[1]
    return header, loops(blocks)[header]


def inner_loop_of(blocks: list[Block], mark: Test) -> tuple[int, set[int]]:
    """Of the loops without a loop inside the one that has most of the marked instructions."""
    all_loops = loops(blocks)
    counted = {
        header: sum(mark(instruction) for block in body for instruction in blocks[block].code)
        for header, body in all_loops.items()
        if not any(other < body for other in all_loops.values())
    }
    header = max(counted, key=lambda header: counted[header], default=None)
    if header is None or counted[header] == 0:
        raise Unclear("no innermost loop with instructions that mark it")
    return header, all_loops[header]


def walk(
    blocks: list[Block], wanted: Test, unwanted: Test, loop: tuple[int, set[int]] | None = None
) -> list[Instruction]:
    """Instructions of a walk (see the file's head) round `loop`, or through the kernel."""
    start, body = loop if loop else (0, set(range(len(blocks))))
    closing = back_edges(blocks)
    ends = {block for block in body if ((block, start) in closing if loop else blocks[block].leaves)}
    order, state, stack = [], {start: 1}, [(start, iter(blocks[start].follow))]
    while stack:  # depth first: followers before those they follow
        block, rest = stack[-1]
        follower = next((f for f in rest if f in body and (block, f) not in closing and f not in state), None)
        if follower is None:
            order.append(block)
            stack.pop()
        else:
            state[follower] = 1
            stack.append((follower, iter(blocks[follower].follow)))
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for block in order:
        code = blocks[block].code
        own = (-sum(map(wanted, code)), sum(map(unwanted, code)), len(code))
        ways = [(best[f][0], f) for f in blocks[block].follow if f in best and (block, f) not in closing and f in body]
        rest = min(ways, default=None)
        if block in ends and (rest is None or (0, 0, 0) <= rest[0]):
            best[block] = own, None
        elif rest is not None:
            best[block] = (own[0] + rest[0][0], own[1] + rest[0][1], own[2] + rest[0][2]), rest[1]
    if start not in best:
        raise Unclear("no way through")
    code, at = [], start
    while at is not None:
        code += blocks[at].code
        at = best[at][1]
    if called := next((i for i in code if i.opcode.startswith("CALL")), None):
        raise Unclear(f"a call on the walk: {called.operands}")
    return code

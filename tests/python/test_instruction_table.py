"""How instructions are counted in machine code, what it refuses, and whether the committed table says what its own model says."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def sass():
    import sass

    return sass


@pytest.fixture
def table():
    import instruction_table

    return instruction_table


def listing(*lines: str) -> list[str]:
    """A kernel as nvdisasm prints it: labels end with a colon."""
    return [line if line.endswith(":") else f"        /*0000*/                   {line} ;" for line in lines]


# A loop with a masked way of three instructions, a short one of one, and a copying loop of two instructions inside.
KERNEL = (
    "MOV R1, R2",
    ".L_top:",
    "HMMA.16816.F32.BF16 R4, R5, R6, R4",
    "@P0 BRA `(.L_short)",
    "FSEL R1, R2, R3, P1",
    "FSEL R1, R2, R3, P1",
    "BRA `(.L_copy)",
    ".L_short:",
    "FMUL R1, R2, R3",
    ".L_copy:",
    "IMAD R1, R2, R3, R4",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "@P2 BRA `(.L_copy)",
    "HMMA.16816.F32.BF16 R4, R5, R6, R4",
    "@!P3 BRA `(.L_top)",
    "EXIT",
)


def opcodes(code) -> list[str]:
    return [instruction.opcode.split(".")[0] for instruction in code]


def test_a_walk_takes_the_short_way_round_the_loop(sass, table):
    blocks = sass.parse(listing(*KERNEL), sass.Source(ROOT / "cuda"))
    walk = table.Walk("k", "w", "tile", "HMMA|LDGSTS", loop="HMMA")
    assert opcodes(table.count(blocks, walk)) == ["HMMA", "BRA", "FMUL", "IMAD", "LDGSTS", "BRA", "HMMA", "BRA"]
    assert opcodes(table.count(blocks, table.Walk("k", "w", "tile", "FSEL", loop="HMMA"))).count("FSEL") == 2


def test_the_loop_inside_is_turned_as_often_as_the_copies_need(sass, table):
    blocks = sass.parse(listing(*KERNEL), sass.Source(ROOT / "cuda"))
    code = opcodes(table.count(blocks, table.Walk("k", "w", "tile", "HMMA|LDGSTS", loop="HMMA", issued=("LDGSTS", 5))))
    assert code.count("LDGSTS") == 5 and code.count("IMAD") == 5 and code.count("HMMA") == 2 and len(code) == 5 + 3 * 5
    straight = [line for line in KERNEL if "P2" not in line]
    blocks = sass.parse(listing(*straight), sass.Source(ROOT / "cuda"))
    with pytest.raises(sass.Unclear, match="1 LDGSTS on the walk, 5 expected"):
        table.count(blocks, table.Walk("k", "w", "tile", "HMMA|LDGSTS", loop="HMMA", issued=("LDGSTS", 5)))


def test_of_the_loops_inside_the_one_with_most_of_it_is_walked(sass, table):
    other = [".L_more:", "LDGSTS.E.BYPASS.128 [R1]", "LDGSTS.E.BYPASS.128 [R1]", "@P2 BRA `(.L_more)"]
    blocks = sass.parse(listing(*KERNEL[:-3], *other, *KERNEL[-3:]), sass.Source(ROOT / "cuda"))
    walk = table.Walk("k", "w", "tile", "LDGSTS", loop="LDGSTS", inner=True)
    assert opcodes(table.count(blocks, walk)) == ["LDGSTS", "LDGSTS", "BRA"]
    with pytest.raises(sass.Unclear, match="no innermost loop"):
        table.count(blocks, table.Walk("k", "w", "tile", "FSEL", loop="FSEL", inner=True))


@pytest.mark.parametrize(
    ("lines", "loop", "why"),
    [
        (["HMMA R1, R2, R3, R4", "EXIT"], "HMMA", "no loop around"),
        (KERNEL, "IMMA", "none of the instructions that mark"),
        ([".L_a:", "BRA `(.L_b)", "EXIT"], "", "not in the kernel"),
        (["BRX R2 -0x10", "EXIT"], "", "without known targets"),
        (["HMMA R1, R2, R3, R4", "CALL.REL.NOINC `(.L_a)", "EXIT"], "", "a call on the walk"),
        (["@P0 BRA `(.L_b)", ".L_a:", "HMMA R1", "@P1 BRA `(.L_c)", ".L_b:", "FMUL R1", "BRA `(.L_a)", ".L_c:", "EXIT"], "HMMA", "two entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(sass, table, lines, loop, why):
    with pytest.raises(sass.Unclear, match=why):
        table.count(
            sass.parse(listing(*lines), sass.Source(ROOT / "cuda")), table.Walk("k", "w", "tile", "HMMA", loop=loop)
        )


def test_a_kernel_that_is_gone_ends_the_program(table):
    with pytest.raises(SystemExit, match="no such kernel"):
        table.count_all("", ROOT / "cuda")


def test_instructions_know_the_functions_they_come_from(sass):
    names = sass.Source(ROOT / "cuda")
    lines = (ROOT / "cuda" / "common.cuh").read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines, 1) if "return __fmul_rn(a, b)" in line)
    place = [f'\t//## File "/anywhere/cuda/common.cuh", line {at}']
    (block,) = sass.parse([*place, *listing("FMUL R1, R2, R3", "EXIT")], names)
    assert block.code[0].functions == ("mul",)


def test_kinds_cover_what_begins_alike(sass):
    kinds = {
        opcode: sass.Instruction(opcode, "", "", ()).kind
        for opcode in ("LDGSTS.E", "LDGDEPBAR", "LDSM.16", "LDC.64", "STS")
    }
    assert list(kinds.values()) == ["global", "control", "shared", "control", "shared"]


def test_only_more_instructions_are_worse(table):
    few = {("k", "w"): ("tile", {"tensor": 1, "float": 2})}
    many = {("k", "w"): ("tile", {"tensor": 1, "float": 3})}
    assert table.differences(few, many) == (["k, w: instructions 3 -> 4"], [])
    assert table.differences(many, few) == ([], ["k, w: instructions 4 -> 3"])
    assert table.differences(few, {}) == (["k, w: in the table, not counted"], [])
    assert table.differences({}, few) == (["k, w: counted, not in the table"], [])


def test_the_committed_table_is_what_its_counts_and_the_registers_give(table, monkeypatch):
    import kernel_table

    text = (ROOT / "cuda" / "instructions.txt").read_text(encoding="utf-8")
    counts = table.parse_text(text)
    assert set(counts) == {(walk.kernel, walk.name) for walk in table.WALKS}
    registers = (ROOT / "cuda" / "registers.txt").read_text(encoding="utf-8")
    nvcc = text.split("nvcc ")[1].split(";")[0]
    assert table.to_text(counts, kernel_table.usages(kernel_table.parse_table(registers)), nvcc) == text


def test_shared_memory_is_that_of_the_launches(table):
    """The formulae of params.h."""
    text = (ROOT / "cuda" / "params.h").read_text(encoding="utf-8")
    body = text.split("block_attention_launch")[1].split("}")[0]
    assert "shared = 2 * uint32_t(head_dim) * (uint32_t(rows) + 4 * keys) + 2 * keys * 16;" in body
    assert [table.attention_shared(dim) for dim in (64, 128, 256)] == [43008, 83968, 99328]
    assert table.attention_shared(128, table.WIDE_ROWS) == 100352
    assert f"#define ATTENTION_ROWS {table.ROWS}\n#define ATTENTION_WIDE_ROWS {table.WIDE_ROWS}\n" in text
    assert f"#define ATTENTION_WIDE_BLOCKS {table.WIDE_BLOCKS}\n" in text
    assert f"#define ATTENTION_MERGED {table.MERGED}" in text
    cuda = (ROOT / "python" / "dflash_rs" / "cuda.py").read_text(encoding="utf-8")
    assert f"SPLIT_KEYS = {table.SPLIT_KEYS}" in cuda and f"_MERGED_SPLITS = {table.MERGED}" in cuda
    body = text.split("delta_rule_launch")[1].split("}")[0]
    assert "floats = DELTA_STAGE * (2 * uint32_t(p.key_dim + 8) + DELTA_COLUMNS + 2);" in body
    assert f"#define DELTA_COLUMNS {table.DELTA_COLUMNS}" in text and "#define DELTA_STAGE 16" in text
    assert table.delta_shared(128) == 4 * 16 * (2 * 136 + 64 + 2)

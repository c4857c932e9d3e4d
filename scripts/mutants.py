"""Would the tests notice? Small faults, one at a time, in the Rust core or in the kernels' logic as the host compiles it.

    python scripts/mutants.py rust src/kv src/verify     (cargo-mutants chooses the faults)
    python scripts/mutants.py cuda cuda/logic_tree.cuh   (chosen here: operators, constants, conditions, results, statements)

Building the crate once per fault would take a day. So all faults are compiled in at once, each behind a switch, and the tests run
with one switch on. A first run notes which tests reach which fault; a fault is given only to those, the quickest first. What does
not compile behind a switch is set aside and counted; for Rust, `cargo mutants --re` tries those by themselves.

Limits are in processor time, so a busy machine changes no result. Random tests have a fixed seed.

In one file because a script is run by its path and belongs to no package.

Known to make no difference, with the reason: .cargo/mutants.toml for Rust, scripts/mutants-cuda.txt for the kernels.
"""

import argparse
import concurrent.futures
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "mutants"
TOOLS = ROOT / "target" / "tools"

RUST_TESTS = (
    "kv engine engine_model rounds lossless ratio rng sampling stats tree draft drawn draws edited lookup".split()
)
CUDA_TESTS = ["cuda_host"]
COPIED = "src tests cuda benches docs/architecture.md build.rs Cargo.toml Cargo.lock rust-toolchain.toml".split()
NONE, RECORD = 2**32 - 1, 2**32 - 2
# Shares of the kernels' random cases with which a fault is looked at, until one notices it.
SHARES = [0.01, 0.1, 1]

RUST_SWITCH = """
#[allow(missing_docs)]
mod mutants_switch {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    static ACTIVE: AtomicU32 = AtomicU32::new(u32::MAX - 2);
    static SEEN: [AtomicU32; COUNT] = [const { AtomicU32::new(0) }; COUNT];
    pub fn on(fault: u32) -> bool {
        let active = ACTIVE.load(Relaxed);
        if active < u32::MAX - 2 { return active == fault; }
        other(fault, active)
    }
    #[cold]
    fn other(fault: u32, active: u32) -> bool {
        if active == u32::MAX - 2 {
            let asked = std::env::var("MUTANT").ok().and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
            ACTIVE.store(asked, Relaxed);
            return on(fault);
        }
        let seen = &SEEN[fault as usize];
        if active == u32::MAX - 1 && seen.load(Relaxed) == 0 && seen.swap(1, Relaxed) == 0 {
            use std::io::Write;
            let path = std::env::var("MUTANTS_REACHED").unwrap();
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            file.write_all(format!("{fault}\\n").as_bytes()).unwrap();
        }
        false
    }
}
"""

CUDA_SWITCH = """
extern "C" {
extern uint32_t mutants_active;
void mutants_note(uint32_t fault);
}
inline bool mutants_on(uint32_t fault) {
    if (mutants_active == 0xfffffffeu) mutants_note(fault);
    return mutants_active == fault;
}
"""

CUDA_SWITCH_BODY = """
#include <stdio.h>
#include <stdlib.h>
extern "C" {
uint32_t mutants_active = getenv("MUTANT") ? uint32_t(strtoul(getenv("MUTANT"), nullptr, 10)) : 0xffffffffu;
void mutants_note(uint32_t fault) {
    static bool seen[COUNT];
    if (seen[fault] || __atomic_exchange_n(&seen[fault], true, __ATOMIC_RELAXED)) return;
    FILE* file = fopen(getenv("MUTANTS_REACHED"), "a");
    fprintf(file, "%u\\n", fault);
    fclose(file);
}
}
"""


@dataclass
class Fault:
    """One change of the source: `text` in place of bytes `start..end` of `path`."""

    number: int
    name: str
    path: str
    start: int
    end: int
    kind: str  # expression | condition (negated) | entry (runs first in a body) | statement (left out) | arm | guard
    text: str
    state: str = ""
    by: str = ""


@dataclass
class Test:
    """A test of one test program."""

    program: Path
    name: str
    seconds: float = 0.0
    reached: set = field(default_factory=set)


# ---- choosing ---------------------------------------------------------------------------------------------------------


def parser_of(language):
    """tree-sitter's parser for "rust" or "cpp"."""
    sys.path.insert(0, str(TOOLS / "python"))
    import tree_sitter  # noqa: PLC0415

    grammar = __import__(f"tree_sitter_{language}")
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def walk(node):
    """A node and everything below it."""
    yield node
    for child in node.children:
        yield from walk(child)


def rust_faults(paths):
    """What cargo-mutants would try, as edits that can stand beside each other."""
    command = [str(TOOLS / "bin" / "cargo-mutants"), "mutants", "--list", "--json"]
    for path in paths:
        command += ["--file", f"{path}/**" if (ROOT / path).is_dir() else path]
    listed = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    parser = parser_of("rust")
    faults, aside = [], []
    nodes = {}
    for mutant in listed:
        path = mutant["file"]
        if path not in nodes:
            source = (ROOT / path).read_bytes()
            offsets = [0]
            for line in source.split(b"\n"):
                offsets.append(offsets[-1] + len(line) + 1)
            nodes[path] = (source, offsets, list(walk(parser.parse(source).root_node)))
        source, offsets, all_nodes = nodes[path]
        span = mutant["span"]

        def offset(place, source=source, offsets=offsets):
            line = source[offsets[place["line"] - 1] : offsets[place["line"]]].decode()
            return offsets[place["line"] - 1] + len(line[: place["column"] - 1].encode())

        start, end = offset(span["start"]), offset(span["end"])
        made = rust_fault(mutant, source, all_nodes, start, end)
        if made is None:
            aside.append(mutant["name"])
        else:
            faults.append(Fault(len(faults), mutant["name"], path, *made))
    return faults, aside


def rust_fault(mutant, source, nodes, start, end):
    """`(start, end, kind, text)`, or None for what has no such form."""
    genre, text = mutant["genre"], mutant["replacement"]
    if genre == "FnValue":
        if "-> impl " in mutant["name"]:
            return None  # the body's other result would have another type
        return start, start, "entry", f"return {text};"
    if genre == "BinaryOperator":
        for node in nodes:
            if node.type in ("binary_expression", "compound_assignment_expr"):
                operator = node.child_by_field_name("operator") or node.children[1]
                if operator.start_byte == start:
                    left, right = node.children[0].text.decode(), node.children[-1].text.decode()
                    return node.start_byte, node.end_byte, "expression", f"({left}) {text} ({right})"
    if genre == "UnaryOperator":
        for node in nodes:
            if node.type == "unary_expression" and node.start_byte == start:
                return node.start_byte, node.end_byte, "expression", f"({node.children[-1].text.decode()})"
    if genre == "MatchArmGuard":
        return start, end, "expression", text
    if genre == "MatchArm":
        for node in nodes:
            if node.type == "match_arm" and node.start_byte == start:
                pattern = node.child_by_field_name("pattern")
                condition = pattern.child_by_field_name("condition")
                if condition is not None:
                    return condition.start_byte, condition.end_byte, "guard", ""
                return pattern.end_byte, pattern.end_byte, "arm", ""
    return None


SWAPPED = {
    "+": ["-"], "-": ["+"], "*": ["+"], "/": ["*"], "%": ["/"],
    "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="],
    "&&": ["||"], "||": ["&&"], "&": ["|"], "|": ["&"], "^": ["|"], "<<": [">>"], ">>": ["<<"],
    "+=": ["-="], "-=": ["+="], "*=": ["+="], "/=": ["*="], "|=": ["&="], "&=": ["|="], "<<=": [">>="], ">>=": ["<<="],
}  # fmt: skip

# Fixed when compiled, or not what a function computes.
CONSTANT = {
    "template_argument_list", "template_parameter_list", "enumerator_list", "static_assert_declaration", "array_declarator",
    "preproc_def", "preproc_include", "preproc_call", "case_statement", "parameter_list", "alignas_qualifier",
}  # fmt: skip
RESULTS = {"bool": ["true", "false"], "float": ["0.0f", "1.0f"], "double": ["0.0", "1.0"]}
RESULTS |= dict.fromkeys("int32_t uint32_t int64_t uint64_t uint16_t".split(), ["0", "1"])


def cuda_faults(paths):
    """Operators, integer and float constants, conditions, results and statements of the functions in these headers."""
    parser = parser_of("cpp")
    faults = []
    for path in paths:
        source = (ROOT / path).read_bytes()
        seen = source.replace(b"DFLASH_HD", b"inline   ").replace(b"DFLASH_UNROLL", b" " * 13)
        cuda_visit(parser.parse(seen).root_node, str(path), "", "", faults)
    return faults, []


def cuda_visit(node, path, function, result, faults):
    """Adds the faults of a node and what is below it."""

    def add(at, kind, text, what):
        number = len(faults)
        row, column = at.start_point
        name = f"{path}:{row + 1}:{column + 1}: {what} in {function}"
        place = at.start_byte + 1 if kind == "entry" else at.start_byte
        faults.append(Fault(number, name, path, place, place if kind == "entry" else at.end_byte, kind, text))

    def said(other):
        return " ".join(other.text.decode().split())

    if node.type in CONSTANT or (node.type == "declaration" and "constexpr" in said(node).split("=")[0].split()):
        return
    if node.type == "preproc_if" and said(node.child_by_field_name("condition")) == "DFLASH_ON_DEVICE":
        if node.child_by_field_name("alternative"):
            cuda_visit(node.child_by_field_name("alternative"), path, function, result, faults)
        return
    if node.type == "preproc_ifdef" and said(node.child_by_field_name("name")) == "__CUDACC__":
        return
    if node.type == "function_definition":
        declarator = node.child_by_field_name("declarator")
        while declarator.type != "function_declarator" and declarator.child_by_field_name("declarator"):
            declarator = declarator.child_by_field_name("declarator")
        name = declarator.child_by_field_name("declarator")
        function = said(name) if name else "?"
        kind = node.child_by_field_name("type")
        result = said(kind) if kind else ""
        body = node.child_by_field_name("body")
        if body is None:
            return
        if result == "void":
            add(body, "entry", "return;", "nothing done")
        cuda_visit(body, path, function, result, faults)
        return
    if function:
        if node.type in ("binary_expression", "assignment_expression"):
            operator = node.child_by_field_name("operator").type
            left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
            for other in SWAPPED.get(operator, []):
                text = f"({left.text.decode()}) {other} ({right.text.decode()})"
                add(node, "expression", text, f"`{said(node)}` with {other} for {operator}")
        elif node.type == "number_literal" and node.parent.type not in ("initializer_pair",):
            literal = said(node)
            real = "." in literal or (("e" in literal or "f" in literal) and not literal.startswith("0x"))
            text = f"({literal} + 1)" if not real else f"({literal} * 2 + ({literal} == 0))"
            add(node, "expression", text, f"`{literal}` changed in `{said(node.parent)[:70]}`")
        elif node.type == "unary_expression" and node.child_by_field_name("operator").type in "!-~":
            argument = node.child_by_field_name("argument")
            if argument.type != "number_literal":
                add(node, "expression", f"({argument.text.decode()})", f"`{said(node)}` without its operator")
        elif node.type in ("if_statement", "conditional_expression"):
            condition = node.child_by_field_name("condition")
            if condition.type == "condition_clause":
                condition = condition.child_by_field_name("value")
            if condition.type not in ("binary_expression", "declaration", "unary_expression"):
                add(condition, "condition", "", f"`{said(condition)}` negated")
        elif node.type == "return_statement" and result in RESULTS and len(node.children) > 2:
            value = node.children[1]
            for other in RESULTS[result]:
                if said(value) != other and said(value) not in ("0", "1"):
                    add(value, "expression", other, f"result {other} for `{said(value)[:70]}`")
        elif node.type == "continue_statement" or (
            node.type == "expression_statement"
            and node.children[0].type in ("assignment_expression", "call_expression")
        ):
            add(node, "statement", "", f"`{said(node)[:70]}` left out")
    for child in node.children:
        cuda_visit(child, path, function, result, faults)


# ---- writing all of them into one source ------------------------------------------------------------------------------


def render(source, faults, rust):
    """The text of a file with every one of `faults` behind its switch."""
    sites = {}
    for fault in faults:
        sites.setdefault((fault.start, fault.end, fault.kind), []).append(fault)
    order = sorted(sites, key=lambda site: (site[0], -site[1], site[2] != "entry"))

    def on(fault):
        return f"crate::mutants_switch::on({fault.number})" if rust else f"mutants_on({fault.number}u)"

    def mark(fault, text):
        return f"/*<{fault.number}*/{text}/*{fault.number}>*/"

    def span(start, end, first, last):
        """Source bytes `start..end`; order[first..last] lie within."""
        out, at = [], start
        while first < last:
            site = order[first]
            inner = first + 1
            while inner < last and order[inner][0] < site[1] and order[inner][1] <= site[1]:
                inner += 1
            out.append(source[at : site[0]].decode())
            out.append(written(site, span(site[0], site[1], first + 1, inner)))
            at, first = site[1], inner
        out.append(source[at:end].decode())
        return "".join(out)

    def written(site, inside):
        here = sites[site]
        kind = site[2]
        if kind == "entry":
            lines = (mark(f, f"if {on(f)} {{ {f.text} }}" if rust else f"if ({on(f)}) {f.text}") + "\n" for f in here)
            return "".join(lines) + inside
        if kind == "arm":
            return " if " + " && ".join(mark(f, f"!{on(f)}") for f in here)
        if kind == "guard":
            return " && ".join(mark(f, f"!{on(f)}") for f in here) + f" && ({inside})"
        if kind == "statement":
            return "{ if (!" + mark(here[0], on(here[0])) + ") " + inside + " }"
        if kind == "condition":
            return "(" + mark(here[0], on(here[0])) + f" != bool({inside}))"
        if rust:
            return "(" + "".join(f"if {on(f)} {{ {mark(f, f.text)} }}\nelse " for f in here) + "{ " + inside + " })"
        return "(" + "".join(f"{on(f)} ? {mark(f, f.text)}\n: " for f in here) + "(" + inside + "))"

    return span(0, len(source), 0, len(order))


def write_tree(tree, faults, rust):
    """A copy of the package with the faults in it. What has not changed is not written, so that little is built again."""
    files = {}
    for name in COPIED:
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                files[str(path.relative_to(ROOT))] = path.read_bytes()
    by_path = {}
    for fault in faults:
        by_path.setdefault(fault.path, []).append(fault)
    for path, here in by_path.items():
        text = render(files[path], [f for f in here if f.state != "unbuildable"], rust)
        # What a switch decides is not known when compiling.
        files[path] = (re.sub(r"\bconst fn\b", "fn", text) if rust else text).encode()
    count = str(max((f.number for f in faults), default=0) + 1).encode()
    if rust:
        files["src/lib.rs"] += RUST_SWITCH.encode().replace(b"COUNT", count)
    else:
        for path, before, switch in [
            ("cuda/common.cuh", b"namespace dflash {", CUDA_SWITCH),
            ("cuda/host_check.cpp", b"using namespace dflash;", CUDA_SWITCH_BODY),
        ]:
            files[path] = files[path].replace(before, switch.encode().replace(b"COUNT", count) + before, 1)
    for path, content in files.items():
        copy = tree / path
        if not copy.exists() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    for folder in ("src", "tests", "cuda"):
        for copy in (tree / folder).rglob("*"):
            if copy.is_file() and str(copy.relative_to(tree)) not in files:
                copy.unlink()


def blamed(tree, output, faults):
    """The faults at the places that a compiler complains about."""
    places = set(re.findall(r"((?:src|cuda)/[\w/.]+):(\d+):\d+", output))
    by_number = {f.number: f for f in faults}
    found = set()
    for path, line in places:
        if not (tree / path).exists():
            continue
        at = int(line)
        lines = (tree / path).read_text().split("\n")
        if at > len(lines):
            continue
        before, here = "\n".join(lines[: at - 1]), lines[at - 1]
        opened = {int(n) for n in re.findall(r"/\*<(\d+)\*/", before)} - {
            int(n) for n in re.findall(r"/\*(\d+)>\*/", before)
        }
        found |= opened | {int(n) for n in re.findall(r"/\*<(\d+)\*/", here)}
        if not found and " match " in f" {here}":  # patterns that do not cover everything once an arm may be missing
            body = "\n".join(lines[at : at + 60])
            found |= {int(n) for n in re.findall(r"/\*<(\d+)\*/", body) if by_number[int(n)].kind in ("arm", "guard")}
    return [by_number[n] for n in found if n in by_number and by_number[n].state != "unbuildable"]


def build(tree, faults, rust, tests):
    """Builds the test programs, setting aside faults that do not compile. Returns the programs."""
    env = os.environ | {
        "CARGO_TARGET_DIR": str(tree / "target"),
        "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
        "CARGO_PROFILE_DEV_DEBUG": "0",
        "CARGO_INCREMENTAL": "1",
        "DFLASH_CUDA": "0",
        "CXXFLAGS": "-w -fpermissive -Wno-narrowing",
        "RUSTFLAGS": "--cap-lints warn",
    }
    command = ["cargo", "test", "--locked", "--no-run", "--message-format=json-diagnostic-short"]
    command += (["--lib"] if rust else []) + [part for test in tests for part in ("--test", test)]
    # Found by an earlier run: one round instead of several.
    aside = WORK / f"unbuildable-{tree.name}.json"
    names = set(json.loads(aside.read_text())) if aside.exists() else set()
    for fault in faults:
        if fault.name in names:
            fault.state = "unbuildable"
    for _ in range(40):
        write_tree(tree, faults, rust)
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
        messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0:
            built = [
                m
                for m in messages
                if m.get("reason") == "compiler-artifact" and m.get("executable") and m["profile"]["test"]
            ]
            return [Path(m["executable"]) for m in built]
        errors = [
            m["message"]["rendered"]
            for m in messages
            if m.get("reason") == "compiler-message" and m["message"]["level"].startswith("error")
        ]
        output = "\n".join(errors) if rust and errors else done.stderr + "\n".join(errors)
        guilty = blamed(tree, output, faults)
        if not guilty:
            sys.exit(f"The tree does not build:\n{output[-4000:]}")
        for fault in guilty:
            fault.state = "unbuildable"
        names |= {fault.name for fault in guilty}
        aside.write_text(json.dumps(sorted(names), indent=1))
        print(f"  {len(guilty)} do not compile behind a switch", flush=True)
    sys.exit("The tree does not build after 40 rounds")


# ---- running ----------------------------------------------------------------------------------------------------------


def run(test, tree, mutant, seconds, share, reached=None):
    """Runs one test with one fault, on a share of its random cases where it can: `(exit status, processor seconds)`."""
    env = os.environ | {
        "DFLASH_CASES": str(share),
        "MUTANT": str(mutant),
        "PROPTEST_RNG_SEED": "1",
        "PROPTEST_DISABLE_FAILURE_PERSISTENCE": "1",
        "PROPTEST_MAX_SHRINK_ITERS": "0",
        "RUST_BACKTRACE": "0",
    }
    if reached:
        env["MUTANTS_REACHED"] = str(reached)

    def limits():
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    process = subprocess.Popen(
        [test.program, "--exact", test.name, "--test-threads=1", "--quiet"],
        cwd=tree,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=limits,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def baseline(programs, tree, jobs, wanted, share):
    """Every test once, without a fault: what it reaches, and how long it takes."""
    tests = []
    for program in programs:
        listing = subprocess.run(
            [program, "--list", "--format=terse"], cwd=tree, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        tests += [
            Test(program, line.removesuffix(": test")) for line in listing.splitlines() if line.endswith(": test")
        ]
    tests = [test for test in tests if re.search(wanted, test.name)]
    notes = tree / "reached"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)

    def once(numbered):
        number, test = numbered
        note = notes / str(number)
        status, test.seconds = run(test, tree, RECORD, 600, share, note)
        if status != 0:
            sys.exit(f"{test.program.name}: {test.name} fails without a fault (exit status {status})")
        test.reached = set(map(int, note.read_text().split())) if note.exists() else set()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(once, enumerate(tests)))
    return tests


def judge(fault, tests, tree, share):
    """Runs the tests that reach a fault until one fails."""
    reaching = sorted((t for t in tests if fault.number in t.reached), key=lambda t: t.seconds)
    if not reaching:
        fault.state = "not reached"
    for test in reaching:
        status, _ = run(test, tree, fault.number, 2 + 20 * test.seconds, share)
        if status != 0:
            fault.state = "caught" if status == 101 else "caught by a crash or a limit"
            fault.by = f"{test.program.name.rsplit('-', 1)[0]}: {test.name}"
            return fault
    if reaching:
        fault.state = "MISSED"
    return fault


def judge_all(faults, tests, tree, share, jobs, last):
    """Judges faults side by side and tells which are not noticed, if this is their `last` chance. False: it was interrupted."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(judge, fault, tests, tree, share) for fault in faults]
        try:
            for count, done in enumerate(concurrent.futures.as_completed(waiting), 1):
                fault = done.result()
                if last and not fault.state.startswith("caught"):
                    print(f"{fault.state}: {fault.name}", flush=True)
                if count % 100 == 0:
                    print(f"{count} of {len(faults)} after {time.monotonic() - began:.0f} s", flush=True)
        except KeyboardInterrupt:  # what is known by then is told all the same
            pool.shutdown(cancel_futures=True)
            return False
    return True


def known(language):
    """Patterns of faults that change nothing, for the kernels. cargo-mutants leaves its own out."""
    if language == "rust":
        return []
    lines = (ROOT / "scripts/mutants-cuda.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def folder_of(path):
    """Where the table counts a file."""
    parts = Path(path).parts
    return "/".join(parts[:2]).removesuffix(".rs") if parts[0] == "src" else path


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=["rust", "cuda"])
    parser.add_argument("paths", nargs="+", help="folders or files")
    parser.add_argument("--re", default="", help="only faults whose name matches")
    parser.add_argument("--shard", default="1/1", help="K/N: the K-th of N random parts")
    parser.add_argument("--seed", type=int, default=1, help="which parts (default: 1)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", default="", help="only tests whose name matches")
    parser.add_argument(
        "--programs", help="of tests/, build and run only these, separated by commas; the library's own tests always"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="leave out tests that take longer, for a first look")
    parser.add_argument("--first", type=int, default=0, help="go on from this one, after a run that was cut short")
    parser.add_argument(
        "--looks",
        default="1-3",
        help="of the kernels' random cases 1: a hundredth, 2: a tenth, 3: all; 2: the first two, 2-3: the last",
    )
    parser.add_argument("--again", action="store_true", help="only faults that the last run did not see noticed")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    options = parser.parse_args()
    rust = options.language == "rust"
    faults, aside = (rust_faults if rust else cuda_faults)(options.paths)
    equivalent = [f for f in faults if any(pattern in f.name for pattern in known(options.language))]
    hidden = {f.number for f in equivalent}
    part, parts = map(int, options.shard.split("/"))
    chosen = [f for f in faults if f.number not in hidden and re.search(options.re, f.name)]
    random.Random(options.seed).shuffle(chosen)
    chosen = sorted(chosen[part - 1 :: parts], key=lambda f: f.number)
    results = WORK / f"{options.language}.json"
    before = {f["name"]: f for f in json.loads(results.read_text())["faults"]} if results.exists() else {}
    done = []
    if options.again:
        for fault in chosen:
            known_as = before.get(fault.name, {"state": "", "by": ""})
            if known_as["state"].startswith("caught"):
                fault.state, fault.by = known_as["state"], known_as["by"]
                done.append(fault)
        chosen = [f for f in chosen if not f.state]
    print(
        f"{len(faults)} faults, {len(equivalent)} of them known to make no difference, {len(aside)} not expressible; {len(chosen)} chosen"
    )
    if options.list:
        print("\n".join(f.name for f in chosen))
        return 0
    began = time.monotonic()
    tree = WORK / options.language
    tree.mkdir(parents=True, exist_ok=True)
    programs = RUST_TESTS if rust else CUDA_TESTS
    if options.programs is not None:
        programs = [program for program in options.programs.split(",") if program]
    programs = build(tree, chosen, rust, programs)
    print(f"built after {time.monotonic() - began:.0f} s", flush=True)
    alive = [f for f in chosen if f.state != "unbuildable" and f.number >= options.first]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A fault that nobody notices runs into every test that reaches it. Few cases find most, and the rest see all of them.
    first, last = ([1, *map(int, options.looks.split("-"))])[-2:]
    shares = [1] if rust else SHARES[first - 1 : last]
    for number, share in enumerate(shares):
        tests = baseline(programs, tree, options.jobs, options.tests, share)
        tests = [t for t in tests if t.seconds <= options.seconds]
        total, slowest = sum(t.seconds for t in tests), max(tests, key=lambda t: t.seconds)
        print(
            f"{len(alive)} faults, {len(tests)} tests, {total:.1f} s of processor time, {slowest.seconds:.1f} s of it for {slowest.name}"
            + ("" if share == 1 else f", with {share} of the cases"),
            flush=True,
        )
        finished = judge_all(alive, tests, tree, share, options.jobs, last=number == len(shares) - 1)
        alive = [f for f in alive if not f.state.startswith("caught")]
        if not finished:
            break
    table = {}
    for fault in chosen:
        fault.state = fault.state or "not run"
    for fault in done + chosen:
        row = table.setdefault(folder_of(fault.path), {})
        row[fault.state] = row.get(fault.state, 0) + 1
    for folder, row in sorted(table.items()):
        print(folder, ", ".join(f"{state} {count}" for state, count in sorted(row.items())))
    # What earlier runs found of other faults stays.
    now, there, paths = {f.name for f in chosen + done}, {f.name for f in faults}, {f.path for f in faults}
    earlier = [f for f in before.values() if f["name"] not in now and (f["path"] not in paths or f["name"] in there)]
    result = {"aside": aside, "faults": earlier + [vars(f) for f in done + chosen]}
    results.write_text(json.dumps(result, indent=1))
    print(f"{time.monotonic() - began:.0f} s; {results}")
    return 1 if any(f.state in ("MISSED", "not reached", "not run") for f in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())

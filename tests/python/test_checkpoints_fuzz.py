"""Damaged checkpoints by the hundred: each loads and works, or is refused by one of our errors; nothing else happens.

Every case is one change to one file of a pair: a value of a JSON file, a few bytes, a safetensors header. The cases follow from a seed,
so a failure can be run again: ``python tests/python/test_checkpoints_fuzz.py FOLDER FIRST COUNT`` in the environment of the tests.
``DFLASH_FUZZ=5000`` runs that many, every tenth on the bundled pair.

They run in a process of their own, with bounds on memory and processor time, a standard input that nobody may read and a standard
output on which nothing may appear.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path

CASES = int(os.environ.get("DFLASH_FUZZ", "360"))
# A case takes a tenth of a second. Seconds of processor time: a busy machine changes nothing about them.
MOST_SECONDS, MOST_BYTES = 20, 3 << 30

WHOLE = [0, -1, 1, 2, 3, 5, 64, 255, 3000, 2**16, 2**31 - 1, 2**31, 2**32, 10**12, -(10**12), 2**63, 2**64, 10**400]
REAL = [0.0, -1.0, 0.5, 1e-30, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf, 3.0]
OTHER = [
    None,
    True,
    False,
    "",
    "x",
    "0",
    "default",
    "yarn",
    [],
    [0],
    [0, 0],
    [-1],
    ["a"],
    {},
    {"a": 1},
    [[[]]],
    "\ud800",
    "\0",
    "é" * 99,
]
JUNK = WHOLE + REAL + OTHER
# Fields that are not in the bundled files, but mean something to a loader.
FIELDS = [
    "attn_implementation", "_attn_implementation", "auto_map", "quantization_config", "num_labels", "id2label", "per_layer_config",
    "fusion_config", "transformers_weights", "text_config", "is_encoder_decoder", "torch_dtype", "rope_theta", "rope_scaling",
    "sliding_window", "partial_rotary_factor", "return_dict", "output_hidden_states", "output_attentions", "pruned_heads",
    "attention_bias", "final_logit_softcapping", "is_causal", "quantization_config", "max_window_layers", "tokenizer_class",
    "add_prefix_space", "extra_special_tokens", "added_tokens_decoder", "chat_template", "model_input_names", "tokenizer_file",
    "vocab_file", "conv_kernel_size", "selector_top_k", "problem_type", "chunk_size_feed_forward", "dtype", "model_type", "architectures",
]  # fmt: skip
ROPES = ["default", "linear", "yarn", "llama3", "dynamic", "longrope", "x", 5]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U16", "BOOL", "C64", "F4", "X", 5, None]
FILES = {
    "target": ["config.json"] * 8
    + ["generation_config.json"]
    + ["model.safetensors"] * 3
    + ["model.safetensors.index.json"] * 2,
    "tokenizer": ["tokenizer.json"] * 3 + ["tokenizer_config.json"] * 2,
    "draft": ["config.json"] * 6 + ["model.safetensors"] * 3 + ["model.safetensors.index.json"],
}


def junk(draw: random.Random):
    return copy.deepcopy(draw.choice(JUNK))


def change_value(draw: random.Random, top, most_depth: int = 6):
    """Changes one value somewhere in `top`, a JSON value."""
    holder, depth = top, 0
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = draw.choice(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and depth < most_depth and draw.random() < 0.7:
            holder, depth = inner, depth + 1
            continue
        action = draw.random()
        if action < 0.15:
            del holder[key]
        elif action < 0.25 and isinstance(inner, list):
            holder[key] = inner + [junk(draw)] if draw.random() < 0.5 else inner * 2
        elif action < 0.45 and isinstance(inner, int | float) and not isinstance(inner, bool):
            holder[key] = draw.choice(
                [inner + 1, inner - 1, inner * 2, -inner, inner * 1000, float(inner), str(inner), [inner]]
            )
        else:
            holder[key] = junk(draw)
        return top
    return junk(draw)


def change_json(draw: random.Random, file: Path) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if not isinstance(values, dict) or not values:
            break
        kind = draw.random()
        if kind < 0.25:
            values[draw.choice(FIELDS)] = junk(draw)
        elif kind < 0.35 and file.name == "config.json":
            rope = {"rope_type": draw.choice(ROPES), "rope_theta": draw.choice([1e4, 1e4, *REAL])}
            rope |= {
                key: draw.choice([1.0, 2.0, 4, *JUNK])
                for key in (
                    "factor",
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                    "beta_fast",
                )
                if draw.random() < 0.8
            }
            values[draw.choice(["rope_parameters", "rope_parameters", "rope_scaling"])] = rope
        else:
            values = change_value(draw, values)
    if draw.random() < 0.02:
        values = junk(draw)
    write(file, json.dumps(values).encode("utf-8", "surrogatepass"))


def write(file: Path, data: bytes) -> None:
    file.unlink()  # it may be a link to the pair's own
    file.write_bytes(data)


def change_bytes(draw: random.Random, file: Path, most: int) -> None:
    data = bytearray(file.read_bytes())
    kind = draw.random()
    if kind < 0.25:
        del data[draw.randrange(len(data)) :]
    elif kind < 0.35:
        start = draw.randrange(min(most, len(data)))
        data[start:start] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
    elif kind < 0.45:
        data = bytearray(draw.choice([b"[", b'{"a":', b'"', b"\xff\xfe", b"9"]) * draw.choice([1, 1000, 100_000]))
    else:
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(min(most, len(data)))] = draw.randrange(256)
    write(file, bytes(data))


def change_header(draw: random.Random, file: Path) -> None:
    """Changes the header of a safetensors file; half of the time its length stays true."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = draw.choice([n for n in header if n != "__metadata__"])
    kind = draw.random()
    if kind < 0.3:
        header[name]["dtype"] = draw.choice(DTYPES)
    elif kind < 0.45:
        header[name]["shape"] = draw.choice(
            [header[name]["shape"][::-1], [*header[name]["shape"], 1], [0], [2**40], [-1], []]
        )
    elif kind < 0.55:
        header[draw.choice([name + ".x", "x", name.removeprefix("model."), "", "\0"])] = header.pop(name)
    elif kind < 0.65:
        header[name]["data_offsets"] = draw.choice([[0, 0], [0, len(body)], [5, 1], [0, 2**63], [-1, 4]])
    else:
        header = change_value(draw, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if draw.random() < 0.8 else draw.choice([0, 1, size, len(text) + 1, 2**40, 2**64 - 1])
    write(file, struct.pack("<Q", length) + text + body)


def make_index(file: Path) -> None:
    """Makes the weights beside `file` a shard of it."""
    data = (file.parent / "model.safetensors").read_bytes()
    names = [n for n in json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) if n != "__metadata__"]
    (file.parent / "model.safetensors").rename(file.parent / "one.safetensors")
    values = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    file.write_text(json.dumps(values))


def damage(number: int, pair: Path, folder: Path) -> tuple[str, Path, str]:
    """Makes case `number` in `folder`: what it is about, where it lies, and a few words about it."""
    draw = random.Random(number)
    part = draw.choice(["target", "target", "target", "tokenizer", "draft", "draft"])
    where = folder / ("draft" if part == "draft" else "target")
    shutil.copytree(pair / where.name, where, copy_function=os.link)
    name = draw.choice(FILES[part])
    file = where / name
    if name.endswith("index.json"):
        make_index(file)
    kind = draw.random()
    if kind < 0.2:
        how, most = "bytes", 2000
        change_bytes(draw, file, most)
    elif name == "model.safetensors":
        how = "header"
        change_header(draw, file)
    else:
        how = "values"
        change_json(draw, file)
    return part, where, f"{part}/{name}, {how}"


# ---- the process that runs them ----------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong


class NoInput:
    def __getattr__(self, name):
        raise AssertionError("standard input was asked for")


def use(part: str, where: Path, target) -> None:
    """Loads what was damaged and lets it work."""
    from models_helpers import greedy_loop

    from dflash_rs import LLM, SamplingParams
    from dflash_rs.models.loader import load_draft, read_draft_config

    if part == "draft":
        read_draft_config(where)
        draft = load_draft(where, target)
        tokens, _ = greedy_loop(target, draft, [5, 6, 7], 3, 4, draft.config.block_size)
        assert len(tokens) == 6
        return
    with LLM(where, draft=None, device="cpu", num_pages=16, max_running=1) as engine:
        output = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3))[0]
        assert output.finish_reason in ("length", "stop", "error") and isinstance(output.text, str)
        assert isinstance(engine.encode("def f(x):"), list)


def run(folder: Path, first: int, count: int) -> None:
    """Runs cases and writes one line about each into `folder`/results."""
    from dflash_rs import DflashError
    from dflash_rs.config import assets
    from dflash_rs.models.target import TargetModel

    pairs = [folder / "pair", assets()]
    targets = [TargetModel.load(pair / "target") for pair in pairs]
    sys.stdin = NoInput()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if os.name == "posix" else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
    seconds = math.ceil(time_used()) + 120 + 3 * count
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.signal(signal.SIGPROF, too_long)
    with open(folder / "results", "a", encoding="utf-8") as results:

        def tell(*what) -> None:
            results.write(json.dumps(what) + "\n")
            results.flush()

        for number in range(first, first + count):
            case = folder / f"case-{number}"
            which = int(number % 10 == 9 and "DFLASH_FUZZ" in os.environ)
            part, where, about = damage(number, pairs[which], case)
            tell(number, about, "begun")
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            try:
                use(part, where, targets[which])
                verdict = "works"
            except DflashError as error:
                verdict = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"long message: {error}"
            except BaseException:
                verdict = traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            tell(number, about, verdict)
            shutil.rmtree(case)


def time_used() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def test_a_damaged_checkpoint_works_or_is_refused_by_one_of_our_errors(tmp_path):
    import checkpoint_helpers as helpers

    helpers.make_pair(tmp_path / "pair")
    (tmp_path / "stdin").write_text("y\n" * 1000)
    with open(tmp_path / "stdin", "rb") as stdin:
        command = [sys.executable, __file__, str(tmp_path), "0", str(CASES)]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True)
        asked = os.lseek(stdin.fileno(), 0, os.SEEK_CUR)
    lines = [json.loads(line) for line in (tmp_path / "results").read_text(encoding="utf-8").splitlines()]
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    verdicts = {number: (about, verdict) for number, about, verdict in lines if verdict != "begun"}
    wrong = [(number, *verdict) for number, verdict in verdicts.items() if verdict[1] not in ("works", "refused")]
    assert not wrong, "\n".join(f"case {number}, {about}: {verdict}" for number, about, verdict in wrong[:5])
    assert len(verdicts) == CASES
    assert done.stdout == "" and asked == 0
    # Both ends are met often, or the cases say nothing.
    works = sum(verdict == "works" for _, verdict in verdicts.values())
    assert CASES / 20 < works < CASES * 19 / 20


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

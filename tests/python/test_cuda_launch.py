"""What reaches the CUDA driver, seen by a stand-in for it, and what is refused before anything does.

No GPU is needed and nothing is computed: tests/gpu does that where there is one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_header import header_structures

from dflash_rs import _core
from dflash_rs.errors import DflashError, InvalidArgument

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILT = bool(_core.cuda_info()["fatbin_bytes"])
needs_kernels = pytest.mark.skipif(not BUILT, reason="this build contains no CUDA kernels")


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-I", ROOT / "cuda", "-o", library, HERE / "fake_driver.c"]
    subprocess.run(command, check=True)

    def run(code: str | Path, **variables: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
        log = folder / "log"
        log.unlink(missing_ok=True)
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_LOG": str(log)} | variables
        command = [sys.executable, *([code] if isinstance(code, Path) else ["-c", code])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = log.read_text().splitlines() if log.is_file() else []
        return done, [json.loads(line) for line in lines]

    return run


@pytest.fixture(scope="module")
def calls(fake_driver):
    if not BUILT:
        pytest.skip("this build contains no CUDA kernels")
    done, log = fake_driver(HERE / "cuda_calls.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), log


def launches(log: list[dict], kernel: str, structure: str):
    kind = header_structures()[structure]
    found = [entry for entry in log if entry.get("kernel", "").startswith(kernel)]
    return found, [kind.from_buffer_copy(bytes.fromhex(entry["parameters"])) for entry in found]


def test_the_library_is_loaded_once_and_launches_go_to_the_callers_stream(calls):
    _, log = calls
    assert sum("load" in entry for entry in log) == 1
    assert {entry["stream"] for entry in log if "kernel" in entry} == {77}


def test_the_stages_of_a_step_are_launched_in_order(calls):
    _, log = calls
    names = [entry["kernel"] for entry in log if "kernel" in entry]
    assert names == [
        "prepare_block", "kv_inject_128",
        "block_attention_128", "block_attention_128", "block_attention_combine_128", "block_attention_128",
        "block_attention_128", "block_attention_128", "block_attention_128", "block_attention_combine_128",
        "sample_scan_bf16", "sample_mass_bf16", "sample_pick_bf16", "sample_finish_bf16", "sample_scan_f32", "sample_finish_f32",
        "accept", "accept", "tree_top_k_bf16", "tree_build", "compact_kv",
        "block_attention_64", "block_attention_combine_64", "delta_inputs", "delta_rule_128", "delta_inputs", "delta_rule_128",
    ]  # fmt: skip


def test_prepare_block_gets_what_it_was_given(calls):
    named, log = calls
    (entry,), (p,) = launches(log, "prepare_block", "PrepareBlockParams")
    assert (p.query_starts, p.context_lens, p.anchors, p.drafts) == tuple(
        named[n] for n in ("starts", "lens", "anchors", "drafts")
    )
    assert (p.table.pages, p.table.row_ids, p.table.width, p.table.page_size) == (
        named["pages"],
        named["row_ids"],
        40,
        16,
    )
    assert (p.token_ids, p.depths, p.mask_token, p.draft_stride) == (named["ids"], 0, 5, 7)
    assert (p.num_requests, p.padded_tokens) == (3, 32)
    assert entry["grid"] == [4, 1, 1] and entry["block"] == [64, 1, 1]


def test_kv_inject_gets_strides_of_the_projection_and_of_the_cache(calls):
    named, log = calls
    (entry,), (p,) = launches(log, "kv_inject", "KvInjectParams")
    assert (p.kv, p.k_caches, p.rows) == (named["kv"], named["k_addresses"], named["rows"])
    assert (p.row_stride, p.layer_stride, p.v_offset) == (5 * 2 * 4 * 128, 2 * 4 * 128, 4 * 128)
    assert (p.slot_stride, p.head_stride, p.max_rows, p.num_layers, p.num_heads) == (4 * 128, 128, 12, 5, 4)
    assert p.rotary_dim == 64 and p.eps == pytest.approx(1e-6)
    assert entry["grid"] == [12 * 5 * 2 * 4 // 16, 1, 1]


def test_attention_gets_masks_windows_and_splits(calls):
    named, log = calls
    entries, parameters = launches(log, "block_attention", "BlockAttentionParams")
    block, causal, combine, tree = parameters[:4]
    for p in parameters[:4]:
        assert (p.q, p.k, p.v, p.k_cache) == tuple(named[n] for n in ("q", "k", "v", "k_cache"))
        assert list(p.q_stride) == list(p.k_stride) == [24 * 128, 128] and list(p.k_cache_stride) == [4 * 128, 128]
        assert (p.q_heads, p.kv_heads, p.max_tokens, p.max_block_len, p.scale) == (16, 4, 24, 8, 0.125)
    assert (block.mask, block.window, block.num_splits, block.slots) == (1, 9, 1, 0)
    assert (causal.mask, causal.window, causal.num_splits) == (0, 0, 3) and causal.slots and causal.valid_from
    assert (tree.mask, tree.mask_words) == (2, 1) and tree.ancestors
    assert (block.softcap, block.sinks) == (30.0, named["sinks"]) and (causal.softcap, causal.sinks) == (0.0, 0)
    assert bytes(combine) == bytes(causal) and combine.partial_out and combine.partial_stats
    assert {entry["cluster"] for entry in entries[:4]} == {1} and not any(p.clusters for p in parameters[:4])
    # Tiles of 128 wide heads take more shared memory than a block has without asking.
    asked = [entry for entry in log if entry.get("set") == "block_attention_128"]
    assert len(asked) == 1 and asked[0]["attribute"] == 8 and asked[0]["value"] == entries[0]["shared"] > 48 * 1024


def test_where_clusters_run_splits_go_in_whole_ones_and_few_need_no_memory(calls):
    _, log = calls
    entries, parameters = (found[4:8] for found in launches(log, "block_attention", "BlockAttentionParams"))
    assert all(p.clusters == 1 for p in parameters)
    assert [p.num_splits for p in parameters] == [2, 3, 9, 9]
    assert [(entry["grid"][2], entry["cluster"]) for entry in entries] == [(2, 2), (4, 4), (16, 8), (1, 1)]
    assert [bool(p.partial_out and p.partial_stats) for p in parameters] == [False, False, True, True]


@needs_kernels
@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "True"),
        ({"FAKE_CUDA_CAPABILITY": "80"}, "False"),
        ({"FAKE_CUDA_CLUSTERS": "0"}, "False"),
        ({"FAKE_CUDA_CODE": "80"}, "False"),
    ],
)
def test_clusters_run_where_the_device_has_them_and_room_for_one(fake_driver, variables, expected):
    done, _ = fake_driver("from dflash_rs import _core; print(_core.cuda_clusters(0))", **variables)
    assert done.stdout.strip() == expected, done.stderr


@needs_kernels
def test_clusters_are_of_the_current_device(fake_driver):
    done, _ = fake_driver("from dflash_rs import _core; print(_core.cuda_clusters(1))")
    assert "device: got 1, expected 0, which is current" in done.stderr


def test_an_engines_step_is_uploaded_once_and_split_by_its_longest_request(calls):
    named, log = calls
    entries, (p, combine) = (
        launches(log, "block_attention", "BlockAttentionParams")[0][8:],
        launches(log, "block_attention", "BlockAttentionParams")[1][8:],
    )
    assert [entry["kernel"] for entry in entries] == ["block_attention_64", "block_attention_combine_64"]
    assert (p.slots, p.out, p.mask) == (named["engine_slots"], named["engine_out"], 1) and bytes(p) == bytes(combine)
    assert (p.num_requests, p.max_block_len, p.num_splits, p.table.width) == (2, 8, 2, 38) and p.valid_from


def test_sampling_and_acceptance_share_the_rows(calls):
    named, log = calls
    _, parameters = launches(log, "sample_", "SampleRowsParams")
    assert all(p.vocab == (151936 if p.logits == named["logits"] else 248064) for p in parameters)
    assert parameters[0].logprobs and not parameters[-1].logprobs and parameters[-1].row_tokens
    _, (first, second) = launches(log, "accept", "AcceptParams")
    assert first.sampled == second.sampled == named["sampled"]
    assert first.new_context_lens != first.context_lens and second.new_context_lens == second.context_lens
    assert (first.out_stride, first.path_stride, first.max_nodes) == (8, 8, 8)


def test_a_recurrent_layer_is_two_launches_and_copies_have_no_tokens(calls):
    named, log = calls
    entries, parameters = launches(log, "delta_", "DeltaRuleParams")
    first, second, *copies = parameters
    assert bytes(first) == bytes(second) and bytes(copies[0]) == bytes(copies[1])
    assert (first.memory, first.mixed, first.out, first.end_memory) == tuple(
        named[f"delta_{name}"] for name in ("memory", "mixed", "out", "ends")
    )
    sizes = (first.num_requests, first.num_tokens, first.longest, first.block, first.key_heads, first.value_heads)
    assert sizes == (3, 24, 20, 5, 2, 6)
    assert (first.key_dim, first.value_dim, first.taps, first.beta_scale, first.into) == (128, 64, 4, 2.0, 0)
    assert (copies[0].into, copies[0].num_requests, copies[0].num_tokens) == (named["delta_into"], 2, 0)
    # Heads of query, key and value, and the gates; then a block for each request, head and 64 columns.
    assert [entry["grid"] for entry in entries] == [[3, 11, 1], [18, 1, 1], [2, 11, 1], [12, 1, 1]]


@needs_kernels
@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"FAKE_CUDA_VERSION": "12040"}, "got one of CUDA 12.4, expected libcuda.so.1 of CUDA 13.0 or newer"),
        (
            {"FAKE_CUDA_NO_BINARY": "1", "FAKE_CUDA_CAPABILITY": "75"},
            "got Fake 0, an sm_75, expected one that runs code for",
        ),
        ({"FAKE_CUDA_NO_CONTEXT": "2"}, "cuDevicePrimaryCtxRetain"),
        ({"FAKE_CUDA_LOADS_FAIL": "1"}, "cuLibraryLoadData"),
        ({"FAKE_CUDA_CURRENT": "1"}, "tensors on cuda:0 while cuda:1 is current"),
        ({"FAKE_CUDA_EXTRA_BYTES": "8"}, "takes 16 bytes of parameters, expected 8"),
        ({"FAKE_CUDA_REFUSE": "1"}, r"CUDA_ERROR_INVALID_VALUE (1), invalid argument"),
    ],
)
def test_a_driver_that_cannot_serve_is_an_error_with_a_remedy(fake_driver, variables, expected):
    code = "from dflash_rs import _core; _core.cuda_probe((0x1000, 'int32', 0, (1,), (1,)), 0)"
    done, log = fake_driver(code, **variables)
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert not any("kernel" in entry for entry in log)


@needs_kernels
def test_a_thread_that_never_asked_anything_of_cuda_launches_in_its_tensors_primary_context(fake_driver):
    code = (
        "import threading; from dflash_rs import _core\n"
        "def launch(): _core.cuda_probe((0x1000, 'int32', 1, (1,), (1,)), 0)\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=launch); thread.start(); thread.join()\n"
    )
    done, log = fake_driver(code, FAKE_CUDA_NO_CONTEXT="1")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [entry["kernel"] for entry in log if "kernel" in entry] == ["probe", "probe"]


@needs_kernels
def test_a_load_that_failed_is_tried_again(fake_driver):
    code = (
        "from dflash_rs import _core\n"
        "for _ in range(3):\n"
        "    try: _core.cuda_probe((0x1000, 'int32', 0, (1,), (1,)), 0)\n"
        "    except Exception as error: print(error)\n"
    )
    done, log = fake_driver(code, FAKE_CUDA_LOADS_FAIL="1")
    assert done.returncode == 0 and done.stdout.count("cuLibraryLoadData") == 1, done.stdout + done.stderr
    assert [next(iter(entry)) for entry in log] == ["load", "kernel", "kernel"]


@needs_kernels
def test_every_kernel_is_found_by_its_name_and_loaded_on_demand(fake_driver):
    done, _ = fake_driver("import json; from dflash_rs import _core; print(json.dumps(_core.cuda_load()))")
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout))
    table = (ROOT / "cuda" / "registers.txt").read_text(encoding="utf-8").splitlines()[2:]
    assert names == {line.split()[0] for line in table}


def test_the_doctor_and_the_extension_say_what_was_built_and_found(fake_driver):
    done, _ = fake_driver("import json; from dflash_rs import _core; print(json.dumps(_core.cuda_info()))")
    info = json.loads(done.stdout)
    assert info["driver"] == "13.0" and info["driver_error"] is None
    assert info["devices"] == [{"name": "Fake 0", "capability": [9, 0], "multiprocessors": 132, "supported": BUILT}]
    code = "from dflash_rs import doctor; print(doctor._kernels().detail); print(doctor._cuda_driver().detail)"
    kernels, driver = fake_driver(code, FAKE_CUDA_CAPABILITY="75")[0].stdout.splitlines()
    assert ("nvcc" in kernels) and ("sm_90a" in kernels) == BUILT
    assert "CUDA 13.0, Fake 0 (sm_75, no kernels for it)" in driver


def test_importing_opens_no_driver(fake_driver):
    code = "import dflash_rs, dflash_rs._core; print('libcuda' in open('/proc/self/maps').read())"
    done, _ = fake_driver(code)
    assert done.stdout.strip() == "False"


@needs_kernels
def test_the_gpu_suites_small_shapes_are_launches_that_are_in_order(fake_driver):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts' / 'gpu_suite')!r})\n"
        "import torch, small\n"
        "from dflash_rs import cuda\n"
        "cuda._view = lambda t: (t.data_ptr(), cuda._dtype(t), 0, tuple(t.shape), t.stride())\n"
        "torch.cuda.synchronize = lambda: None\n"
        "small.main(torch.device('cpu'))"
    )
    done, log = fake_driver(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "small shapes done"
    table = (ROOT / "cuda" / "registers.txt").read_text(encoding="utf-8").splitlines()[2:]
    launched = {entry["kernel"] for entry in log if "kernel" in entry}
    assert {line.split()[0] for line in table if "f32" not in line} - launched <= {"probe"}


# ---- refused before anything reaches a driver ------------------------------------------------------------------------

A = 0x7F00_0000_0000


def t(index: int, dtype: str, *shape: int, strides=None, device: int = 0):
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return (A + (index << 24), dtype, device, shape, strides)


def attention(**changed):
    arguments = dict(
        q=t(0, "bfloat16", 8, 4, 64), k=t(1, "bfloat16", 8, 2, 64), v=t(2, "bfloat16", 8, 2, 64),
        k_cache=t(3, "bfloat16", 64, 2, 64), v_cache=t(4, "bfloat16", 64, 2, 64), out=t(5, "bfloat16", 8, 4, 64),
        query_starts=t(6, "int32", 3), context_lens=t(7, "int32", 2), page_table=t(8, "int32", 2, 4), row_ids=t(9, "int32", 2),
        page_size=16, max_block_len=4, max_keys=68, scale=0.125, stream=0,
    )  # fmt: skip
    return _core.cuda_block_attention(**(arguments | changed))


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"q": t(0, "float16", 8, 4, 64)}, "q: got float16, expected float32, bfloat16"),
        ({"q": t(0, "float32", 8, 4, 64)}, "q: got float32, expected bfloat16"),
        ({"q": t(0, "bfloat16", 8, 4, 64, device=-1)}, "q: got a tensor on the CPU, expected one on a CUDA device"),
        ({"k": t(1, "bfloat16", 8, 2, 64, device=1)}, "k: got a tensor on cuda:1, expected one on cuda:0, where q is"),
        ({"q": t(0, "bfloat16", 8, 4, 80)}, "head_dim: got 80, expected 64, 128 or 256"),
        ({"k": t(1, "bfloat16", 7, 2, 64)}, "k: got shape [7, 2, 64], expected shape [8, 2, 64]"),
        ({"k": t(1, "bfloat16", 8, 3, 64)}, "q: got 4 heads over 3 key heads"),
        ({"q": t(0, "bfloat16", 8, 4, 64, strides=[256, 1, 4])}, "q: got strides [256, 1, 4], expected 1 as the last one"),
        ({"q": t(0, "bfloat16", 8, 4, 64, strides=[260, 64, 1])}, "expected multiples of 8 elements (16 bytes)"),
        ({"q": (A + 8, "bfloat16", 0, (8, 4, 64), (256, 64, 1))}, "q: address 0x7f0000000008 is not aligned to 16 bytes"),
        ({"q": (0, "bfloat16", 0, (8, 4, 64), (256, 64, 1))}, "q: null pointer, expected the address of 2048 elements"),
        ({"out": t(0, "bfloat16", 8, 4, 64)}, "out: overlaps q, expected memory of its own"),
        ({"out": t(5, "bfloat16", 8, 4, 64, strides=[64, 64, 1])}, "make elements overlap"),
        ({"slots": t(10, "int64", 8), "k_cache": t(1, "bfloat16", 64, 2, 64)}, "k_cache: overlaps k"),
        ({"context_lens": t(7, "int64", 2)}, "context_lens: got int64, expected int32"),
        ({"context_lens": t(7, "int32", 3)}, "context_lens: got shape [3], expected shape [2]"),
        ({"query_starts": t(6, "int32", 0)}, "query_starts: got shape [0], expected [R + 1]"),
        ({"page_table": t(8, "int32", 2, 4, strides=[8, 1])}, "page_table: got strides [8, 1] for shape [2, 4], expected a contiguous"),
        ({"page_size": 0}, "page_size: got 0, expected at least 1"),
        ({"mask": "tree"}, "mask: got tree, expected 'causal', 'block' or 'ancestors'"),
        ({"mask": "ancestors"}, "ancestors: got None, expected a tensor with mask='ancestors'"),
        ({"window": 0}, "window: got 0"),
        ({"softcap": 0.0}, "softcap: got 0, expected a positive number, or None"),
        ({"sinks": t(11, "float32", 3)}, "sinks: got shape [3], expected shape [4]"),
        ({"sinks": t(11, "bfloat16", 4)}, "sinks: got bfloat16, expected float32"),
        ({"scale": float("nan")}, "scale: got NaN"),
        ({"max_block_len": 9}, "max_block_len: got 9, expected at most 8"),
        ({"max_keys": 600}, "num_splits: got 1, expected 2..65528"),
        ({"max_keys": 600, "num_splits": 2}, "partial_out, partial_stats: got None, expected workspaces for 2 parts"),
        ({"max_keys": 4097, "num_splits": 9, "clusters": True}, "partial_out, partial_stats: got None, expected workspaces for 2 parts"),
        ({"clusters": 1}, "clusters: got 1, expected True or False"),
        ({"split_keys": 100}, "split_keys: got 100, expected a multiple of 64"),
    ],
)  # fmt: skip
def test_an_attention_that_cannot_run_is_refused_with_numbers(changed, expected):
    with pytest.raises(InvalidArgument) as refused:
        attention(**changed)
    assert expected in str(refused.value)


def test_a_launch_that_is_in_order_needs_kernels_or_a_driver():
    if _core.cuda_info()["driver"] is not None:
        pytest.skip("this machine has a driver")
    with pytest.raises(DflashError, match="libcuda.so.1" if BUILT else "a build without any"):
        attention()


def test_the_other_families_refuse_what_their_kernels_cannot_take():
    with pytest.raises(InvalidArgument, match="logits .columns.: got 2097152, expected at most 1048576"):
        _core.cuda_sample_rows(
            logits=t(0, "float32", 2, 1 << 21), sampling=t(1, "uint8", 1, 64), query_starts=t(2, "int32", 2),
            token_ids=t(3, "int64", 2), positions=t(4, "int64", 2), history_tokens=t(5, "int32", 0),
            history_counts=t(6, "int32", 0), bias_tokens=t(7, "int32", 0), bias_values=t(8, "float32", 0),
            tokens=t(9, "int64", 2), status=t(10, "int32", 2), scratch=t(11, "uint8", 1 << 20), stream=0,
        )  # fmt: skip
    with pytest.raises(
        InvalidArgument, match="cos_sin: got rows of 24, expected rows of a multiple of 16, at most head_dim 64"
    ):
        _core.cuda_kv_inject(
            kv=t(0, "bfloat16", 4, 2, 2, 1, 64), k_norm=t(1, "bfloat16", 2, 64), cos_sin=t(2, "float32", 9, 24),
            positions=t(3, "int64", 4), slots=t(4, "int64", 4), k_caches=t(5, "int64", 2), v_caches=t(6, "int64", 2),
            cache=t(7, "bfloat16", 8, 1, 64), eps=1e-6, stream=0,
        )  # fmt: skip
    with pytest.raises(InvalidArgument, match="tokens .columns.: got 300, expected at most 256"):
        _core.cuda_tree_top_k(
            values=t(0, "float32", 2, 512), tokens=t(1, "int64", 2, 300), log_probs=t(2, "float32", 2, 300), stream=0
        )


def test_one_row_of_sampling_is_laid_out_as_the_header_says():
    cuda = pytest.importorskip("dflash_rs.cuda")
    structure = header_structures()["SamplingRow"]
    assert cuda.SAMPLING_ROW_BYTES == ctypes.sizeof(structure)
    rows = cuda.sampling_rows(
        [
            {"seed": 2**63 + 1, "top_p": 0.5, "logit_bias": {7: -1.0, 3: 2.0}},
            {"temperature": 0, "presence_penalty": 0.5, "history": {9: 2, 4: 0}, "masked": [8, 1], "masked_before": 12},
        ],
        "cpu",
    )
    first, second = np.frombuffer(rows.rows.numpy().tobytes(), dtype=np.dtype(structure))
    assert (first["seed"], first["temperature"], first["bias_end"], first["history_end"]) == (2**63 + 1, 1, 2, 0)
    assert (second["temperature"], second["bias_start"], second["history_end"]) == (0, 2, 2)
    assert (second["mask_end"], second["mask_before"], second["anchor"]) == (4, 12, 0)
    assert rows.bias_tokens.tolist() == [3, 7, 1, 8] and rows.history_counts.tolist() == [0, 2] and rows.filters
    with pytest.raises(InvalidArgument, match="'topp'"):
        cuda.sampling_rows([{"topp": 0.5}], "cpu")

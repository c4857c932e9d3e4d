"""SGLang's Triton kernels get the inputs of scripts/gpu_suite in their own layout: on the CPU they give what the references give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment

from dflash_rs import _core

HERE = Path(__file__).resolve().parent

OLDEST = Path(sys.prefix) / "sglang-0.5.17"
KNOWN = {
    "extend_attention.extend_attention_fwd",
    "verify_splitkv.verify_splitkv_fwd",
    "decode_attention.decode_attention_fwd",
    "fused_kv_materialize._fused_norm_rope_stacked",
    "dflash._compute_dflash_accept_bonus_triton_unchecked",
    "dflash._prepare_dflash_draft_block_unchecked",
    "cache_move.copy_all_layer_kv_cache_func",
}
NEWER = {"row_argmax.row_argmax", "lilicorr.lilicorr_topk_lse"}


def on_cpu(code: list[str | Path], **extra: str) -> subprocess.CompletedProcess[str]:
    env = environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", **extra)
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(not _core.cuda_info()["fatbin_bytes"], reason="this build contains no CUDA kernels")
@pytest.mark.parametrize(
    ("version", "folder", "expected"), [("0.5.23", "", KNOWN | NEWER), ("0.5.17", str(OLDEST), KNOWN)]
)
def test_every_peer_computes_what_ours_does(driver, version, folder, expected):
    done = on_cpu([HERE / "peers_on_cpu.py"], SGLANG_HOST_CUDA=driver, GPU_SUITE_PEERS_PATH=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version, found["detail"]
    assert {peer["kernel"] for peer in found["peers"]} == expected
    for peer in found["peers"]:
        assert peer["failed"] is None and peer["reference"] is None and peer["ours"] is None, peer
        assert "spoiled" not in peer or peer["spoiled"], peer


LOOK = f"""
import sys
sys.path.insert(0, {str(HERE.parents[1] / "scripts" / "gpu_suite")!r})
import peers
print(*peers.sglang(), sep="|")
"""


def test_a_broken_sglang_is_reported_with_its_reason(tmp_path):
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    done = on_cpu(["-c", LOOK], GPU_SUITE_PEERS_PATH=str(tmp_path))
    assert done.stdout.splitlines()[-1] == (
        "None|cannot be imported, not compared: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    ), done.stderr


def test_a_kernel_that_is_not_where_it_was_is_reported(tmp_path):
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9'\n")
    code = LOOK + (
        "import shapes\n"
        "import torch\n"
        "for found in peers.peers(shapes.accept_case(shapes.Batch(torch.device('cpu'), 2, 3, 5))):\n"
        "    print(found.kernel, found.peer, found.failed, sep='|')\n"
    )
    done = on_cpu(["-c", code], GPU_SUITE_PEERS_PATH=str(tmp_path))
    assert done.stdout.splitlines()[-2:] == [
        "9|9",
        "dflash._compute_dflash_accept_bonus_triton_unchecked|None|ModuleNotFoundError: No module named 'sglang.kernels'",
    ], done.stderr

"""The CUDA kernels inside SGLang's worker, on the stand-in for CUDA's driver that tests/emulated describes: the worker's own code and the
launcher's, the kernels' logic compiled for the host."""

from __future__ import annotations

import json

import cases
import pytest
from cases import matrix, tokens
from servers import Server, speculative, widths
from test_peers import HERE, on_cpu

from dflash_rs import _core

ROWS = ["greedy", "all penalties", "seed, top_p", "regex"]
HALF = {"dtype": "bfloat16", "grammar_backend": "xgrammar", "enable_deterministic_inference": True}


def accepted(answers: list[dict]) -> float:
    """Tokens per pass over all answers."""
    infos = [answer["meta_info"] for answer in answers]
    return sum(info["completion_tokens"] for info in infos) / sum(info["spec_verify_ct"] for info in infos)


@pytest.mark.skipif(not _core.cuda_info()["fatbin_bytes"], reason="this build contains no CUDA kernels")
@pytest.mark.parametrize(("dtype", "at_once"), [("bfloat16", 1), ("float32", 4)])
def test_trees_by_kernels_are_those_of_the_host(logs, driver, dtype, at_once):
    """Paths are moved by a kernel in bfloat16, where texts hang on what shares a batch; several anchors are built below at once in float32."""
    options = speculative(page_size=16, **HALF | {"dtype": dtype})
    bodies = [body for name in ROWS for body in cases.bodies(matrix()[name])]
    env = {"DFLASH_RS_CONFIG": json.dumps({"tree_nodes": 12, "adaptive": False, "kernels": False})}
    pair = [
        Server(logs / f"trees-by-kernels-{dtype}.log", env=env | {"SGLANG_HOST_CUDA": driver}, **options),
        Server(logs / f"trees-by-host-{dtype}.log", env=env, **options),
    ]
    try:
        used, unused = (server.wait() for server in pair)
        answers, expected = (server.together(bodies, at_once=at_once) for server in (used, unused))
        assert used.flush_is_clean()
    finally:
        for server in pair:
            server.close()
    assert tokens(answers) == tokens(expected)
    assert accepted(answers) > 1.8
    if at_once == 1:
        assert accepted(answers) == accepted(expected)


@pytest.mark.skipif(not _core.cuda_info()["fatbin_bytes"], reason="this build contains no CUDA kernels")
@pytest.mark.parametrize(("page_size", "adaptive"), [(1, "cycle"), (16, False)])
def test_walk_and_draft_kv_by_kernels_are_those_of_the_host(logs, driver, page_size, adaptive):
    driver = {"SGLANG_HOST_CUDA": driver}
    options = speculative(page_size=page_size, chunked_prefill_size=64, **HALF)
    bodies = [body for name in ROWS for body in cases.bodies(matrix()[name])]
    without = {"DFLASH_RS_CONFIG": json.dumps({"kernels": False, "adaptive": adaptive})}
    # Started side by side, asked one after the other.
    pair = [
        Server(logs / f"kernels-{page_size}.log", env=driver | widths(adaptive), **options),
        Server(logs / f"no-kernels-{page_size}.log", env=driver | without, **options),
    ]
    try:
        used, unused = (server.wait() for server in pair)
        answers = used.together(bodies, at_once=1)
        assert "kernels for draft KV: in use" in used.log.read_text(errors="replace")
        assert used.flush_is_clean()
        expected = unused.together(bodies, at_once=1)
        assert "kernels for draft KV" not in unused.log.read_text(errors="replace")
    finally:
        for server in pair:
            server.close()
    assert tokens(answers) == tokens(expected)
    # Drafts from keys that were rounded once instead of twice may differ, in rare places; and where steps vary in width, so do those
    # that follow.
    assert accepted(answers) == pytest.approx(accepted(expected), rel=0.1 if adaptive else 0.02)
    assert accepted(answers) > (1.3 if adaptive else 1.5)


@pytest.mark.skipif(not _core.cuda_info()["fatbin_bytes"], reason="this build contains no CUDA kernels")
def test_unseeded_draws_by_the_kernel_follow_the_law_of_sglangs_sampler(driver):
    done = on_cpu([HERE / "draws_on_cpu.py"], SGLANG_HOST_CUDA=driver)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, of in found.pop("laws").items():
        # Standard deviations of chi-square; another law is far away.
        assert of["ours"] < 8 and of["theirs"] < 8 < 20 < of["another"], (name, of)
        assert of["calls"][0] == 0 < of["calls"][1] and of["untouched"], (name, of)
    operations = found.pop("operations")
    assert operations["ours"] <= 4 < operations["theirs"], operations
    # Drafts see the numbers that their tokens are drawn with.
    law, accepted, wrong = found.pop("coupled")
    assert law < 5 < 12 < wrong and accepted > 1, (law, wrong, accepted)
    assert all(found.values()), found


@pytest.mark.skipif(not _core.cuda_info()["fatbin_bytes"], reason="this build contains no CUDA kernels")
def test_a_server_draws_by_the_kernel_what_has_no_seed(logs, driver):
    env = {"SGLANG_HOST_CUDA": driver}
    with Server(logs / "draws-by-kernel.log", env=env | widths(False), **speculative(grammar_backend="none")) as server:
        server.wait()
        greedy = cases.bodies(cases.greedy()["greedy"], 2)
        # In a batch that is greedy throughout no kernel draws.
        alone = tokens(server.together(greedy))
        warm = {"temperature": 1.1, "top_p": 0.9, "max_new_tokens": 24, "ignore_eos": True}
        answers = server.together([*greedy, *cases.bodies(warm, 2), *cases.bodies(warm, 2)])
        assert tokens(answers[:2]) == alone
        drawn = tokens(answers[2:])
        assert [len(text) for text in drawn] == [24] * 4 and drawn[:2] != drawn[2:], drawn
        assert "draws without a seed are made by this package's kernel" in server.log.read_text(errors="replace")
        assert server.flush_is_clean()

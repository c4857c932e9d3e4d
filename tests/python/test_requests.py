"""What `LLM` is asked, prompt by prompt: which one is wrong, what becomes of the others, and parameters as values."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from dflash_rs import InvalidArgument, MissingPackage, SamplingParams, extras

torch = pytest.importorskip("torch")

from test_arguments import HOSTILE, tried  # noqa: E402

from dflash_rs import LLM, OutOfPages  # noqa: E402

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    with LLM(device="cpu", num_pages=32, page_size=4, max_running=4) as engine:
        yield engine


def idle(engine: LLM) -> bool:
    stats = engine.stats()
    return stats["free_pages"] + stats["cached_pages"] == stats["total_pages"] and not engine._requests.active


WRONG = {
    "": "prompts[1]: got an empty prompt, expected at least one token",
    (5, 4096): "prompts[1]: got token id 4096, expected token ids in 0..4095",
    (1, "a"): "prompts[1]: got an entry 'a', expected a string or a list of token ids",
    None: "prompts[1]: got None, expected a string or a list of token ids",
    tuple([7] * 5001): "prompts[1]: got 5001 tokens, expected 1..1023 (max_context less one)",
    tuple(
        [7] * 200
    ): "prompts[1]: got 200 tokens with max_tokens 3, 51 pages of 4 slots, expected at most the pool's 32",
    "\ud800" + "x" * 10**5: "prompts[1]: got '\\ud800xxx",
}


@pytest.mark.parametrize("prompt", WRONG, ids=lambda prompt: str(WRONG[prompt])[:40])
def test_a_prompt_that_cannot_be_taken_is_named_and_the_others_can_run_all_the_same(llm, prompt):
    good = "import os\n"
    expected = llm.generate(good, SHORT)[0].token_ids
    with pytest.raises((InvalidArgument, OutOfPages)) as caught:
        llm.generate([good, prompt, good], SHORT)
    assert str(caught.value).startswith(WRONG[prompt]) and len(str(caught.value)) < 300
    assert idle(llm)
    first, refused, last = llm.generate([good, prompt, good], SHORT, on_error="return")
    assert first.token_ids == last.token_ids == expected and first.error is last.error is None
    assert (refused.finish_reason, refused.error) == ("error", str(caught.value))
    assert (refused.text, refused.token_ids, refused.logprobs, refused.request_id) == ("", [], None, None)
    assert refused.metrics.keys() == first.metrics.keys() and refused.metrics["output_tokens"] == 0
    assert llm.abort(refused.request_id) is False
    assert idle(llm)


def test_parameters_of_one_prompt_are_named_with_their_place(llm):
    options = [
        SHORT,
        dataclasses.replace(SHORT, logit_bias={5000: 1.0}),
        dataclasses.replace(SHORT, stop_token_ids=[9999]),
    ]
    with pytest.raises(
        InvalidArgument, match=r"^params\[1\]\.logit_bias: got token id 5000, expected token ids in 0\.\.4095$"
    ):
        llm.generate(["a", "b", "c"], options)
    with pytest.raises(InvalidArgument, match=r"^logit_bias: got token id 5000"):
        llm.generate(["a", "b"], options[1])
    outputs = llm.generate(["a", "b", "c", "d"], [*options, None], on_error="return")
    assert [o.error and o.error.split(":")[0] for o in outputs] == [
        None,
        "params[1].logit_bias",
        "params[2].stop_token_ids",
        "params[3]",
    ]
    assert [o.metrics["seed"] for o in outputs[1:]] == [None] * 3
    with_scores = dataclasses.replace(options[1], logprobs=2, seed=9)
    (output,) = llm.generate("a", with_scores, on_error="return")
    assert output.logprobs == [] and output.metrics["seed"] == 9
    assert idle(llm)


def test_a_stream_begins_with_what_was_refused(llm):
    with llm.stream(["a", "", "b", [4096]], SHORT, on_error="return") as stream:
        events = list(stream)
    assert [(e.index, e.request_id, e.finish_reason, e.token_ids) for e in events[:2]] == [
        (1, None, "error", []),
        (3, None, "error", []),
    ]
    assert sorted(e.index for e in events if e.output is not None) == [0, 1, 2, 3]
    assert all(o.finish_reason == "error" for o in llm.generate(["", [-1]], on_error="return"))
    assert llm.generate([], on_error="return") == []


def test_what_is_wrong_with_the_whole_call_raises_whatever_is_asked_for(llm):
    for call, message in (
        (lambda: llm.generate(5, on_error="return"), "prompts: got 5"),
        (
            lambda: llm.generate(["a"], [SHORT, SHORT], on_error="return"),
            "params: got 2, expected one, or one for each of 1 prompts",
        ),
        (lambda: llm.generate(["a"], 5, on_error="return"), "params: got 5"),
        (lambda: llm.generate("a", on_error="ignore"), "on_error: got 'ignore', expected 'raise' or 'return'"),
        (lambda: llm.stream("a", on_error=None), "on_error: got None"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            call()
    assert idle(llm)


@pytest.mark.parametrize(
    "make", [tuple, np.array, lambda ids: np.array(ids, np.uint16), lambda ids: np.array(ids)[::1], lambda ids: [np.int32(t) for t in ids]]
)  # fmt: skip
def test_token_ids_come_back_as_a_plain_list_whatever_they_came_in(llm, make):
    ids = [5, 6, 7]
    for given in (make(ids), [make(ids)]):
        (output,) = llm.generate(given, SHORT)
        assert output.prompt == ids and [type(t) for t in output.prompt] == [int] * 3
        assert json.loads(json.dumps(output.prompt)) == ids
    two = llm.generate(np.array([ids, ids]), SHORT)
    assert [o.prompt for o in two] == [ids, ids]
    assert llm.generate("import os", SHORT)[0].prompt == "import os"
    assert llm.decode(make(ids)) == llm.decode(ids)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8"])
def test_token_ids_may_be_tensors_as_well_as_arrays(llm, dtype):
    ids, kind = [5, 9, 7], getattr(torch, dtype)
    (expected,) = llm.generate(ids, SHORT)
    one, rows = torch.tensor(ids, dtype=kind), torch.tensor([ids, ids], dtype=kind)
    for prompts in (
        one,
        [one],
        (one, ids),
        rows,
        rows[:, :],
        [rows[0], np.array(ids)],
        torch.tensor([5, 0, 9, 0, 7], dtype=kind)[::2],
    ):
        for output in llm.generate(prompts, SHORT):
            assert output.prompt == ids and type(output.prompt[0]) is int
            assert output.token_ids == expected.token_ids
    assert len(llm.generate(rows, SHORT)) == 2
    assert llm.decode(one) == llm.decode(ids)
    assert np.array_equal(llm.next_token_logits(one), llm.next_token_logits(ids))


TENSORS = [
    (torch.ones(3), "prompts: got a torch.float32 tensor of shape (3,), expected a string, token ids, or a list of these"),
    (torch.tensor(5), "prompts: got a int64 array of shape (), expected a string, token ids, or a list of these"),
    (torch.ones(3, dtype=torch.int64, device="meta"), "prompts: got a torch.int64 tensor of shape (3,), expected a string"),
    ([[1], torch.ones(3)], "prompts[1]: got a torch.float32 tensor of shape (3,), expected a string or a list of token ids"),
    ([[1], torch.ones(2, 3, dtype=torch.int64)], "prompts[1]: got a int64 array of shape (2, 3), expected a string or a list of"),
    (torch.ones(1, 2, 3, dtype=torch.int64), "prompts[0]: got a int64 array of shape (2, 3), expected a string or a list of"),
    (torch.tensor([[1, 2], [3, 4096]]), "prompts[1]: got token id 4096, expected token ids in 0..4095"),
    (torch.tensor([True, False]), "prompts: got a torch.bool tensor of shape (2,), expected a string"),
]  # fmt: skip


@pytest.mark.parametrize(("prompts", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_a_tensor_that_holds_no_prompts_is_refused_by_name(llm, prompts, message):
    with pytest.raises(InvalidArgument) as caught:
        llm.generate(prompts, SHORT)
    assert str(caught.value).startswith(message)


def test_whatever_is_passed_to_an_llm_is_taken_or_refused_by_name(llm):
    one = dataclasses.replace(SHORT, max_tokens=1)
    also = ("max_tokens", "prompts")
    kinds = (InvalidArgument, OutOfPages)
    tried(llm.generate, dict(prompts="a", params=one), ("prompts", "params", "draft", "on_error"), also, kinds)
    tried(lambda prompt: llm.generate(["a", prompt], one), {}, ("prompt",), ("prompts",), kinds)
    tried(llm.stream, dict(prompts=[], params=one), ("draft", "on_error"), also)
    tried(llm.encode, {}, ("text",))
    tried(llm.decode, {}, ("ids",))
    tried(llm.next_token_logits, {}, ("ids",))
    tried(llm.abort, {}, ("request_id",))
    assert idle(llm)


def test_options_of_an_llm_are_refused_by_name_before_a_model_is_loaded(monkeypatch):
    from dflash_rs.engine import build

    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(build, "describe", load)
    options = (
        "model",
        "draft",
        "device",
        "dtype",
        "matmul_precision",
        "threads",
        "page_size",
        "num_pages",
        "max_running",
    )
    options += ("max_context", "max_batch_tokens", "prefix_cache", "adaptive", "costs", "cuda_graphs")
    options += ("capture_ahead",)
    for name in options:
        for value in HOSTILE:
            try:
                LLM(**({"device": "cpu", "draft": None} | {name: value}))
            except InvalidArgument as error:
                assert re.match(rf"{name}: got ", str(error)) and len(str(error)) < 300, (name, str(error))
            except Loaded:
                pass
    torch.set_num_threads(1)


WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


sys.meta_path.insert(0, Hidden())
import dflash_rs

try:
    dflash_rs.LLM()
except dflash_rs.MissingPackage as error:
    assert isinstance(error, ImportError) and isinstance(error, dflash_rs.DflashError)
    print(error)
"""


def test_without_torch_an_llm_says_how_to_get_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert done.stdout.startswith("LLM needs torch and transformers (No module named 'torch'): ")
    assert extras.install("torch") in done.stdout
    assert issubclass(MissingPackage, ImportError)


# ---- parameters as values ------------------------------------------------------------------------------------------------

FULL = dict(
    temperature=1, top_p=0.5, seed=3, stop=["a", "b"], stop_token_ids=[1], logit_bias={17: 2, 5: -1.5}, logprobs=1
)


def test_equal_parameters_are_equal_keys():
    params, other = (
        SamplingParams(**FULL),
        SamplingParams(**(FULL | {"logit_bias": {5: -1.5, 17: 2.0}, "temperature": 1.0})),
    )
    assert params == other and hash(params) == hash(other) and {params: 1}[other] == 1
    different = dataclasses.replace(params, logit_bias={17: 2})
    assert different != params and len({params, other, different, SamplingParams(), SamplingParams()}) == 3
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3)) == SamplingParams(temperature=0.5, top_k=3)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), dataclasses.replace]
)
def test_parameters_can_be_copied(copied):
    params = SamplingParams(**FULL)
    other = copied(params)
    assert other == params and hash(other) == hash(params) and repr(other) == repr(params)
    assert dataclasses.asdict(other)["logit_bias"] == {17: 2.0, 5: -1.5}
    assert dataclasses.replace(other, seed=4).logit_bias == params.logit_bias
    assert json.loads(json.dumps(dataclasses.asdict(other)))["logit_bias"] == {"17": 2.0, "5": -1.5}


def test_parameters_cannot_be_changed_behind_their_checks():
    given = {17: 2.0}
    params = SamplingParams(logit_bias=given)
    given[-1] = float("nan")
    assert params.logit_bias == {17: 2.0}
    for change in (
        lambda b: b.__setitem__(1, 2.0), lambda b: b.pop(17), lambda b: b.update({1: 2.0}), lambda b: b.clear(), lambda b: b.__delitem__(17),
        lambda b: b.setdefault(1, 2.0), lambda b: b.popitem(), lambda b: b.__ior__({1: 2.0}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="logit_bias of SamplingParams cannot be changed"):
            change(params.logit_bias)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
    assert params.logit_bias == {17: 2.0}


def test_a_bias_that_two_keys_name_is_refused():
    class Index(int):
        __hash__ = object.__hash__

        def __eq__(self, other):
            return self is other

    with pytest.raises(InvalidArgument, match="^logit_bias: got .*, expected each token id once"):
        SamplingParams(logit_bias={Index(3): 1.0, Index(3): 2.0})

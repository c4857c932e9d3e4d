"""Targets with recurrent layers on the emulated GPU: states at fixed addresses, inside the graphs, with and without drafts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from hybrid_models import build
from models_helpers import VOCAB, randomise
from no_values import Crossings

from dflash_rs import LLM, SamplingParams
from dflash_rs.engine.device import step as device_step
from dflash_rs.engine.device.step import DeviceBackend, serves
from dflash_rs.models.target import TargetModel

BYTES = [bytes([33 + token]) for token in range(VOCAB)]
PROMPTS = [np.random.default_rng(7 + n).integers(3, VOCAB, n).tolist() for n in (1, 5, 17, 30)]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=14, ignore_eos=True),
}
LAYERS = 3


def made(kind: str = "Qwen3_5", **options) -> TargetModel:
    """Three recurrent layers with 2 key and 4 value heads, and one that attends; in bfloat16, with heads that the kernels take."""
    import transformers

    config = getattr(transformers, f"{kind}{'Text' if kind == 'Qwen3_5' else ''}Config")(
        **{
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS + 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256, "pad_token_id": 0, "linear_key_head_dim": 32,
            "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, **options,
        }
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return TargetModel(randomise(model, 0).eval().to(torch.bfloat16))


class KnowingThere:
    """A drafter whose half on the device knows texts; one draft of four is a token off, by its position."""

    kind, block_size, taps, branches, most_candidates, kv_bytes_per_token, key_dims = "knowing", 5, (0,), 1, 1, 0, ()
    reads_tokens, from_text, mask_token_id = False, False, 1

    def __init__(self, texts: list[list[int]], wrong: str = "some"):
        longest = max(map(len, texts))
        self.texts = torch.tensor([text + [-1] * (longest - len(text)) for text in texts])
        self.wrong = wrong

    def alloc_kv(self, num_slots):
        pass

    def prepare(self, limit):
        pass

    def free(self):
        pass

    def on_device(self):
        return self

    def block(self, token_ids, positions, limit, attention, size):
        return positions.view(-1, size)[:, :1], positions.new_zeros(positions.shape[0] // size, size - 1, 1)

    def choose(self, hidden, logits, anchors, draw=None):
        at, last = hidden[:, 0], self.texts.shape[1] - 1
        known = self.texts.index_select(1, at.clamp(max=last)) == anchors
        texts = self.texts.index_select(0, known.int().argmax(0))
        places = at[:, None] + torch.arange(1, logits.shape[1] + 1)
        tokens = texts.gather(1, places.clamp(max=last)).clamp(min=0)
        wrong = (places * 2654435761 >> 8) % 4 == 0 if self.wrong == "some" else torch.ones_like(places)
        return (tokens + wrong) % VOCAB

    def context(self, features):
        assert features.shape[1] == 48
        return features

    def store(self, kv, positions, slots, rows=None):
        pass


@pytest.fixture(scope="module")
def target(gpu):
    """One whose products do not depend on how many rows there are: any difference in text is then an error, never rounding."""

    def linear(x, weight, bias=None):
        rows = x.reshape(-1, x.shape[-1]).double()
        out = (rows[:, None] * weight.double()).sum(-1) if rows.shape[0] else rows @ weight.double().T
        out = out if bias is None else out + bias.double()
        return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        yield made()


def engine(target, draft=None, **options) -> LLM:
    options = {"page_size": 4, "max_running": 3, "max_context": 64, "adaptive": False, **options}
    return LLM.from_parts(target, draft, tokenizer=None, token_bytes=BYTES, **options)


def ids(outputs) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(target):
    """Texts of the requests one after the other, without drafts, chunks, reuse and graphs."""

    @functools.cache
    def texts(name: str) -> list[list[int]]:
        with engine(target, max_running=1, prefix_cache=False, cuda_graphs=False) as llm:
            assert isinstance(llm._loop.backend, DeviceBackend)
            return [ids(llm.generate([prompt], PARAMS[name]))[0] for prompt in PROMPTS]

    return texts


@pytest.fixture
def knowing(alone):
    def draft(name: str, **options) -> KnowingThere:
        return KnowingThere([prompt + text for prompt, text in zip(PROMPTS, alone(name), strict=True)], **options)

    return draft


@pytest.mark.parametrize(
    "name, options",
    [
        ("greedy", {}),
        ("seeded", {"max_batch_tokens": 7}),
        ("greedy", {"max_batch_tokens": 24, "page_size": 1}),
        ("seeded", {"num_pages": 22, "max_running": 4}),
    ],
    ids=["together", "chunks", "longer chunks", "few pages"],
)
def test_drafts_chunks_reuse_and_retraction_change_nothing(target, alone, knowing, name, options):
    with engine(target, knowing(name), **options) as llm:
        assert isinstance(llm._loop.backend, DeviceBackend) and target.path == "layers"
        assert ids(llm.generate(PROMPTS, PARAMS[name], draft=False)) == alone(name)
        for _ in range(2):
            assert ids(llm.generate(PROMPTS, PARAMS[name])) == alone(name)
            with llm.stream([PROMPTS[2], PROMPTS[3]], PARAMS[name]) as gone:
                next(gone)
        stats = llm.stats()
        assert stats["tau"] > 1.5 and stats["running"] == stats["waiting"] == stats["steps_ahead"] == 0
        assert (stats["retractions"] > 0) == ("num_pages" in options)
        again = llm.generate([PROMPTS[3]], PARAMS[name])[0]
        assert again.metrics["cached_prompt_tokens"] > 0 and again.token_ids == alone(name)[3]
        assert {key[0] for key in llm._loop.backend.graphs._captured} == {"draft", "verify"}


def test_states_stand_where_plain_steps_leave_them_when_everything_is_rejected(target, alone, knowing):
    with engine(target, knowing("greedy", wrong="all")) as llm:
        assert ids(llm.generate(PROMPTS, PARAMS["greedy"])) == alone("greedy")
        assert llm.stats()["tau"] == 1


def test_a_pass_is_two_launches_a_layer_and_asks_the_device_for_nothing(target, driver, knowing, monkeypatch):
    with engine(target, knowing("greedy"), prefix_cache=False) as llm:
        llm.generate(PROMPTS[:3], PARAMS["greedy"])  # graphs are captured: from here on each pass runs once
        backend, passes = llm._loop.backend, []
        launch = backend.launch

        def counted(step):
            passes.append(bool(step.plan.is_prefill.any()))
            if passes[-1]:
                return launch(step)
            with Crossings() as seen:
                flight = launch(step)
            assert seen.log == ["copy_", "copy_"], "one up, one down"
            return flight

        monkeypatch.setattr(backend, "launch", counted)
        before = [driver.dflash_launches(name) for name in (b"delta_inputs", b"delta_rule_32")]
        llm.generate(PROMPTS[:3], PARAMS["greedy"])
        after = [driver.dflash_launches(name) for name in (b"delta_inputs", b"delta_rule_32")]
        assert passes.count(False) > 2
        assert [now - then for now, then in zip(after, before)] == [LAYERS * len(passes)] * 2


def test_log_probabilities_are_those_of_a_forward_that_does_not_stay_on_the_device(target, knowing):
    with engine(target, knowing("greedy"), max_batch_tokens=16) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, logprobs=0)
        (output,) = llm.generate([PROMPTS[3]], params)
        for place, entry in enumerate(output.logprobs):
            logits = llm.next_token_logits(PROMPTS[3] + output.token_ids[:place]).astype(np.float64)
            scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            assert entry.logprob == pytest.approx(scores[entry.token_id], abs=0.1)


@pytest.mark.parametrize("fault", ["no restore", "no keep", "no copy", "fold nothing"])
def test_a_broken_state_is_seen(target, alone, knowing, monkeypatch, fault):
    with engine(target, knowing("greedy"), max_batch_tokens=64) as llm:
        state = llm._loop.backend._state
        if fault == "fold nothing":
            running = state.running

            def moved(query_starts, lens, slots, *rest):
                for room in state._rooms.values():
                    room.stands.index_copy_(0, slots.clamp(max=room.stands.shape[0] - 1), lens)
                return running(query_starts, lens, slots, *rest)

            monkeypatch.setattr(state, "running", moved)
        else:
            name = {"no restore": "restore", "no keep": "keep", "no copy": "save"}[fault]
            monkeypatch.setattr(state, name, lambda *_: None)
        outputs = [llm.generate(PROMPTS, PARAMS["greedy"]) for _ in range(2)]
    assert any(output.token_ids != text for some in outputs for output, text in zip(some, alone("greedy")))


@pytest.mark.parametrize("inside", [True, False], ids=["before a layer", "behind it"])
def test_an_interruption_anywhere_in_a_pass_leaves_each_layer_before_or_behind_it(
    target, alone, knowing, monkeypatch, inside
):
    with engine(target, knowing("greedy"), cuda_graphs=False, max_batch_tokens=12) as llm:
        state, calls = llm._loop.backend._state, 0
        mix = state.mix

        def interrupted(index, hidden):
            nonlocal calls
            calls += 1
            if inside and calls % 7 == 3:
                raise KeyboardInterrupt
            found = mix(index, hidden)
            if not inside and calls % 7 == 5:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(state, "mix", interrupted)
        stream = llm.stream(PROMPTS, PARAMS["greedy"])
        interruptions = 0
        while llm._requests.active:
            try:
                llm._loop.step()
            except KeyboardInterrupt:
                interruptions += 1
        texts = {event.index: event.output.token_ids for event in stream if event.output is not None}
    assert interruptions > 5 and [texts[i] for i in range(len(PROMPTS))] == alone("greedy")


def test_what_a_pass_costs_is_measured_and_disturbs_no_text(target, alone, knowing, monkeypatch):
    monkeypatch.setattr(device_step, "_ROUNDS", 1)
    with engine(target, knowing("greedy"), adaptive=True) as llm:
        assert [rows for rows, _ in llm.costs.target] == [1, 2, 3, 5, 10]
        assert ids(llm.generate(PROMPTS, PARAMS["greedy"])) == alone("greedy")


def test_constraints_and_scores_run_beside_the_graphs(target, alone, knowing):
    def nothing(output, row):
        return row

    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, logprobs=2)
    with engine(target, knowing("greedy")) as llm:
        assert ids(llm.generate(PROMPTS, params)) == alone("greedy")
        edited = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, logits_processors=[nothing])
        assert ids(llm.generate(PROMPTS, edited)) == alone("greedy")
        assert llm.stats()["tau"] > 1.5


def test_what_has_no_kernel_does_not_stay_on_the_device(gpu, target):
    assert serves(target, None)
    for kind in ("kimi", "bamba", "dense"):  # other rules, and keys of eight elements
        other = TargetModel(build(kind).to(torch.bfloat16))
        assert other.state.on_device() is None and not serves(other, None)
    assert not serves(TargetModel(build("dense")), None)


EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
OLMO = {
    "layer_types": ["linear_attention"] * LAYERS + ["full_attention"],
    "linear_allow_neg_eigval": True,
    "eos_token_id": None,
}


@pytest.mark.parametrize(
    "kind, options, path",
    [
        ("Qwen3Next", EXPERTS, "modules"),
        ("Qwen3Next", EXPERTS | {"num_experts": 0}, "layers"),
        ("OlmoHybrid", OLMO, "modules"),
    ],
    ids=["experts", "next", "olmo"],
)
def test_only_layers_that_ask_for_nothing_are_in_a_graph(target, kind, options, path):
    other = made(kind, **options)
    assert other.path == path
    assert ("asks the device for values" in other.path_reason) == (options is EXPERTS)
    with engine(other) as llm:
        plain = ids(llm.generate(PROMPTS[:3], PARAMS["seeded"]))
        backend = llm._loop.backend
        assert isinstance(backend, DeviceBackend) and (len(backend.graphs) > 0) == (path == "layers")
    texts = [prompt + text for prompt, text in zip(PROMPTS, plain)]
    with engine(other, KnowingThere(texts)) as llm:
        assert ids(llm.generate(PROMPTS[:3], PARAMS["seeded"])) == plain
        assert llm.stats()["tau"] > 1.5

"""Checkpoints that must not be taken for what they are not: quantized weights, the checkpoint's own code, numbers out of range."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import checkpoint_helpers as helpers
import pytest
import torch
from checkpoint_helpers import edit, tensors

from dflash_rs import LLM, CheckpointError, DflashError, InvalidArgument, SamplingParams
from dflash_rs.errors import UnsupportedModel
from dflash_rs.models import checkpoint
from dflash_rs.models.loader import load_draft
from dflash_rs.models.target import TargetModel

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return helpers.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def target(pair, tmp_path):
    return helpers.copy(pair / "target", tmp_path / "target")


@pytest.fixture
def draft(pair, tmp_path):
    return helpers.copy(pair / "draft", tmp_path / "draft")


class NoInput(io.StringIO):
    """Standard input of a program that asks nobody anything."""

    def read(self, *_):
        raise AssertionError("standard input was read")

    readline = __next__ = read


@pytest.fixture(autouse=True)
def nobody_is_asked_and_nothing_is_printed(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", NoInput())
    yield
    assert capfd.readouterr().out == ""


def refused(folder, message: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        TargetModel.load(folder)
    text = str(caught.value)
    assert "\n" not in text and message in text, text
    return text


def test_the_tiny_pair_itself_works(pair):
    with LLM(pair / "target", pair / "draft", device="cpu") as engine:
        fast, plain = (engine.generate("def f", SamplingParams(max_tokens=8), draft=d)[0] for d in (True, False))
        assert fast.error is None and fast.token_ids == plain.token_ids


def test_a_target_that_would_answer_in_tuples_is_asked_not_to(target):
    params = SamplingParams(max_tokens=4)
    texts = []
    for folder in (target, edit(target, return_dict=False)):
        with LLM(folder, None, device="cpu") as engine:
            texts.append(engine.generate("def f", params)[0].token_ids)
    assert texts[0] == texts[1]


# ---- quantized weights -------------------------------------------------------------------------------------------

SCALED = {
    "int8": lambda w: (w * 100).to(torch.int8),
    "uint8": lambda w: (w.abs() * 100).to(torch.uint8),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "bool": lambda w: w > 0,
    "complex": lambda w: w.to(torch.complex64),
}


@pytest.mark.parametrize("kind", SCALED)
def test_weights_that_need_scales_are_not_read_as_values(target, kind):
    tensors(target, lambda t: t.update({UP: SCALED[kind](t[UP]), UP + "_scale": torch.ones(1)}))
    text = refused(target, f"{UP}: got ")
    assert "expected a floating-point type of at least 16 bits" in text


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_parts_that_transformers_puts_together_are_looked_at_as_well(tmp_path, kind):
    """Experts are stored one by one and become one tensor: their names are none of the model's."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert checkpoint.load_causal_lm(tmp_path / "moe")[1] == []
    tensors(tmp_path / "moe", lambda t: t.update({name: SCALED[kind](t[name])}))
    with pytest.raises(CheckpointError, match=f"{name}: got "):
        checkpoint.load_causal_lm(tmp_path / "moe")


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("method", ["made_up", None, 5, ["fp8"]])
def test_a_quantization_that_transformers_does_not_know_is_refused(target, kind, method):
    tensors(target, lambda t: t.update({UP: SCALED[kind](t[UP])}))
    edit(target, quantization_config={"quant_method": method, "bits": 8})
    refused(target, "config.json: quantization_config.quant_method: got ")


@pytest.mark.parametrize("where", ["top", "nested"])
def test_a_quantization_that_is_no_object_is_refused(target, where):
    about = {"quantization_config": [1]}
    edit(target, **(about if where == "top" else {"text_config": about}))
    refused(target, "quantization_config: got [1], expected an object")


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "optimum"),
        ("awq", "gptqmodel"),
        ("bitsandbytes", "accelerate"),
        ("compressed-tensors", "compressed-tensors"),
        ("fp8", "accelerate"),
        ("torchao", "torchao"),
    ],
)
def test_a_missing_package_of_a_quantization_is_named(target, method, package):
    if method == "torchao":
        about = {"quant_method": method, "quant_type": "int8_weight_only"}
    else:
        about = {"quant_method": method, "bits": 4, "load_in_8bit": method == "bitsandbytes"}
    edit(target, quantization_config=about)
    import importlib.util

    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed here")
    assert package in refused(target, "")


def test_the_command_line_says_it_in_one_line_and_ends_with_2(target, capfd):
    from dflash_rs.cli import main

    edit(target, quantization_config={"quant_method": "gptq", "bits": 4})
    assert main(["generate", "x", "--model", str(target), "--no-draft"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("dflash-rs: error: target ") and error.count("\n") == 1 and "optimum" in error


def test_a_quantizer_that_is_attached_is_trusted(target, monkeypatch):
    """Its numbers are its own: here they are the weights as they are."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def __init__(self, **_):
            self.quant_method = "ours"

    class Ours(HfQuantizer):
        requires_calibration = False
        is_trainable = False

        def is_serializable(self, **_):
            return True

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "ours", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "ours", Ours)
    edit(target, quantization_config={"quant_method": "ours"})
    assert TargetModel.load(target).model.hf_quantizer is not None
    # And one that is known by name, but does not come to the model.
    real = auto.get_hf_quantizer
    import transformers.modeling_utils as modeling

    monkeypatch.setattr(modeling, "get_hf_quantizer", lambda c, q, d, *a, **k: (None, real(c, q, d, *a, **k)[1], d))
    refused(target, "no quantizer was attached")


def test_a_drafters_weights_are_real_floating_point_numbers(draft):
    name = "layers.0.mlp.up_proj.weight"
    original = (draft / "model.safetensors").read_bytes()
    for kind, change in SCALED.items():
        (draft / "model.safetensors").write_bytes(original)
        tensors(draft, lambda t, change=change: t.update({name: change(t[name])}))
        with pytest.raises(CheckpointError, match=f"{name}: got .*, expected a floating-point type"):
            load_draft(draft)
        assert kind
    (draft / "model.safetensors").write_bytes(original)
    edit(draft, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="quantization_config: got .* expected nothing"):
        load_draft(draft)


# ---- pickles -----------------------------------------------------------------------------------------------------


def as_pickle(folder, change=lambda t: None, **options):
    from safetensors.torch import load_file

    values = load_file(folder / "model.safetensors")
    change(values)
    torch.save(values, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickle_of_tensors_is_loaded_and_looked_through(target):
    whole = TargetModel.load(target, dtype=torch.float32).model.state_dict()
    as_pickle(target)
    again = TargetModel.load(target, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    original = torch.load(target / "pytorch_model.bin")
    for change in SCALED.values():
        torch.save(original | {UP: change(original[UP])}, target / "pytorch_model.bin")
        refused(target, f"{UP}: got torch.")


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(target, tmp_path, legacy):
    as_pickle(target)
    mark = tmp_path / "was_run"
    if legacy:
        (target / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(mark)}))
    else:
        torch.save({"x": Evil(mark)}, target / "pytorch_model.bin")
    refused(target, "pytorch_model.bin: cannot be read as plain tensors (UnpicklingError")
    assert not mark.exists()
    for junk in (b"", b"abc", pickle.dumps(5), pickle.dumps([1])):
        (target / "pytorch_model.bin").write_bytes(junk)
        refused(target, "pytorch_model.bin: ")


# ---- the checkpoint's own code -----------------------------------------------------------------------------------

CODE = "import os\nos.mkdir({mark!r})\nfrom transformers import Qwen3Config as C, Qwen3ForCausalLM as M, PreTrainedTokenizerFast as T\n"


def with_code(folder, tmp_path):
    mark = tmp_path / "was_run"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    return mark


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "made_up", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
        {"model_type": ..., "auto_map": {"AutoConfig": "own.C"}},
        {"architectures": ["MadeUpForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.M"}},
        {"model_type": "vit", "architectures": ["ViTModel"], "auto_map": {"AutoModelForCausalLM": "own.M"}},
        {"model_type": "made_up", "auto_map": {"AutoConfig": "other/repository--own.C"}},
        {"auto_map": ["own.C"]},
    ],
    ids=str,
)
def test_a_checkpoint_that_needs_its_own_code_is_refused_and_nothing_is_run(target, tmp_path, changes):
    mark = with_code(target, tmp_path)
    text = refused(edit(target, **changes), "config.json: ")
    assert "auto_map" in text or "model_type" in text
    assert not mark.exists()


def test_a_checkpoint_with_code_that_is_not_needed_loads_natively(target, tmp_path):
    mark = with_code(target, tmp_path)
    edit(target, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    edit(target, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]})
    with LLM(target, draft=None, device="cpu") as engine:
        assert type(engine._target.model).__module__.startswith("transformers.models.")
        assert engine.decode(engine.encode("def f(x):")) == "def f(x):"
    assert not mark.exists()


@pytest.mark.parametrize("own", [["own.T", None], {"AutoTokenizer": [None, "own.T"]}])
def test_a_tokenizer_that_needs_its_own_code_is_refused(target, tmp_path, own):
    mark = with_code(target, tmp_path)
    edit(target, "tokenizer_config.json", auto_map=own, tokenizer_class="MadeUpTokenizer")
    with pytest.raises(
        CheckpointError, match="tokenizer .*auto_map: got .*MadeUpTokenizer needs the checkpoint's own code"
    ):
        LLM(target, draft=None, device="cpu")
    assert not mark.exists()


def test_no_kernel_is_fetched_by_a_configuration(target):
    refused(edit(target, attn_implementation="somebody/kernel"), "attn_implementation: got 'somebody/kernel'")
    refused(
        edit(target, attn_implementation=..., fusion_config={"a": True}),
        "fusion_config: got {'a': True}, expected nothing",
    )
    # What the checkpoint was saved with needs a package; the engine has an attention of its own.
    edit(target, fusion_config=..., attn_implementation="flash_attention_2")
    assert TargetModel.load(target).path == "fused"
    edit(target, attn_implementation=..., _attn_implementation="flash_attention_2")
    assert TargetModel.load(target).path == "fused"


def test_a_trainings_target_is_looked_at_in_the_same_way(target, tmp_path):
    from dflash_rs.train import drafter
    from dflash_rs.train.drafter import DrafterTraining

    mark = with_code(target, tmp_path)
    edit(target, model_type="made_up", auto_map={"AutoConfig": "own.C"})
    with pytest.raises(CheckpointError, match="auto_map"):
        drafter.train(DrafterTraining(), target, tmp_path, tmp_path, tmp_path / "out", device="cpu")
    assert not mark.exists()


def test_a_run_is_not_gone_on_with_from_a_pickle_with_code_in_it(tmp_path):
    from dflash_rs.train.common import load_checkpoint, save_checkpoint

    file = tmp_path / "checkpoint.pt"
    assert load_checkpoint(file) is None
    save_checkpoint(file, {"step": 3})
    assert load_checkpoint(file) == {"step": 3}
    torch.save(Evil(tmp_path / "was_run"), file)
    with pytest.raises(CheckpointError, match="checkpoint.pt: cannot be loaded"):
        load_checkpoint(file)
    assert not (tmp_path / "was_run").exists()


def test_nobody_is_asked_by_the_command_line_even_where_somebody_would_say_yes(target, tmp_path):
    mark = with_code(target, tmp_path)
    edit(target, model_type="made_up", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    command = [sys.executable, "-m", "dflash_rs", "generate", "x", "--no-draft", "--model", str(target)]
    done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dflash-rs: error: target ") and done.stderr.count("\n") == 1
    assert not mark.exists()


# ---- numbers -----------------------------------------------------------------------------------------------------

TARGET_NUMBERS = [
    ({"num_hidden_layers": 3000, "layer_types": ...}, "num_hidden_layers: got 3000, expected at most 3: there are tensors for no more layers"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers: got 1000000000000, expected an integer in 1..16384"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads: got 0, expected an integer in 1..65536"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
    ({"head_dim": 0}, "head_dim: got 0"),
    ({"head_dim": -4}, "head_dim: got -4"),
    ({"hidden_size": 10**12}, "hidden_size: got 1000000000000"),
    ({"hidden_size": 32.5}, "hidden_size: got 32.5"),
    ({"hidden_size": 1 << 20}, "got shape"),
    ({"intermediate_size": 1 << 22}, "got shape [48, 32], expected [4194304, 32]"),
    ({"vocab_size": 10**12}, "vocab_size: got 1000000000000"),
    ({"vocab_size": 10**9}, "got shape [4096, 32], expected [1000000000, 32]"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings: got 1000000000000, expected an integer in 1..67108864"),
    ({"max_position_embeddings": -5}, "max_position_embeddings: got -5"),
    ({"max_position_embeddings": True}, "max_position_embeddings: got True"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta: got nan"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta: got 0"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "rope_parameters.factor: got 0"),
    ({"rope_parameters": [1]}, "rope_parameters: got "),
    ({"rope_parameters": ..., "rope_theta": float("inf")}, "rope_theta: got inf"),
    ({"partial_rotary_factor": 1e9}, "partial_rotary_factor: got 1000000000.0"),
    ({"num_labels": 10**12}, "num_labels: got 1000000000000"),
    ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window: got 0"),
    ({"eos_token_id": "x"}, "eos_token_id: got 'x'"),
    ({"eos_token_id": [0, 10**9]}, "eos_token_id: got [0, 1000000000], expected token ids in 0..4095"),
    ({"some_scale": float("inf")}, "some_scale: got inf, expected a finite number"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": {"__float__": "NaN"}}}, "rope_theta: got nan"),
    ({"big": 10**400}, "big: got 1000"),
    ({"model_type": 5}, "model_type: got 5"),
    ({"model_type": "made_up"}, "made_up"),
    ({"transformers_weights": "../other.safetensors"}, "transformers_weights: got '../other.safetensors'"),
    ({"transformers_weights": "nowhere.safetensors"}, "nowhere.safetensors: not found"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), TARGET_NUMBERS, ids=str)
def test_a_targets_field_that_cannot_be_meant_is_named(target, changes, message):
    refused(edit(target, **changes), message)


TARGET_NAMES = [
    ({"hidden_act": "foo"}, "config.json: hidden_act: got 'foo', expected an activation that transformers knows (gelu, "),
    ({"hidden_act": 5}, "'hidden_act' expected str, got int (value: 5)"),
    ({"model_type": "foo"}, "config.json: model_type: got 'foo', expected a name that transformers knows"),
    ({"dtype": "foo"}, "config.json: dtype: got 'foo', expected the name of a type of torch"),
    ({"dtype": 5}, "config.json: dtype: got 5, expected the name of a type of torch"),
    ({"dtype": "nn"}, "config.json: dtype: got 'nn', expected the name of a type of torch"),
    ({"layer_types": ["full_attention", "foo", "full_attention"]}, "config.json: layer_types: got 'foo', expected layers"),
    ({"layer_types": "foo"}, "layer_types: got 'foo', expected layers"),
    ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "rope_type: got 'foo', expected one whose angles"),
    ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "rope_type: got ['x'], expected one whose angles"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), TARGET_NAMES, ids=str)
def test_a_name_in_a_configuration_that_nobody_knows_is_shown_with_its_field(target, changes, message):
    """transformers raises the name alone, as in ``KeyError: 'foo'``."""
    with pytest.raises((CheckpointError, UnsupportedModel)) as caught:
        TargetModel.load(edit(target, **changes))
    assert "\n" not in str(caught.value) and message in str(caught.value)


def test_a_window_that_its_architecture_leaves_off_is_not_refused(target):
    # As transformers writes it for Qwen2-MoE, and as a file says that leaves out what is the default.
    TargetModel.load(edit(target, sliding_window=0, use_sliding_window=...))


def test_a_name_that_nobody_reads_is_not_refused(target):
    TargetModel.load(edit(target, classifier_activation="foo", torch_dtype="auto"))


@pytest.mark.parametrize(
    ("eos", "named"), [("x", "'x'"), (-1, "-1"), ([0, "y"], "[0, 'y']"), (True, "True"), (9999, "9999")]
)
def test_an_end_token_that_is_no_token_is_named(target, eos, named):
    refused(
        edit(target, "generation_config.json", eos_token_id=eos),
        f"generation_config.json: eos_token_id: got {named}, expected",
    )


def test_damaged_generation_settings_are_not_passed_over(target):
    """transformers would go on without them, and a text would not end where it should."""
    (target / "generation_config.json").write_text('{"eos_token_id"')
    refused(target, "generation_config.json: not readable as JSON")


def test_a_field_of_a_model_in_hand_is_named_too():
    from models_helpers import qwen3_target

    target = TargetModel(qwen3_target())
    target.config.max_position_embeddings = -5
    with pytest.raises(CheckpointError, match="target Qwen3ForCausalLM: max_position_embeddings: got -5"):
        target.max_context  # noqa: B018
    target.model.generation_config.eos_token_id = ["x"]
    with pytest.raises(CheckpointError, match=r"eos_token_id: got \['x'\]"):
        target.eos_token_ids  # noqa: B018


DRAFT_NUMBERS = [
    ({"num_hidden_layers": 10**12}, "num_hidden_layers: got 1000000000000, expected at most 1024"),
    ({"num_hidden_layers": 900, "layer_types": ...}, "num_hidden_layers: got 900, expected 1: there are tensors for no more"),
    ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
    ({"head_dim": 0}, "head_dim: got 0"),
    ({"head_dim": 10**12}, "head_dim: got 1000000000000"),
    ({"hidden_size": 10**12}, "hidden_size: got 1000000000000"),
    ({"intermediate_size": 10**12}, "intermediate_size: got 1000000000000"),
    ({"num_target_layers": 10**12}, "num_target_layers: got 1000000000000"),
    ({"max_position_embeddings": -1}, "max_position_embeddings: got -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps: got 1000"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta: got nan"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 0}}, "factor to be a number above 0"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": float("nan")}}, "factor to be a number above 0"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast to be"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "mscale": float("inf")}}, "mscale to be"),
    ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 0]}}, "target_layer_ids: got [0, 0], expected every layer once"),
    ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0] * 10**5}}, "target_layer_ids: got [0, 0, "),
    ({"input_embedding_scale": 1e39}, "input_embedding_scale: got 1e+39"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), DRAFT_NUMBERS, ids=lambda value: str(value)[:60])
def test_a_drafters_field_that_cannot_be_meant_is_named(draft, changes, message):
    with pytest.raises(CheckpointError) as caught:
        load_draft(edit(draft, **changes))
    assert f"config.json: {message.split(' to be')[0].split(':')[0]}" in str(caught.value) or message in str(
        caught.value
    )
    assert message in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_brackets_in_brackets_are_an_error_like_any_other(target, name):
    (target / name).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=f"{name}: not readable as JSON"):
        LLM(target, draft=None, device="cpu")


def test_brackets_in_a_drafters_configuration_and_index_are_errors_like_any_other(draft):
    (draft / "model.safetensors.index.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="index.json: not readable as JSON"):
        load_draft(draft)
    (draft / "config.json").write_text('{"a":' * 200_000)
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON"):
        load_draft(draft)


# ---- files -------------------------------------------------------------------------------------------------------


def sharded(folder, weight_map=None):
    """The weights in one shard with an index."""
    shutil.move(folder / "model.safetensors", folder / "one.safetensors")
    names = list(checkpoint.stored_tensors({folder / "one.safetensors": []}, "a model"))
    values = {
        "metadata": {"total_size": 1},
        "weight_map": weight_map or dict.fromkeys(names, "one.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))
    return folder


def test_shards_are_read(target, draft):
    assert TargetModel.load(sharded(target)).num_layers == helpers.LAYERS
    assert load_draft(sharded(draft)).config.num_hidden_layers == 1


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 5, None, "x\0y"])
def test_an_index_leads_to_no_file_outside_the_folder(target, draft, name):
    for folder, load in ((target, TargetModel.load), (draft, load_draft)):
        shutil.copy(folder / "model.safetensors", folder.parent / "one.safetensors")
        with pytest.raises(CheckpointError, match="is not a plain file name"):
            load(sharded(folder, {"a": name}))


@pytest.mark.parametrize("index", [{"weight_map": 5}, {"weight_map": []}, {"metadata": 5}, {"metadata": ...}])
def test_an_index_of_another_form_is_refused(target, index):
    edit(sharded(target), "model.safetensors.index.json", **index)
    refused(target, f"model.safetensors.index.json: {'not an index' if 'weight_map' in index else 'metadata: got '}")


def test_a_shard_that_is_not_there_or_lacks_a_tensor_is_named(target):
    sharded(target, {UP: "two.safetensors"})
    refused(target, "two.safetensors: not found")
    edit(target, "model.safetensors.index.json", weight_map={"not.there": "one.safetensors"})
    refused(target, "one.safetensors: not.there: not there, but the index places it in this shard")


def test_what_transformers_would_put_on_top_of_the_weights_is_refused(target):
    edit(target, "adapter_config.json", base_model_name_or_path="somewhere/else")
    refused(target, "adapter_config.json: an adapter is not applied")
    (target / "adapter_config.json").unlink()
    shutil.copy(target / "model.safetensors", target / "shard-00001-model-00001-of-00001.safetensors")
    refused(target, "a part of a distributed checkpoint")


def test_a_tokenizer_is_not_read_from_elsewhere(target):
    shutil.copy(target / "tokenizer.json", target.parent / "tokenizer.1.0.json")
    for key, value in (
        ("tokenizer_file", "../tokenizer.1.0.json"),
        ("fast_tokenizer_files", ["../tokenizer.1.0.json"]),
    ):
        edit(target, "tokenizer_config.json", **{key: value})
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json: {key}: got .*expected a file in the folder"):
            LLM(target, draft=None, device="cpu")
        edit(target, "tokenizer_config.json", **{key: ...})
    assert checkpoint.load_tokenizer(target)("a").input_ids


def test_a_pipe_is_not_waited_for(target, draft):
    for folder, load, name in ((target, TargetModel.load, "model.safetensors"), (draft, load_draft, "config.json")):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=name):
            load(folder)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "/nowhere/at/all", "three/parts/here", "~/model", "../model"])
def test_a_path_that_is_none_is_one_of_our_errors(path):
    with pytest.raises(CheckpointError):
        TargetModel.load(path)
    with pytest.raises(CheckpointError):
        load_draft(path)


def test_a_file_or_something_else_is_no_folder(target):
    refused(target / "model.safetensors", "got a file, expected a folder")
    for value in (5, None, b"x", ["a"]):
        with pytest.raises(InvalidArgument, match="^model: got"):
            TargetModel.load(value)


def test_a_model_in_the_hubs_cache_is_loaded_by_its_name(pair, tmp_path):
    """Without a network: what lies in the cache counts, links to blobs and all."""
    commit, root = "0" * 40, tmp_path / "hub" / "models--some--model"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True), (root / "blobs").mkdir(), (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for file in (pair / "target").iterdir():
        shutil.copy(file, root / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    code = (
        "from dflash_rs import LLM, SamplingParams\n"
        "with LLM('some/model', draft=None, device='cpu') as e: print(len(e.generate('a', SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))\n"
        "try: LLM('some/other', draft=None)\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "3" and lines[1].startswith("CheckpointError target some/other: "), done


def test_sglangs_drafter_is_checked_without_raw_exceptions(draft):
    from types import SimpleNamespace

    from dflash_rs.sglang import drafter

    target = SimpleNamespace(hidden_size=helpers.WIDTH, num_hidden_layers=helpers.LAYERS, vocab_size=4096)
    good = dict(hidden_size=helpers.WIDTH, num_hidden_layers=1, num_target_layers=helpers.LAYERS, vocab_size=4096)
    good |= {"dflash_config": {"target_layer_ids": [0, 1], "mask_token_id": 1}, "architectures": ["DFlashDraftModel"]}
    assert drafter.check(str(draft), SimpleNamespace(**good), target) == []
    for changes, named in (
        ({"hidden_size": "x"}, "hidden_size: got 'x', expected an integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: got None"),
        ({"dflash_config": [1]}, "dflash_config: got list"),
        ({"dflash_config": {"target_layer_ids": 5}}, "target_layer_ids: got 5, expected a list"),
        ({"dflash_config": {"target_layer_ids": ["a"]}}, "target_layer_ids: got "),
        ({"dflash_config": {"mask_token_id": "a"}}, "mask_token_id: got 'a'"),
    ):
        with pytest.raises(CheckpointError, match=named.replace("[", r"\[")):
            drafter.check(str(draft), SimpleNamespace(**(good | changes)), target)
    (draft / "model.safetensors.index.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        drafter.check(str(draft), SimpleNamespace(**good), target)
    model = torch.nn.Linear(2, 2).to(torch.complex64)
    (draft / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="got complex numbers"):
        drafter.check(str(draft), SimpleNamespace(**good), target, model)


def test_what_is_refused_leaves_no_warning_of_ours_behind(target):
    edit(target, num_attention_heads=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DflashError):
            TargetModel.load(target)


# ---- the cheap before the dear -----------------------------------------------------------------------------------


def no_target(*_, **__):
    raise AssertionError("the target's weights were read")


def spoilt(target, draft, what: str) -> tuple[object, str]:
    """A fault in what goes with a target, and what is said of it."""
    if what == "tokenizer.json":
        (target / what).write_text('{"version"')
        return draft, "tokenizer.json: not readable as JSON"
    if what == "no tokenizer":
        (target / "tokenizer.json").write_text("{}")
        return draft, "tokenizer "
    if what == "config.json of the drafter":
        (draft / "config.json").write_text("[")
        return draft, "config.json: not readable as JSON"
    if what == "another target's drafter":
        return edit(draft, num_target_layers=helpers.LAYERS + 1), f"expected the target's {helpers.LAYERS}"
    if what == "a tensor less":
        tensors(draft, lambda t: t.pop("norm.weight"))
        return draft, "norm.weight: missing tensor"
    if what == "half a drafter":
        file = draft / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        return draft, "damaged or truncated safetensors file"
    return draft / "nowhere", "not found"


@pytest.mark.parametrize(
    "what",
    ["tokenizer.json", "no tokenizer", "config.json of the drafter", "another target's drafter", "a tensor less", "half a drafter", ""],
)  # fmt: skip
def test_what_does_not_go_with_a_target_is_found_before_its_weights_are_read(target, draft, monkeypatch, what):
    from dflash_rs.models.target import load

    drafter, message = spoilt(target, draft, what)
    monkeypatch.setattr(load.checkpoint, "load_causal_lm", no_target)
    with pytest.raises(CheckpointError) as caught:
        LLM(target, drafter, device="cpu")
    assert message in str(caught.value)


def test_a_targets_own_faults_are_told_before_those_of_what_goes_with_it(target, draft):
    edit(target, hidden_act="foo")
    (target / "tokenizer.json").write_text("[")
    (draft / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="hidden_act: got 'foo'"):
        LLM(target, draft, device="cpu")

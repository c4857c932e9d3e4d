"""A target: its files compared with each other, and loading it through transformers."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from .config import RawConfig, check_generation, load_config
from .folder import target_folder
from .ranges import check_eos
from .reading import readable, short_reason, some
from .tensors import Stored, check_indices, stored_tensors, tensor_files

# Values of buffers (angles, masks) that a model may have beside what is stored: a gigabyte of float32.
_MOST_BUFFER = 1 << 28


@dataclass(frozen=True)
class Described:
    """A target as its files describe it, looked through, without a weight read. `path` is its name in errors."""

    path: str | Path
    folder: Path
    raw: RawConfig
    config: Any
    tensors: dict[str, Stored]
    quantized: bool


def describe_causal_lm(path: str | Path, architecture=None) -> Described:
    """What a target's files say, compared with each other: everything that can be refused before its weights are read.

    `architecture(config)` is called before any tensor is looked at, to refuse what does not run. Raises CheckpointError.
    """
    from transformers import AutoModelForCausalLM

    folder = target_folder(path)
    config = load_config(folder, path)
    with readable(path):
        if architecture is not None:
            architecture(config)
        raw = RawConfig(folder, path)
        quantized = raw.check_quantization()
        _refuse_beside(folder, path)
        tensors = stored_tensors(tensor_files(folder, raw.values.get("transformers_weights")), "a model")
        raw.check_layers(tensors)
        check_indices(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise raw.fail(
                "model_type", raw.values.get("model_type"), "that of a causal language model in transformers"
            )
        vocab = getattr(config.get_text_config(), "vocab_size", None)
        check_eos(raw.where, raw.values.get("eos_token_id"), vocab)
        check_generation(folder, path, vocab)
        with raw.blamed():
            _check_stored(path, config, tensors, quantized)
        return Described(path, folder, raw, config, tensors, quantized)


def load_causal_lm(
    about: str | Path | Described, dtype: torch.dtype | str = "auto", architecture=None
) -> tuple[nn.Module, list[str]]:
    """A target's model on the CPU, all of whose weights come from its files, and the names of tensors it has no place for.

    `about` is a folder, a hub name, or what `describe_causal_lm` made of one. Raises CheckpointError.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(about, Described):
        about = describe_causal_lm(about, architecture)
    with readable(about.path), about.raw.blamed():
        model, found = AutoModelForCausalLM.from_pretrained(
            about.folder,
            config=about.config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        _check_found(about.path, model, found, about.tensors, about.quantized)
        return model, sorted(found["unexpected_keys"])


def _refuse_beside(folder: Path, path: str | Path) -> None:
    """What transformers would load instead of, or on top of, the weights."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"target {path}: adapter_config.json: an adapter is not applied, expected a model with the adapter merged into its weights"
        )
    for file in folder.iterdir():
        if re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$", file.name):
            raise CheckpointError(
                f"target {path}: {file.name}: a part of a distributed checkpoint, expected model.safetensors"
            )


def _check_stored(path: str | Path, config, tensors: dict[str, Stored], quantized: bool) -> None:
    """Refuses a model that is larger than what is stored, or stored in other types, by shapes and types alone."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return  # an architecture that looks at values while it is built; it is seen through once it is loaded
    if not quantized:
        _check_plain(path, model, tensors, None)
    needed = sum(parameter.numel() for parameter in model.parameters())
    # A packed number of eight bytes holds 64 weights at most. Plain weights are stored once, but for those that are tied.
    held = sum(tensor.numel for tensor in tensors.values()) * (64 if quantized else 2) + 2**16
    if needed > held:
        for name, parameter in model.named_parameters():
            stored = next((tensors[n] for n in _spellings(model, name) if n in tensors), None)
            if not quantized and stored is not None and stored.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"target {path}: {name}: got shape {list(stored.shape)}, expected {list(parameter.shape)} from config.json"
                )
        raise CheckpointError(
            f"target {path}: config.json describes a model of {needed:,} weights, but the files hold "
            f"{sum(tensor.numel for tensor in tensors.values()):,} values"
        )
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > max(held, _MOST_BUFFER):
        raise CheckpointError(
            f"target {path}: config.json describes tables of {buffers:,} values, more than could be meant"
        )


def _check_found(path, model: nn.Module, found: dict[str, Any], tensors: dict[str, Stored], quantized: bool) -> None:
    lost = sorted(found["missing_keys"])
    if lost:
        raise CheckpointError(f"target {path}: {len(lost)} tensors are missing ({some(lost)})")
    for name, got, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"target {path}: {name}: got shape {list(got)}, expected {list(expected)} from config.json"
        )
    if found.get("error_msgs"):
        raise CheckpointError(f"target {path}: cannot be loaded ({short_reason(ValueError(found['error_msgs'][0]))})")
    if quantized:
        # A quantizer that has turned the weights back into plain ones leaves only this behind.
        if getattr(model, "hf_quantizer", None) is None and "is_quantized" not in vars(model):
            raise CheckpointError(
                f"target {path}: config.json: quantization_config: no quantizer was attached, so the stored numbers were taken for the "
                "weights, expected a quant_method that transformers applies"
            )
        return
    _check_plain(path, model, tensors, set(found["unexpected_keys"]))


def _check_plain(path: str | Path, model: nn.Module, tensors: dict[str, Stored], spare: set[str] | None) -> None:
    """Refuses integers, truth values, 8-bit floats and complex numbers that would be taken for a weight's values.

    `spare`: names of tensors that the model had no place for; None before it was loaded, when names are all there is to go by.
    """
    weights = {n for name, _ in model.named_parameters(remove_duplicate=False) for n in _spellings(model, name)}
    buffers = {n for name, _ in model.named_buffers(remove_duplicate=False) for n in _spellings(model, name)}
    for name, tensor in tensors.items():
        if tensor.plain or (spare is not None and name in spare):
            continue
        # Under another name than the model's: transformers puts some weights together from parts, such as those of experts.
        part = spare is not None and name.endswith("weight") and len(tensor.shape) > 1 and name not in buffers
        if name in weights or part:
            raise CheckpointError(
                f"target {path}: {name}: got {tensor.kind}, expected a floating-point type of at least 16 bits, or a quantization_config "
                "in config.json that says what the numbers mean"
            )


def _spellings(model: nn.Module, name: str) -> tuple[str, ...]:
    """A parameter's name as checkpoints write it: with or without the name of the model inside the model."""
    prefix = model.base_model_prefix + "."
    return name, prefix + name, name.removeprefix(prefix)

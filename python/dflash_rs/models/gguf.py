"""GGUF files of Llama- and Qwen-shaped models, turned into checkpoints that `LLM` loads.

The package `gguf` reads the file and dequantises its tensors. What is here says which tensor, number and token goes where, and refuses by
name whatever has no place: a file that is converted is converted whole. Weights are stored in bfloat16 unless another dtype is asked for.
Names and layouts are those of the GGUF specification (ggml-org/ggml, docs/gguf.md) and of llama.cpp's converter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import extras
from ..errors import CheckpointError, DflashError, MissingPackage
from .checkpoint import short

# Tensors of a layer: the end of the name in the file, and in the checkpoint.
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{p}.bias": f"self_attn.{p}_proj.bias" for p in "qkv"}
_NORMS = {f"attn_{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What a file calls its architecture -> the architecture in transformers, and what its layers have besides.
_ARCHITECTURES: dict[str, tuple[str, str, dict[str, str]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _BIASES),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _NORMS),
}
# Numbers below the architecture's name that are used, that say nothing a checkpoint needs, or that change what is computed if they are there.
_USED = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "vocab_size",
}  # fmt: skip
_QUIET = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
# How a text is cut before byte pairs are joined, by the file's own name for it.
_CUTS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_CUTS_KNOWN = ("default", "gpt-2", "smollm", *_CUTS)
_CONTROL, _USER_DEFINED = 3, 4
_SHARD_BYTES = 2 << 30


def convert(
    file: str | Path, out: str | Path, *, dtype: torch.dtype = torch.bfloat16, say: Callable[[str], None] | None = None
) -> None:
    """Writes the model and the tokenizer of a GGUF file into the new folder `out`, all of it or nothing.

    Raises CheckpointError naming what the file holds that has no place in a checkpoint (another architecture, scaled positions, experts, a
    tokenizer that is not of byte pairs), or that there is no room; MissingPackage without the package `gguf`.
    """
    source, out = Path(file), Path(out)
    reader = _open(source)
    facts = _Facts(source, reader)
    config = _config(facts)
    tensors = _places(facts, config)
    _check_room(facts, out, sum(int(np.prod(t.shape)) for t, _ in tensors) * dtype.itemsize)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_tokenizer(facts, config, unfinished)
        _write_weights(facts, config, tensors, unfinished, dtype, say)
        _write_json(unfinished / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        ends = config["eos_token_id"]
        _write_json(
            unfinished / "generation_config.json", {"bos_token_id": config["bos_token_id"], "eos_token_id": ends}
        )
        if out.exists():
            raise CheckpointError(f"out: got {out}, which is there already, expected a new folder")
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, out)
    except OSError as error:
        if isinstance(error, DflashError):
            raise
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def reader(file: str) -> Any:
    """What reads GGUF files. Raises MissingPackage that names `file` where it is not installed."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingPackage(f"{file}: GGUF files need the package gguf ({error}): {extras.install('gguf')}") from error
    return GGUFReader


def _open(file: Path) -> Any:
    read = reader(file.name)
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    try:
        return read(str(file))
    except Exception as error:  # a damaged header ends in whatever NumPy makes of it
        raise CheckpointError(f"{file}: not readable as GGUF ({str(error) or type(error).__name__:.100})") from error


class _Facts:
    """Typed access to what a file says of itself."""

    def __init__(self, file: Path, reader: Any):
        self.file, self.tensors = file, reader.tensors
        try:
            self._values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:
            raise CheckpointError(f"{file}: its header is damaged ({short(error)})") from error
        self.architecture = self._values.get("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise self.fail("general.architecture", f"one of {', '.join(_ARCHITECTURES)}")

    def fail(self, name: str, expected: str) -> CheckpointError:
        got = short(self._values[name]) if name in self._values else "nothing"
        return CheckpointError(f"{self.file}: {name}: got {got}, expected {expected}")

    def own(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def names(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer in {low}..{high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(name, "a positive number")
        return float(value)

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.fail(name, "a list of strings")
        return value


def _config(facts: _Facts) -> dict[str, Any]:
    """The checkpoint's config.json."""
    known = {facts.own(name) for name in _USED | _QUIET}
    for name in facts.names():
        if (
            name.startswith(f"{facts.architecture}.")
            and name not in known
            and facts.get(name) not in (0, 0.0, False, "", "none")
        ):
            raise facts.fail(name, "nothing: what it stands for is not converted")
    if facts.get(facts.own("rope.scaling.type"), "none") != "none":
        raise facts.fail(facts.own("rope.scaling.type"), "none: scaled positions are not converted")
    layers = facts.integer(facts.own("block_count"), 1, 1 << 14)
    hidden = facts.integer(facts.own("embedding_length"), 1, 1 << 24)
    heads = facts.integer(facts.own("attention.head_count"), 1, 1 << 16)
    kv_heads = facts.integer(facts.own("attention.head_count_kv"), 1, heads, heads)
    head_dim = facts.integer(facts.own("attention.key_length"), 2, 1 << 16, hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if facts.integer(facts.own(name), 1, 1 << 16, head_dim) != head_dim:
            raise facts.fail(facts.own(name), f"{head_dim}, the size of a head")
    model_type, architecture, _ = _ARCHITECTURES[str(facts.architecture)]
    tokens = facts.strings("tokenizer.ggml.tokens")
    last = len(tokens) - 1
    bos, eos = (_token_id(facts, f"tokenizer.ggml.{name}_token_id", last) for name in ("bos", "eos"))
    ends = [eos, *(_token_id(facts, f"tokenizer.ggml.{name}_token_id", last) for name in ("eot", "eom"))]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": facts.integer(facts.own("feed_forward_length"), 1, 1 << 24),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": facts.number(facts.own("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts.number(facts.own("rope.freq_base"), 10000.0)},
        "max_position_embeddings": facts.integer(facts.own("context_length"), 1, 1 << 26),
        "vocab_size": len(tokens),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in facts.tensors),
        "bos_token_id": bos,
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
    }
    if model_type == "qwen2":
        config["use_sliding_window"] = False
    return config


def _token_id(facts: _Facts, name: str, last: int) -> int | None:
    return None if facts.get(name) is None else facts.integer(name, 0, last)


def _places(facts: _Facts, config: dict[str, Any]) -> list[tuple[Any, str]]:
    """Every tensor of the file with its name in the checkpoint; none may be left over or missing."""
    _, _, besides = _ARCHITECTURES[str(facts.architecture)]
    expected = {
        name: place for name, place in _WHOLE.items() if name != "output.weight" or not config["tie_word_embeddings"]
    }
    for layer in range(config["num_hidden_layers"]):
        for name, place in {**_LAYER, **besides}.items():
            expected[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{place}"
    found = {tensor.name: tensor for tensor in facts.tensors}
    strange = [name for name in found if name not in expected]
    if strange:
        what = (
            "scaled positions are not converted"
            if strange[0].startswith("rope_freqs")
            else "it has no place in this architecture"
        )
        raise CheckpointError(f"{facts.file}: tensor {strange[0]}: {what}")
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{facts.file}: tensor {missing[0]}: not there")
    for name, place in expected.items():
        # GGUF names the fastest dimension first.
        shape = tuple(int(n) for n in reversed(found[name].shape))
        wanted = _shape(place, config)
        if shape != wanted:
            raise CheckpointError(f"{facts.file}: tensor {name}: got shape {shape}, expected {wanted}")
    return [(found[name], place) for name, place in expected.items()]


def _shape(place: str, config: dict[str, Any]) -> tuple[int, ...]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    part, _, kind = place.rpartition(".")
    part = part.rpartition(".")[2]
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
        "v_proj": config["num_key_value_heads"],
    }
    if part in heads:
        rows = heads[part] * head_dim
        return (rows,) if kind == "bias" else (rows, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "o_proj": (hidden, config["num_attention_heads"] * head_dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }
    return shapes.get(part, (hidden,))


def _check_room(facts: _Facts, out: Path, weights: int) -> None:
    parent = next(p for p in (out.parent, *out.parent.parents) if p.exists())
    need, free = weights + (64 << 20), shutil.disk_usage(parent).free
    if free < need:
        raise CheckpointError(
            f"{out}: {facts.file.name} needs {need >> 20} MiB there as a checkpoint, but {free >> 20} MiB are free"
        )


def _values(facts: _Facts, tensor: Any, place: str, config: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    from gguf import dequantize

    try:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except (NotImplementedError, ValueError) as error:
        kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        raise CheckpointError(
            f"{facts.file}: tensor {tensor.name}: stored as {kind}, which gguf cannot dequantise ({error})"
        ) from error
    if not np.isfinite(values).all():
        raise CheckpointError(f"{facts.file}: tensor {tensor.name}: holds values that are no finite numbers")
    values = values.reshape(_shape(place, config))
    if facts.architecture == "llama" and place.endswith(("q_proj.weight", "k_proj.weight")):
        # llama.cpp rotates neighbours, transformers the two halves of a head: its converter has put the rows in another order.
        heads = config["num_attention_heads" if "q_proj" in place else "num_key_value_heads"]
        half = config["head_dim"] // 2
        values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def _write_weights(
    facts: _Facts,
    config: dict[str, Any],
    tensors: list[tuple[Any, str]],
    out: Path,
    dtype: torch.dtype,
    say: Callable[[str], None] | None,
) -> None:
    """Shards of some gigabytes, so that never more than one is in memory."""
    from safetensors.torch import save_file

    groups: list[list[tuple[Any, str]]] = [[]]
    size = total = 0
    for tensor, place in tensors:
        this = int(np.prod(tensor.shape)) * dtype.itemsize
        if groups[-1] and size + this > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((tensor, place))
        size, total = size + this, total + this
    places: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        save_file(
            {place: _values(facts, t, place, config, dtype) for t, place in group},
            out / name,
            metadata={"format": "pt"},
        )
        places |= {place: name for _, place in group}
        if say is not None:
            say(f"{len(places)} of {len(tensors)} tensors written")
    if len(groups) > 1:
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_tokenizer(facts: _Facts, config: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if facts.get("tokenizer.ggml.model") != "gpt2":
        raise facts.fail("tokenizer.ggml.model", "'gpt2': only tokenizers of byte pairs are converted")
    cut = facts.get("tokenizer.ggml.pre", "default")
    if cut not in _CUTS_KNOWN:
        raise facts.fail("tokenizer.ggml.pre", f"one of {', '.join(_CUTS_KNOWN)}: others cut texts in other ways")
    tokens, kinds = facts.strings("tokenizer.ggml.tokens"), facts.get("tokenizer.ggml.token_type")
    merges: list[Any] = [tuple(merge.split(" ")) for merge in facts.strings("tokenizer.ggml.merges")]
    if len(set(tokens)) != len(tokens):
        raise facts.fail("tokenizer.ggml.tokens", "every token once")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise facts.fail("tokenizer.ggml.token_type", f"one for each of {len(tokens)} tokens")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=False))
    before: Any
    if cut == "smollm":
        before = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif cut in _CUTS:
        split = pre_tokenizers.Split(Regex(_CUTS[cut]), behavior="isolated")
        before = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])
    named = {}
    for role in ("bos", "eos", "padding", "unknown"):
        number = _token_id(facts, f"tokenizer.ggml.{role}_token_id", len(tokens) - 1)
        if number is not None:
            named[{"padding": "pad_token", "unknown": "unk_token"}.get(role, f"{role}_token")] = tokens[number]
    if facts.get("tokenizer.ggml.add_bos_token", False) and config["bos_token_id"] is not None:
        first = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, config["bos_token_id"])]
        )
    template = facts.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise facts.fail("tokenizer.chat_template", "a text")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template, **named
    ).save_pretrained(out)

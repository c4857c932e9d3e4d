"""Reads and writes checkpoints of drafters (DFlash, DFlash 2, MTP heads), and refuses what would be misread.

A checkpoint is a folder with `config.json` and `model.safetensors`, or shards listed in
`model.safetensors.index.json`. In the configuration, keys of the nested `dflash_config` beat top-level ones. Tensor
names may carry a `model.` prefix, those of an MTP head carry `mtp.`. Everything that can be wrong without being noticed later (a mask token or layer id
that belongs to another target, a missing tensor, a half-copied file) is an error here that names the file and the field.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights import check_weights
from . import checkpoint, proposals
from .checkpoint import MOST_HEADS, MOST_POSITIONS, MOST_VOCAB, MOST_WIDTH, Stored, readable
from .dflash.config import FULL, SLIDING, DraftConfig
from .dflash.model import DFlashDraft
from .dflash2 import DFlash2Config, DFlash2Draft
from .mtp import MtpConfig, MtpDraft

# What names of an MTP head's tensors begin with.
_MTP = "mtp."
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Published drafters have 16; a file that says a thousand is damaged.
_MOST_BLOCK = 256
_MOST_DRAFT_LAYERS, _MOST_TARGET_LAYERS = 1024, checkpoint.MOST_LAYERS
# What a checkpoint may call itself, and what it then is.
_KINDS: dict[str, type[DFlashDraft] | type[MtpDraft]] = {
    kind.config_type.architecture: kind for kind in (DFlashDraft, DFlash2Draft, MtpDraft)
}


def default_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Tapped target layers when a checkpoint names none: [N // 2] for one drafter layer, else
    round(1 + i * (N - 4) / (n - 1)), as in the reference package."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (num_draft_layers - 1)) for i in range(num_draft_layers))


class _Fields:
    """Typed access to config.json; `dflash_config` first."""

    def __init__(self, file: Path, top: dict[str, Any]):
        nested = top.get("dflash_config") or {}
        if not isinstance(nested, dict):
            raise CheckpointError(f"{file}: dflash_config: got {type(nested).__name__}, expected an object")
        self.file, self.values = file, {**top, **nested}

    def fail(self, name: str, expected: str) -> CheckpointError:
        got = checkpoint.short(self.values[name]) if name in self.values else "nothing"
        return CheckpointError(f"{self.file}: {name}: got {got}, expected {expected}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.fail(name, f"an integer of at least {low}")
        if value > high:
            raise self.fail(name, f"at most {high}")
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.get(name, default)
        if not checkpoint.finite(value) or (positive and value <= 0):
            raise self.fail(name, "a positive number" if positive else "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value


def read_draft_config(path: str | Path) -> DraftConfig | MtpConfig:
    """The validated configuration of the checkpoint folder `path`. Raises CheckpointError."""
    file = Path(path) / "config.json"
    fields = _Fields(file, checkpoint.read_object(file, "the configuration of a drafter"))

    kind = _check_kind(fields)
    hidden = fields.integer("hidden_size", 1, MOST_WIDTH)
    layers = fields.integer("num_hidden_layers", 1, _MOST_DRAFT_LAYERS)
    heads = fields.integer("num_attention_heads", 1, MOST_HEADS)
    kv_heads = fields.integer("num_key_value_heads", 1, MOST_HEADS, heads)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.fail("head_dim", f"a value, since hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = fields.integer("head_dim", 2, MOST_HEADS, hidden // heads)
    if head_dim % 2:
        raise fields.fail("head_dim", "an even number, for rotary embeddings")
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", "'silu'")
    vocab = fields.integer("vocab_size", 2, MOST_VOCAB)
    if issubclass(kind, MtpDraft):
        return _mtp_config(fields, hidden, layers, heads, kv_heads, head_dim, vocab)
    mask = fields.integer("mask_token_id", 0, MOST_VOCAB)
    if mask >= vocab:
        raise fields.fail("mask_token_id", f"0..{vocab - 1} (vocab_size)")
    target_layers = fields.integer("num_target_layers", 1, _MOST_TARGET_LAYERS)
    causal, window = _layer_kinds(fields, layers)
    softcap = fields.get("final_logit_softcapping")

    return kind.config_type(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, MOST_WIDTH),
        vocab_size=vocab,
        target_layer_ids=_layer_ids(fields, target_layers, layers),
        mask_token_id=mask,
        num_target_layers=target_layers,
        block_size=fields.integer("block_size", 2, _MOST_BLOCK, 16),
        rms_norm_eps=_epsilon(fields),
        attention_bias=fields.boolean("attention_bias", False),
        rope_parameters=_rope(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, MOST_POSITIONS, 32768),
        layer_causal=causal,
        layer_window=window,
        input_embedding_scale=fields.number("input_embedding_scale", 1.0, positive=False),
        output_multiplier=fields.number("output_multiplier", 1.0),
        final_logit_softcapping=None if not softcap else fields.number("final_logit_softcapping"),
        **_own_fields(fields, kind.config_type, hidden, vocab),
    )


def _mtp_config(
    fields: _Fields, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int
) -> MtpConfig:
    """The rest of an MTP head's configuration."""
    if layers != 1:
        raise fields.fail("num_hidden_layers", "1: a head is one layer, unrolled")
    kinds = fields.get("layer_types", [FULL])
    if kinds != [FULL] or (fields.get("use_sliding_window") and fields.boolean("use_sliding_window", False)):
        raise fields.fail("layer_types", f"[{FULL!r}]")
    return MtpConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, MOST_WIDTH),
        vocab_size=vocab,
        num_target_layers=fields.integer("num_target_layers", 1, _MOST_TARGET_LAYERS),
        block_size=fields.integer("block_size", 2, _MOST_BLOCK, 8),
        rms_norm_eps=_epsilon(fields),
        attention_bias=fields.boolean("attention_bias", False),
        qk_norm=fields.boolean("qk_norm", True),
        rope_parameters=_rope(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, MOST_POSITIONS, 32768),
    )


def _epsilon(fields: _Fields) -> float:
    value = fields.number("rms_norm_eps", 1e-6)
    if value > 1:
        raise fields.fail("rms_norm_eps", "a positive number of at most 1")
    return value


def _own_fields(fields: _Fields, config: type[DraftConfig], hidden: int, vocab: int) -> dict[str, Any]:
    """What only this kind of drafter has, all of it small positive numbers."""
    values = {key: fields.integer(key, 1, MOST_HEADS) for key in config.own_fields}
    if hidden % values.get("conv_group_size", 1):
        raise fields.fail("conv_group_size", f"a divisor of hidden_size {hidden}")
    if values.get("selector_top_k", 1) >= vocab:
        raise fields.fail("selector_top_k", f"less than the {vocab} tokens of vocab_size")
    return values


def _check_kind(fields: _Fields) -> type[DFlashDraft] | type[MtpDraft]:
    """Which kind of drafter it is."""
    if fields.get("quantization_config") is not None:
        raise fields.fail("quantization_config", "nothing: a drafter's weights are read as they are stored")
    names = fields.get("architectures", [DraftConfig.architecture])
    if not isinstance(names, list) or not names:
        raise fields.fail("architectures", "a list of one class name")
    if len(names) > 1 or not isinstance(names[0], str) or names[0] not in _KINDS:
        raise fields.fail("architectures", "['DFlashDraftModel'], ['DFlash2DraftModel'] or ['MtpDraft']")
    kind = _KINDS[names[0]]
    if issubclass(kind, MtpDraft):
        return kind
    for key in DFlash2Config.own_fields:
        if key not in kind.config_type.own_fields and fields.get(key):
            raise fields.fail(key, f"nothing for a {names[0]}; it belongs to DFlash 2 (DFlash2DraftModel)")
    for key in ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"):
        if fields.get(key) is not None:
            # Such exports count the embedding as 0, one more than a DFlash id for the same layer.
            raise fields.fail(key, "target_layer_ids instead, where id k is the output of target layer k")
    return kind


def _layer_ids(fields: _Fields, target_layers: int, draft_layers: int) -> tuple[int, ...]:
    ids = fields.get("target_layer_ids")
    given = ids is not None
    if not given:
        ids = default_layer_ids(target_layers, draft_layers)
    if not isinstance(ids, list | tuple) or not ids or any(isinstance(k, bool) or not isinstance(k, int) for k in ids):
        raise fields.fail("target_layer_ids", "a list of layer numbers")
    if given and len(set(ids)) < len(ids):
        raise fields.fail("target_layer_ids", "every layer once")
    origin = (
        "" if given else f" (the default for {target_layers} target and {draft_layers} drafter layers is {list(ids)})"
    )
    for k in ids:
        if not 0 <= k < target_layers:
            raise fields.fail(
                "target_layer_ids", f"ids in 0..{target_layers - 2} of {target_layers} target layers{origin}"
            )
        if k == target_layers - 1:
            raise fields.fail(
                "target_layer_ids",
                f"ids below {k}: the last layer's output is handed out normalised by some code and raw by other, so its meaning is "
                f"open; are the ids off by one, with the embedding counted as 0?{origin}",
            )
    return tuple(ids)


def _layer_kinds(fields: _Fields, layers: int) -> tuple[tuple[bool, ...], tuple[int | None, ...]]:
    kinds = fields.get("layer_types")
    use_window = fields.get("use_sliding_window")
    if use_window is not None:
        use_window = fields.boolean("use_sliding_window", False)
    if kinds is None:
        # Configurations older than layer_types: layers from max_window_layers on slide.
        first = fields.integer("max_window_layers", 0, _MOST_TARGET_LAYERS, 28) if use_window else layers
        kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise fields.fail("layer_types", f"{layers} entries, each {FULL!r} or {SLIDING!r}")
    causal = fields.get("is_causal")
    if causal is not None:
        causal = fields.boolean("is_causal", False)
    window = None
    if SLIDING in kinds:
        if use_window is False:
            raise fields.fail("use_sliding_window", f"true, since layer_types has {SLIDING!r}")
        window = fields.integer("sliding_window", 1, 2**31 - 1)
    return (
        tuple(kind == SLIDING if causal is None else causal for kind in kinds),
        tuple(window if kind == SLIDING else None for kind in kinds),
    )


def _rope(fields: _Fields) -> dict[str, Any]:
    """Rotary parameters in one form, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.get(name, {})
    if not isinstance(rope, dict):
        raise fields.fail(name, "an object")
    rope = dict(rope)
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.fail(name, "one set of parameters for all layers")
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if rope["rope_type"] not in _ROPE_TYPES:
        raise fields.fail(name, f"a rope_type of {', '.join(_ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.fail(name, "partial_rotary_factor 1: the drafter rotates whole heads")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if not checkpoint.finite(theta) or theta <= 0:
        raise CheckpointError(
            f"{fields.file}: rope_theta: got {'nothing' if theta is None else checkpoint.short(theta)}, expected a positive number, here "
            "or in rope_parameters"
        )
    rope["rope_theta"] = float(theta)
    needed = {
        "linear": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    for key in needed.get(rope["rope_type"], ()):
        if isinstance(rope.get(key), bool) or not isinstance(rope.get(key), int | float):
            raise fields.fail(name, f"a number {key!r} for rope_type {rope['rope_type']!r}")
    wrong = checkpoint.check_rope(rope)
    if wrong is not None:
        raise fields.fail(name, f"{wrong[0]} to be {wrong[1]}")
    for key, value in rope.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not checkpoint.finite(value):
            raise fields.fail(name, f"{key} to be a finite number")
    return rope


def check_against_target(path: str | Path, config: DraftConfig | MtpConfig, target) -> None:
    """Checks a drafter's configuration against a `TargetModel`. Raises CheckpointError naming the field."""
    _check_sizes(path, config, target.config)
    rows = int(target.embedding.weight.shape[0])
    if isinstance(config, DraftConfig) and config.mask_token_id >= rows:
        raise CheckpointError(
            f"{Path(path) / 'config.json'}: mask_token_id: got {config.mask_token_id}, expected 0..{rows - 1}, a row of the target's embedding"
        )


def _check_sizes(path: str | Path, config: DraftConfig | MtpConfig, target) -> None:
    """`target`: the configuration of the target's text model."""
    pairs = (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("num_target_layers", config.num_target_layers, target.num_hidden_layers),
        ("vocab_size", config.vocab_size, target.vocab_size),
    )
    for name, got, expected in pairs:
        if got != int(expected):
            raise CheckpointError(f"{Path(path) / 'config.json'}: {name}: got {got}, expected the target's {expected}")


def _tensor_files(path: Path) -> dict[Path, list[str]]:
    """Safetensors files of a checkpoint and the tensors that an index promises in each."""
    index = path / "model.safetensors.index.json"
    return checkpoint.tensor_files(path, index.name if index.exists() else "model.safetensors")


def _short_name(name: str) -> str:
    return name.removeprefix("model.").removeprefix(_MTP)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Types and shapes of all tensors of a checkpoint folder, without the `model.` or `mtp.` prefix. Raises CheckpointError."""
    found: dict[str, Stored] = {}
    for name, tensor in checkpoint.stored_tensors(_tensor_files(path), "a drafter's checkpoint", once=True).items():
        if _short_name(name) in found:
            raise CheckpointError(f"{path}: {name}: stored twice")
        found[_short_name(name)] = tensor
    # A derived table that some exports carry along.
    found.pop("rotary_emb.inv_freq", None)
    return found


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, without the `model.` prefix. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    wanted = stored_tensors(path)
    tensors: dict[str, Tensor] = {}
    for file in _tensor_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {_short_name(n): opened.get_tensor(n) for n in opened.keys() if _short_name(n) in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or truncated safetensors file ({error})") from None
    return tensors


def _check_layers(path: Path, config: DraftConfig | MtpConfig, tensors: dict[str, Stored]) -> None:
    """Before modules are made: a number of layers that nothing is stored for is a mistake in the number."""
    numbers = [name.split(".")[1] for name in tensors if name.startswith("layers.")]
    layers = max((int(n) for n in numbers if n.isdecimal() and len(n) < 10), default=-1) + 1
    if config.num_hidden_layers > max(layers, 1):
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers: got {config.num_hidden_layers}, expected {layers}: there are tensors for no more "
            "layers"
        )


def _check_tensors(path: Path, expected: dict[str, Tensor], tensors: dict[str, Stored]) -> None:
    heads = [name for name in tensors if name in ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d")]
    if heads:
        raise CheckpointError(
            f"{path}: {heads[0]}: a drafter with an embedding, head or vocabulary map of its own is not supported, expected one that "
            "uses the target's"
        )
    for what, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            if what == "unexpected" and ("_conv." in min(names) or min(names).startswith("candidate_selector.")):
                raise CheckpointError(
                    f"{path}: {min(names)}: belongs to DFlash 2, expected ['DFlash2DraftModel'] as architectures in config.json"
                )
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: {min(names)}: {what} tensor{more}")
    for name, tensor in tensors.items():
        if tensor.shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name}: got shape {list(tensor.shape)}, expected {list(expected[name].shape)} from config.json"
            )
        if not tensor.plain:
            raise CheckpointError(
                f"{path}: {name}: got {tensor.kind}, expected a floating-point type of at least 16 bits"
            )


def draft_folder(path: str | Path) -> Path:
    """The folder of a drafter: `path` itself, or a copy of the Hugging Face repository of this name. Raises CheckpointError."""
    path = Path(path)
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..", "~"):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        files = ["config.json", "*.safetensors", "model.safetensors.index.json", proposals.FILE]
        return Path(snapshot_download(path.as_posix(), allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, RepositoryNotFoundError):
            reason = "no such repository at the Hugging Face hub, or none that may be read without a token"
        elif isinstance(error, LocalEntryNotFoundError):
            reason = "the Hugging Face hub cannot be reached"
        else:
            said = str(error).strip().split("\n")[0]
            reason = f"no such Hugging Face repository could be had ({type(error).__name__}: {said})"
        raise CheckpointError(f"draft {path}: there is no such folder, and {reason}") from error


def build_draft(config: DraftConfig | MtpConfig) -> Any:
    """A drafter of this configuration's kind, with fresh weights."""
    kind: Any = _KINDS[config.architecture]
    return kind(config)


def describe_draft(path: str | Path, target=None) -> tuple[Path, DraftConfig | MtpConfig]:
    """Folder and configuration of a drafter whose tensors are there, by their names, types and shapes: everything that can be refused
    before its weights are read. `target`: the configuration of its target's text model, if it is to fit one. Raises CheckpointError."""
    with readable(path, "draft"):
        path = draft_folder(path)
        config = read_draft_config(path)
        if target is not None:
            _check_sizes(path, config, target)
        stored = stored_tensors(path)
        _check_layers(path, config, stored)
        _check_tensors(path, _skeleton(config).state_dict(), stored)
        _proposed(path, config)
        return path, config


def _proposed(path: Path, config: DraftConfig | MtpConfig) -> Tensor | None:
    """The part of the vocabulary that the drafter in this folder proposes; None for all of it."""
    found = proposals.read(path, config.vocab_size, getattr(config, "mask_token_id", None))
    least = config.selector_top_k if isinstance(config, DFlash2Config) else 0
    if found is not None and len(found) < least:
        raise CheckpointError(
            f"{path / proposals.FILE}: got {len(found)} tokens, expected at least {least}, the drafter's selector_top_k"
        )
    return found


def _skeleton(config: DraftConfig | MtpConfig) -> Any:
    """Without memory and random numbers for weights that are about to be replaced."""
    with torch.device("meta"):
        return build_draft(config)


def load_draft(
    path: str | Path,
    target=None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    matmul_precision: str = "highest",
) -> Any:
    """Loads a drafter's checkpoint, a folder or a hub name: a `DFlashDraft` or an `MtpDraft`; with a `TargetModel`, checks it against the target and binds it.

    `dtype` and `device` default to the target's (float32 on the CPU without one). `matmul_precision`: see `TargetModel`.
    """
    name = path
    path, config = describe_draft(path, None if target is None else target.config)
    with readable(name, "draft"):
        if target is not None:
            check_against_target(path, config, target)
            dtype, device = dtype or target.dtype, device or target.device
        draft = _skeleton(config)
        tensors = read_tensors(path)
        check_weights(path, tensors.items())
        draft.load_state_dict(tensors, assign=True)
        draft.vocabulary = _proposed(path, config)
        draft.to(device=device or "cpu", dtype=dtype or torch.float32)
        draft.matmul_precision = matmul_precision
        if target is not None:
            draft.bind_target(target.embedding, target.lm_head)
        return draft.eval()


def save_draft(draft: DFlashDraft | MtpDraft, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes `draft` as a checkpoint folder that `load_draft` reads, and a DFlash as the reference package does, too."""
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(draft, MtpDraft):
        config, prefix = _saved_mtp(draft.config), _MTP
    else:
        config, prefix = _saved_dflash(draft.config), ""
    config["dtype"] = str(dtype or next(draft.parameters()).dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Weights may share storage after `prepare`; the file must not.
    tensors = {
        prefix + name: t.detach().to("cpu", dtype or t.dtype).clone().contiguous()
        for name, t in draft.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    proposals.write(path, draft.vocabulary)


def _saved_mtp(c: MtpConfig) -> dict[str, Any]:
    return {
        "architectures": [c.architecture],
        "model_type": "qwen3",
        "num_hidden_layers": c.num_hidden_layers,
        "layer_types": [FULL],
        "hidden_act": "silu",
        **asdict(c),
    }


def _saved_dflash(c: DraftConfig) -> dict[str, Any]:
    sliding = [window is not None for window in c.layer_window]
    config: dict[str, Any] = {
        "architectures": [c.architecture],
        "model_type": "qwen3",
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "hidden_act": c.hidden_act,
        "rms_norm_eps": c.rms_norm_eps,
        "attention_bias": c.attention_bias,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_parameters": c.rope_parameters,
        "layer_types": [SLIDING if s else FULL for s in sliding],
        "num_target_layers": c.num_target_layers,
        "block_size": c.block_size,
        "dflash_config": {
            "mask_token_id": c.mask_token_id,
            "target_layer_ids": list(c.target_layer_ids),
            **{key: getattr(c, key) for key in c.own_fields},
        },
        "input_embedding_scale": c.input_embedding_scale,
        "output_multiplier": c.output_multiplier,
        "final_logit_softcapping": c.final_logit_softcapping,
    }
    if any(sliding):
        config |= {"use_sliding_window": True, "sliding_window": next(w for w in c.layer_window if w is not None)}
    if c.layer_causal != tuple(sliding):
        if len(set(c.layer_causal)) > 1:
            raise CheckpointError(
                f"layer_causal: got {c.layer_causal}, expected one value for all layers or the sliding ones"
            )
        config["is_causal"] = c.layer_causal[0]
    return config

"""What a checkpoint holds, found out before anything of it is built, and loading it through transformers.

    folder or hub name --> folder --> JSON files read --> numbers ranged --> config --> tensors' names, types and shapes --> weights

Promises, for targets, drafters and tokenizers alike:
- *nothing of a checkpoint is run*: neither its Python files nor pickles with code in them, and nobody is asked whether they may be;
- *nothing is built that the files cannot fill*: the safetensors headers say how many layers there are and how large they are, so that
  a number in `config.json` costs neither memory nor time;
- *no file outside the folder is read*, whatever an index says (the hub's own links from a snapshot to its blobs aside);
- *one kind of error*: whatever a loader raises becomes a CheckpointError that names the checkpoint and, where it can be told, file and
  field.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import known_models
from ..errors import CheckpointError, DflashError, InvalidArgument

# Indices of the largest checkpoints have some ten megabytes, tokenizers some thirty.
_MOST_JSON_BYTES = 256 << 20
# Page tables of longer contexts are refused as it is; the longest published one is ten million tokens.
MOST_POSITIONS = 1 << 26
MOST_WIDTH, MOST_HEADS, MOST_LAYERS, MOST_VOCAB = 1 << 24, 1 << 16, 1 << 14, (1 << 31) - 1
# Stored types whose values are the weights themselves.
_PLAIN = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
# Values of buffers (angles, masks) that a model may have beside what is stored: a gigabyte of float32.
_MOST_BUFFER = 1 << 28

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER_JSON = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_HUB_SMALL = ("*.json", "*.txt", "*.model", "*.tiktoken")


def short(value: Any) -> str:
    """`repr` of a value of a file, cut where it would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets in brackets
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def read_json(file: Path, missing: str) -> Any:
    """The value in a JSON file. Raises CheckpointError naming it; `missing` says what was expected where there is none."""
    try:
        if not file.exists():
            raise CheckpointError(f"{file}: not found, expected {missing}")
        if not file.is_file() or file.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{file}: expected a file of at most {_MOST_JSON_BYTES >> 20} MiB")
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{file}: not readable as JSON (brackets are nested too deeply)") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not readable as JSON ({short_reason(error)})") from None


def read_object(file: Path, missing: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    value = read_json(file, missing)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a {type(value).__name__}, expected an object")
    return value


def short_reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if not lines:
        return "no reason given"
    # A heading says less than what stands under it.
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])[:300]


@contextlib.contextmanager
def readable(path: str | Path, what: str = "target") -> Iterator[None]:
    """Turns whatever is raised about the checkpoint at `path` into one CheckpointError; our own errors stay what they are."""
    try:
        yield
    except DflashError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception, but no wish to end the program either.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = short_reason(error)
        if isinstance(error, ImportError):
            raise CheckpointError(f"{what} {path}: needs a package that is not installed ({reason})") from error
        raise CheckpointError(f"{what} {path}: cannot be loaded ({type(error).__name__}: {reason})") from error


# ---- where it is -------------------------------------------------------------------------------------------------


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` is no folder here and reads as a name at the hub: `name` or `owner/name`."""
    if known_models.find(path) is not None:
        return False
    text = path.as_posix() if isinstance(path, Path) else path
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def target_folder(path: str | Path, what: str = "target", weights: bool = True) -> Path:
    """The folder of a target: `path` itself, or a copy of the hub's repository of this name. Raises CheckpointError."""
    if not isinstance(path, str | Path):
        raise InvalidArgument(f"model: got {short(path)}, expected a folder or a hub name")
    with readable(path, what):
        folder = Path(path)
        if str(path) and folder.is_dir():
            return folder
        if known := known_models.find(path):
            return known_models.folder_of(known)
        if folder.suffix == ".gguf" and folder.is_file():
            return known_models.converted(folder, lambda text: print(text, file=sys.stderr))
        if str(path) and folder.exists():
            raise CheckpointError(f"{what} {path}: got a file, expected a folder with {_CONFIG} and weights")
        if not is_hub_name(path):
            raise CheckpointError(f"{what} {path}: there is no such folder")
        from huggingface_hub import snapshot_download

        name = folder.as_posix()
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_SMALL)))
        if not weights:
            return folder
        explicit = read_object(folder / _CONFIG, "a model's configuration").get("transformers_weights")
        for single in _SINGLES[:1] if explicit is not None else _SINGLES:
            # One kind of weights only: many repositories have them in several forms.
            files = tensor_files(folder, explicit) if explicit is not None else _hub_files(folder, single)
            wanted = sorted({file.name for file in files})
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_SMALL, *wanted]))
            if all((folder / file).is_file() for file in wanted):
                break
        return folder


def _hub_files(folder: Path, single: str) -> dict[Path, list[str]]:
    index = folder / _INDICES[_SINGLES.index(single)]
    return _from_index(index) if index.is_file() else {folder / single: []}


# ---- what is stored ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as the file names it, and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """Whether the values are the weights themselves: floating point, of at least 16 bits, real."""
        return self.kind in _PLAIN


_SINGLES = ("model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def weight_map_of(index: Path) -> dict[str, str]:
    """Which shard an index promises every tensor in. Raises CheckpointError where a shard is no plain file name."""
    weight_map = read_object(index, "an index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: not an index of shards (weight_map: got {short(weight_map)}, expected an object)"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise CheckpointError(
                f"{index}: not an index of shards (shard {short(name)} is not a plain file name, expected a file beside the index)"
            )
    return weight_map


def _from_index(index: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map_of(index).items():
        files.setdefault(index.parent / name, []).append(tensor)
    return files


def tensor_files(folder: Path, explicit: Any = None) -> dict[Path, list[str]]:
    """The files of weights that transformers would read, with the tensors that an index promises in each.

    `explicit` is `transformers_weights` of the configuration. Raises CheckpointError.
    """
    if explicit is not None:
        if not isinstance(explicit, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors(\.index\.json)?", explicit):
            raise CheckpointError(
                f"{folder / _CONFIG}: transformers_weights: got {short(explicit)}, expected a safetensors file or index in the folder"
            )
        return _from_index(folder / explicit) if explicit.endswith(".json") else {folder / explicit: []}
    for single, index in zip(_SINGLES, _INDICES):
        if (folder / single).is_file():
            return {folder / single: []}
        if (folder / index).is_file():
            return _from_index(folder / index)
    return {folder / _SINGLES[0]: []}


def stored_tensors(files: dict[Path, list[str]], what: str, *, once: bool = False) -> dict[str, Stored]:
    """Names, types and shapes of all tensors, without reading the values. `once` refuses what is stored twice under one name.

    Raises CheckpointError naming the file.
    """
    found: dict[str, Stored] = {}
    for file, promised in files.items():
        if not file.is_file():
            raise CheckpointError(f"{file}: not found, expected the weights of {what}")
        here = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        missing = sorted(set(promised) - here.keys())
        if missing:
            raise CheckpointError(f"{file}: {missing[0]}: not there, but the index places it in this shard")
        twice = next((name for name in here if once and name in found), None)
        if twice is not None:
            raise CheckpointError(f"{file}: {twice}: stored twice")
        found |= here
    return found


def _safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file ({short_reason(error)})") from None


def _pickled(file: Path) -> dict[str, Stored]:
    """torch reads a pickle without running what is in it (`weights_only`); on "meta" it reads no values."""
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        reason = short_reason(error)
        raise CheckpointError(
            f"{file}: cannot be read as plain tensors ({type(error).__name__}: {reason}); anything else in a pickle is not run, "
            "expected safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()):
        raise CheckpointError(f"{file}: got something else than named tensors, expected the weights of a model")
    return {name: Stored(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def numbered_layers(names: Any) -> int:
    """How many layers tensors can belong to: the largest number in a name, and one more."""
    numbers = [int(n) for name in names for n in re.findall(r"(?:^|\.)(\d{1,9})(?=\.)", name)]
    return max(numbers, default=-1) + 1


# ---- what the configuration says ---------------------------------------------------------------------------------

_WIDTH = ("an integer in 1..{}", 1, MOST_WIDTH)
_WHOLE = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "vocab_size": ("an integer in 1..{}", 1, MOST_VOCAB),
    "num_hidden_layers": ("an integer in 1..{}", 1, MOST_LAYERS),
    "num_attention_heads": ("an integer in 1..{}", 1, MOST_HEADS),
    "num_key_value_heads": ("an integer in 1..{}", 1, MOST_HEADS),
    "head_dim": ("an integer in 1..{}", 1, MOST_HEADS),
    "max_position_embeddings": ("an integer in 1..{}", 1, MOST_POSITIONS),
}
# Name: lower bound, whether it is itself allowed, upper bound.
_REAL = {
    "rope_theta": (0, False, math.inf),
    "rope_local_base_freq": (0, False, math.inf),
    "rotary_emb_base": (0, False, math.inf),
    "partial_rotary_factor": (0, False, 1),
    "rotary_pct": (0, False, 1),
    "rms_norm_eps": (0, True, 1),
    "layer_norm_eps": (0, True, 1),
    "layer_norm_epsilon": (0, True, 1),
    "norm_eps": (0, True, 1),
}
# Inside rope_parameters and rope_scaling.
_ROPE = {
    "factor": (0, False, math.inf),
    "low_freq_factor": (0, False, math.inf),
    "high_freq_factor": (0, False, math.inf),
    "attention_factor": (0, False, math.inf),
    "beta_fast": (0, False, math.inf),
    "beta_slow": (0, False, math.inf),
    "original_max_position_embeddings": (0, False, MOST_POSITIONS),
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Numbers of modules that are built one by one.
_MODULES = re.compile(
    r"(layers?|experts?|heads?|labels|blocks|groups)$|^(num|n)_.*(layers?|experts?|heads?|labels|blocks|groups)"
)
# What a layer computes with, by name.
_ACTIVATION = re.compile(r"(^|_)(act|act_fn|activation|activation_function)$")
# Infinite on purpose in recurrent models, and none of it is ours to run.
_MAY_BE_INFINITE = ("time_step_limit",)
_LARGEST = 2**63
_FLOAT32_MAX = 3.4028235e38


def finite(value: Any) -> bool:
    """Whether `value` is a number that float32 can express; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_FLOAT32_MAX <= value <= _FLOAT32_MAX


def _is_dtype(value: Any) -> bool:
    """Whether a configuration's `dtype` names one of torch's, or leaves it open."""
    if not isinstance(value, str):
        return False
    return value == "auto" or isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _activations() -> list[str]:
    from transformers.activations import ACT2FN

    return sorted(ACT2FN)


def check_rope(rope: dict[str, Any]) -> tuple[str, str] | None:
    """Name of what is wrong in a set of rotary parameters and what was expected there; None when nothing is."""
    for key, (low, inclusive, high) in (_ROPE | _REAL).items():
        value = rope.get(key)
        if value is not None and not _between(value, low, inclusive, high):
            return key, _expected(low, inclusive, high)
    if rope.get("rope_type", rope.get("type")) == "llama3" and {"low_freq_factor", "high_freq_factor"} <= rope.keys():
        if rope["high_freq_factor"] <= rope["low_freq_factor"]:
            return "high_freq_factor", f"more than low_freq_factor {rope['low_freq_factor']}"
    return None


def _between(value: Any, low: float, inclusive: bool, high: float) -> bool:
    return finite(value) and (value >= low if inclusive else value > low) and value <= high


def _expected(low: float, inclusive: bool, high: float) -> str:
    return f"a number {'of at least' if inclusive else 'above'} {low}" + (
        "" if high == math.inf else f" and at most {high}"
    )


class _Config:
    """`config.json` of a target as it stands in the file, looked through before transformers makes anything of it."""

    def __init__(self, folder: Path, path: str | Path):
        self.file, self.where = folder / _CONFIG, f"target {path}: {_CONFIG}"
        self.values = read_object(self.file, "a model's configuration")

    def fail(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key}: got {short(value)}, expected {expected}")

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Names the field that an exception is about: many say which name they did not know, but not where it stands."""
        try:
            yield
        except DflashError:
            raise
        except Exception as error:
            said = str(error)
            for _, key, value in self.entries():
                quoted = isinstance(value, str) and any(f"{q}{value}{q}" in said for q in "'\"`")
                if quoted and value and not re.search(rf"[`'\"]{re.escape(key)}[`'\"]", said):
                    known = f"an activation that transformers knows ({', '.join(_activations())})"
                    unknown = f"a name that transformers knows ({type(error).__name__}: {short_reason(error)})"
                    raise self.fail(key, value, known if _ACTIVATION.search(key) else unknown) from error
            raise

    def entries(self) -> Iterator[tuple[str, str, Any]]:
        """Every value that is no container, with its key and the key of the object it stands in; quantizers read their own part."""
        stack: list[tuple[str, str, Any]] = [("", "", self.values)]
        while stack:
            parent, key, value = stack.pop()
            if isinstance(value, dict) and isinstance(value.get("__float__"), str):
                # How transformers writes what JSON has no number for.
                yield parent, key, float(value["__float__"])
            elif isinstance(value, dict):
                stack += [(key or parent, k, v) for k, v in value.items() if k != "quantization_config"]
            elif isinstance(value, list):
                stack += [(parent, key, v) for v in value]
            else:
                yield parent, key, value

    def check(self) -> None:
        """Ranges every number, and looks names up where what is raised later would not say which it was. Raises CheckpointError naming the
        field."""
        from transformers.configuration_utils import ALLOWED_LAYER_TYPES

        canonical = self._aliases()
        for parent, key, value in self.entries():
            name = canonical.get(key, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and key not in _MAY_BE_INFINITE and not (-_LARGEST <= value <= _LARGEST or finite(value)):
                raise self.fail(key, value, "a finite number")
            if parent.startswith(("vision", "audio")) or value is None:
                continue
            if name in _WHOLE:
                expected, low, high = _WHOLE[name]
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                    raise self.fail(key, value, expected.format(high))
            elif name in _REAL and not _between(value, *_REAL[name]):
                raise self.fail(key, value, _expected(*_REAL[name]))
            elif number and isinstance(value, int) and _MODULES.search(key) and value > MOST_LAYERS:
                raise self.fail(key, value, f"at most {MOST_LAYERS}")
            elif key == "layer_types" and isinstance(value, str) and value not in ALLOWED_LAYER_TYPES:
                raise self.fail(key, value, f"layers that transformers knows ({', '.join(ALLOWED_LAYER_TYPES)})")
            elif key in ("dtype", "torch_dtype") and not _is_dtype(value):
                raise self.fail(key, value, "the name of a type of torch, such as 'bfloat16'")
            elif key in ("attn_implementation", "_attn_implementation", "experts_implementation") and "/" in str(value):
                raise self.fail(key, value, "the name of an implementation here: code from elsewhere is not run")
        for holder in self._objects(self.values):
            if holder.get("fusion_config") is not None:
                raise self.fail(
                    "fusion_config", holder["fusion_config"], "nothing: modules are built as transformers has them"
                )
            check_eos(self.where, holder.get("eos_token_id"), None)
            self._check_window(holder)
            for key in _ROPE_KEYS:
                self._check_rope(key, holder.get(key))

    def _aliases(self) -> dict[str, str]:
        """What this architecture calls the fields whose ranges are known."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        names = {"max_seq_len": "max_position_embeddings"}
        for holder in self._objects(self.values):
            kind = holder.get("model_type")
            if isinstance(kind, str) and kind in CONFIG_MAPPING:
                aliases = getattr(CONFIG_MAPPING[kind], "attribute_map", {})
                names |= {alias: name for name, alias in aliases.items() if name in _WHOLE}
        return names

    def _objects(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The configuration and those of its parts: one level is all that transformers has."""
        yield values
        for key, value in values.items():
            if isinstance(value, dict) and key not in (*_ROPE_KEYS, "quantization_config"):
                yield value

    def _check_window(self, holder: dict[str, Any]) -> None:
        window = holder.get("sliding_window")
        if window is None or holder.get("use_sliding_window") is False:
            return
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < _LARGEST:
            raise self.fail("sliding_window", window, "an integer of at least 1, or null")

    def _check_rope(self, key: str, rope: Any) -> None:
        if rope is None:
            return
        if not isinstance(rope, dict):
            raise self.fail(key, rope, "an object")
        for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            wrong = check_rope(part)
            if wrong is not None:
                raise self.fail(f"{key}.{wrong[0]}", part.get(wrong[0]), wrong[1])

    def check_code(self) -> None:
        """Refuses a checkpoint that only its own code can run."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind, names, own = (self.values.get(key) for key in ("model_type", "architectures", "auto_map"))
        if not isinstance(kind, str | None):
            raise self.fail("model_type", kind, "a name")
        if own is None:
            return
        if not isinstance(own, dict):
            raise self.fail("auto_map", own, "an object")
        names = [kind] if not isinstance(names, list) else names
        known = kind in CONFIG_MAPPING and all(
            name == kind or (isinstance(name, str) and name.isidentifier() and hasattr(transformers, name))
            for name in names
        )
        if not known:
            raise self.fail(
                "auto_map",
                own,
                f"an architecture that transformers knows: {short(names[0] if names else kind)} needs the checkpoint's own code, which is "
                "not run",
            )

    def check_quantization(self) -> bool:
        """Whether the weights are quantized, in a way that transformers knows."""
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

        quantized = False
        for holder in self._objects(self.values):
            about = holder.get("quantization_config")
            if about is None:
                continue
            if not isinstance(about, dict):
                raise self.fail("quantization_config", about, "an object")
            method = about.get("quant_method")
            if not (about.get("load_in_8bit") or about.get("load_in_4bit")) and (
                not isinstance(method, str) or method not in known
            ):
                raise self.fail(
                    "quantization_config.quant_method",
                    method,
                    f"one that transformers knows ({', '.join(sorted(known))}): without its quantizer the stored numbers would be taken "
                    "for the weights",
                )
            quantized = True
        return quantized

    def check_layers(self, tensors: dict[str, Stored]) -> None:
        """Refuses numbers of layers and other modules that the stored tensors cannot fill."""
        layers = numbered_layers(tensors) or len(tensors)
        most = max([1024, len(tensors), *(max(t.shape, default=0) for t in tensors.values())])
        canonical = self._aliases()
        for parent, key, value in self.entries():
            if isinstance(value, bool) or not isinstance(value, int) or parent.startswith(("vision", "audio")):
                continue
            if canonical.get(key, key) == "num_hidden_layers" and value > layers:
                raise self.fail(key, value, f"at most {layers}: there are tensors for no more layers")
            if _MODULES.search(key) and value > most:
                raise self.fail(key, value, f"at most {most}, by the tensors that are stored")


# ---- a target ----------------------------------------------------------------------------------------------------


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


def _generation_config(folder: Path, path: str | Path, vocab_size: int | None) -> None:
    file = folder / _GENERATION
    if file.exists():  # transformers goes on without one that it cannot read
        values = read_object(file, "generation settings")
        check_eos(f"target {path}: {_GENERATION}", values.get("eos_token_id"), vocab_size)


def check_eos(where: str, value: Any, vocab_size: int | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple of ids below `vocab_size` (None: not known). Raises CheckpointError."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    high = MOST_VOCAB if vocab_size is None else vocab_size
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < high for i in ids):
        raise CheckpointError(f"{where}: eos_token_id: got {short(value)}, expected token ids in 0..{high - 1}")
    return ids


def load_config(folder: Path, path: str | Path):
    """The transformers configuration in `folder`, every number ranged. `path` is its name in errors. Raises CheckpointError."""
    from transformers import AutoConfig

    with readable(path):
        raw = _Config(folder, path)
        raw.check_code()
        raw.check()
        raw.check_quantization()
        with raw.blamed():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # What a checkpoint was saved with. Others than these would be looked for in packages and at the hub; the engine brings its own.
        if config._attn_implementation not in (None, "eager", "sdpa"):
            config._attn_implementation = None
        if getattr(config, "_experts_implementation", None) not in (None, "eager", "batched_mm", "grouped_mm"):
            config._experts_implementation = None
        return config


def _check_indices(folder: Path) -> None:
    """What transformers asks of the index it reads, beside the files' names."""
    for single, name in zip(_SINGLES, _INDICES):
        if (folder / single).is_file():
            return
        if (folder / name).is_file():
            about = read_object(folder / name, "an index").get("metadata")
            if not isinstance(about, dict):
                raise CheckpointError(
                    f"{folder / name}: metadata: got {short(about)}, expected an object, which may be empty"
                )


@dataclass(frozen=True)
class Described:
    """A target as its files describe it, looked through, without a weight read. `path` is its name in errors."""

    path: str | Path
    folder: Path
    raw: _Config
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
        raw = _Config(folder, path)
        quantized = raw.check_quantization()
        _refuse_beside(folder, path)
        tensors = stored_tensors(tensor_files(folder, raw.values.get("transformers_weights")), "a model")
        raw.check_layers(tensors)
        _check_indices(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise raw.fail(
                "model_type", raw.values.get("model_type"), "that of a causal language model in transformers"
            )
        vocab = getattr(config.get_text_config(), "vocab_size", None)
        check_eos(raw.where, raw.values.get("eos_token_id"), vocab)
        _generation_config(folder, path, vocab)
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


def _spellings(model: nn.Module, name: str) -> tuple[str, ...]:
    """A parameter's name as checkpoints write it: with or without the name of the model inside the model."""
    prefix = model.base_model_prefix + "."
    return name, prefix + name, name.removeprefix(prefix)


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


def some(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---- a tokenizer -------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path):
    """The tokenizer of a folder or hub name. Raises CheckpointError where there is none, or only its own code could run it."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    folder = target_folder(path, "tokenizer", weights=False)
    with readable(path, "tokenizer"):
        for name in _TOKENIZER_JSON:
            if (folder / name).exists():
                (read_json if name == "vocab.json" else read_object)(folder / name, "part of a tokenizer")
        file = folder / "tokenizer_config.json"
        about = read_object(file, "a tokenizer's settings") if file.exists() else {}
        own = about.get("auto_map")
        own = own.get("AutoTokenizer") if isinstance(own, dict) else own
        kind = about.get("tokenizer_class")
        if not isinstance(kind, str | None):
            raise CheckpointError(f"tokenizer {path}: {file.name}: tokenizer_class: got {short(kind)}, expected a name")
        spellings = () if kind is None else (kind, kind.removesuffix("Fast"), kind + "Fast")
        if own is not None and all(tokenizer_class_from_name(spelling) is None for spelling in spellings):
            raise CheckpointError(
                f"tokenizer {path}: {file.name}: auto_map: got {short(own)}, expected a tokenizer_class that transformers knows: "
                f"{kind or 'this one'} needs the checkpoint's own code, which is not run"
            )
        for key in ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files"):
            given = about.get(key)
            for other in given if isinstance(given, list) else [given]:
                # Many configurations remember where their author's file lay; only where there is one now would it be read.
                if isinstance(other, str) and re.search(r"[/\\]", other) and (folder / other).exists():
                    raise CheckpointError(
                        f"tokenizer {path}: {file.name}: {key}: got {short(other)}, expected a file in the folder"
                    )
        # By the hub's name, where that is what was given: transformers knows some repositories whose settings are wrong.
        tokenizer = AutoTokenizer.from_pretrained(path if is_hub_name(path) else folder, trust_remote_code=False)
        if not tokenizer("a").input_ids:
            raise CheckpointError(
                f"tokenizer {path}: it turns 'a' into no token, expected a tokenizer.json in the folder"
            )
        return tokenizer

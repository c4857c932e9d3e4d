"""The configuration of a target: numbers ranged, names looked up, code and unknown quantizations refused, then given to transformers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, DflashError
from .ranges import (
    LARGEST,
    MOST_LAYERS,
    REAL,
    ROPE_KEYS,
    WHOLE,
    between,
    check_eos,
    check_rope,
    expected_between,
    finite,
)
from .reading import CONFIG, GENERATION, read_object, readable, short, short_reason
from .tensors import Stored, numbered_layers

# Numbers of modules that are built one by one.
_MODULES = re.compile(
    r"(layers?|experts?|heads?|labels|blocks|groups)$|^(num|n)_.*(layers?|experts?|heads?|labels|blocks|groups)"
)
# What a layer computes with, by name.
_ACTIVATION = re.compile(r"(^|_)(act|act_fn|activation|activation_function)$")
# Infinite on purpose in recurrent models, and none of it is ours to run.
_MAY_BE_INFINITE = ("time_step_limit",)


class RawConfig:
    """`config.json` of a target as it stands in the file, looked through before transformers makes anything of it."""

    def __init__(self, folder: Path, path: str | Path):
        self.file, self.where = folder / CONFIG, f"target {path}: {CONFIG}"
        self.values = read_object(self.file, "a model's configuration")

    def fail(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error that names a field of this file."""
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
            if number and key not in _MAY_BE_INFINITE and not (-LARGEST <= value <= LARGEST or finite(value)):
                raise self.fail(key, value, "a finite number")
            if parent.startswith(("vision", "audio")) or value is None:
                continue
            if name in WHOLE:
                expected, low, high = WHOLE[name]
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                    raise self.fail(key, value, expected.format(high))
            elif name in REAL and not between(value, *REAL[name]):
                raise self.fail(key, value, expected_between(*REAL[name]))
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
            for key in ROPE_KEYS:
                self._check_rope(key, holder.get(key))

    def _aliases(self) -> dict[str, str]:
        """What this architecture calls the fields whose ranges are known."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        names = {"max_seq_len": "max_position_embeddings"}
        for holder in self._objects(self.values):
            kind = holder.get("model_type")
            if isinstance(kind, str) and kind in CONFIG_MAPPING:
                aliases = getattr(CONFIG_MAPPING[kind], "attribute_map", {})
                names |= {alias: name for name, alias in aliases.items() if name in WHOLE}
        return names

    def _objects(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The configuration and those of its parts: one level is all that transformers has."""
        yield values
        for key, value in values.items():
            if isinstance(value, dict) and key not in (*ROPE_KEYS, "quantization_config"):
                yield value

    def _check_window(self, holder: dict[str, Any]) -> None:
        window = holder.get("sliding_window")
        if window is None or holder.get("use_sliding_window", _default(holder, "use_sliding_window")) is False:
            return
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < LARGEST:
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


def _is_dtype(value: Any) -> bool:
    """Whether a configuration's `dtype` names one of torch's, or leaves it open."""
    if not isinstance(value, str):
        return False
    return value == "auto" or isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _default(holder: dict[str, Any], key: str) -> Any:
    """What a field is that the configuration of this architecture leaves out; None where transformers has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = holder.get("model_type")
    return getattr(CONFIG_MAPPING[kind], key, None) if isinstance(kind, str) and kind in CONFIG_MAPPING else None


def _activations() -> list[str]:
    from transformers.activations import ACT2FN

    return sorted(ACT2FN)


def load_config(folder: Path, path: str | Path):
    """The transformers configuration in `folder`, every number ranged. `path` is its name in errors. Raises CheckpointError."""
    from transformers import AutoConfig

    with readable(path):
        raw = RawConfig(folder, path)
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


def check_generation(folder: Path, path: str | Path, vocab_size: int | None) -> None:
    """Refuses generation settings that cannot be read or whose end of text is no token. Raises CheckpointError."""
    file = folder / GENERATION
    if file.exists():  # transformers goes on without one that it cannot read
        values = read_object(file, "generation settings")
        check_eos(f"target {path}: {GENERATION}", values.get("eos_token_id"), vocab_size)

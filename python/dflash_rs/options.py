"""What callers of `LLM` may pass, checked: prompts, parameters, where and how to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core
from .errors import InvalidArgument
from .outputs import Prompt
from .sampling import SamplingParams


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
    if isinstance(prompts, bytes | bytearray) or not (array or isinstance(prompts, Sequence)):
        raise InvalidArgument(
            f"prompts: got {type(prompts).__name__}, expected a string, token ids, or a list of these"
        )
    if len(prompts) and isinstance(prompts[0], int | np.integer):
        return [list(prompts)]
    return list(prompts)


def params_for(texts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * len(texts)
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise InvalidArgument(f"params: got {params!r}, expected SamplingParams, or a list of them")
    params = list(params)
    if len(params) != len(texts):
        raise InvalidArgument(f"params: got {len(params)}, expected one, or one for each of {len(texts)} prompts")
    for one in params:
        if not isinstance(one, SamplingParams):
            raise InvalidArgument(f"params: got {one!r}, expected SamplingParams")
    return params


def core_params(o: SamplingParams, seed: int, draft: bool) -> dict[str, Any]:
    return {
        "temperature": float(o.temperature),
        "top_k": int(o.top_k),
        "top_p": float(o.top_p),
        "min_p": float(o.min_p),
        "repetition_penalty": float(o.repetition_penalty),
        "presence_penalty": float(o.presence_penalty),
        "frequency_penalty": float(o.frequency_penalty),
        "logit_bias": dict(o.logit_bias),
        "seed": seed,
        "max_tokens": int(o.max_tokens),
        "stop_token_ids": list(o.stop_token_ids),
        "stop": [s.encode() for s in o.stop],
        "ignore_eos": o.ignore_eos,
        "logprobs": o.logprobs,
        "draft": draft,
    }


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pick_device(torch: Any, name: str) -> Any:
    if not isinstance(name, str):
        raise InvalidArgument(f"device: got {name!r}, expected 'auto', 'cpu' or 'cuda'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InvalidArgument(f"device: got {name!r}, but torch sees no CUDA GPU here; use 'cpu' or 'auto'")
        return torch.device(name)
    raise InvalidArgument(f"device: got {name!r}, expected 'auto', 'cpu' or 'cuda'")


def pick_dtype(torch: Any, name: str, device: Any) -> Any:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(name, str):
        raise InvalidArgument(f"dtype: got {name!r}, expected a name, for example 'float32'")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InvalidArgument(f"dtype: got {name!r}, expected 'auto' or one of {sorted(known)}")
    return known[name]


def pick_precision(name: str, device: Any, dtype: Any) -> str:
    if name not in ("highest", "medium", "auto"):
        raise InvalidArgument(f"matmul_precision: got {name!r}, expected 'highest', 'medium' or 'auto'")
    applies = device.type == "cpu" and str(dtype) == "torch.float32"
    if name == "medium" and not applies:
        raise InvalidArgument(
            f"matmul_precision: got 'medium' with {dtype} on {device}, expected 'highest': it is for float32 on a CPU"
        )
    if name == "auto":
        return "medium" if applies and _core.multiplies_bf16() else "highest"
    return name

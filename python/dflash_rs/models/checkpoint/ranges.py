"""Which numbers of a configuration can be meant: sizes that fit a machine, factors that leave something finite."""

from __future__ import annotations

import math
from typing import Any

from ...errors import CheckpointError
from .reading import short

# Page tables of longer contexts are refused as it is; the longest published one is ten million tokens.
MOST_POSITIONS = 1 << 26
MOST_WIDTH, MOST_HEADS, MOST_LAYERS, MOST_VOCAB = 1 << 24, 1 << 16, 1 << 14, (1 << 31) - 1
# Beyond it an integer is no size of anything.
LARGEST = 2**63
_FLOAT32_MAX = 3.4028235e38

# Name: what is expected, the least and the most of it, both allowed.
_WIDTH = ("an integer in 1..{}", 1, MOST_WIDTH)
WHOLE = {
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
REAL = {
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
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def finite(value: Any) -> bool:
    """Whether `value` is a number that float32 can express; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_FLOAT32_MAX <= value <= _FLOAT32_MAX


def between(value: Any, low: float, inclusive: bool, high: float) -> bool:
    """Whether `value` is a finite number in a range that holds its upper bound, and its lower one if `inclusive`."""
    return finite(value) and (value >= low if inclusive else value > low) and value <= high


def expected_between(low: float, inclusive: bool, high: float) -> str:
    """What `between` asks for, in words."""
    return f"a number {'of at least' if inclusive else 'above'} {low}" + (
        "" if high == math.inf else f" and at most {high}"
    )


def check_rope(rope: dict[str, Any]) -> tuple[str, str] | None:
    """Name of what is wrong in a set of rotary parameters and what was expected there; None when nothing is."""
    for key, (low, inclusive, high) in (_ROPE | REAL).items():
        value = rope.get(key)
        if value is not None and not between(value, low, inclusive, high):
            return key, expected_between(low, inclusive, high)
    if rope.get("rope_type", rope.get("type")) == "llama3" and {"low_freq_factor", "high_freq_factor"} <= rope.keys():
        if rope["high_freq_factor"] <= rope["low_freq_factor"]:
            return "high_freq_factor", f"more than low_freq_factor {rope['low_freq_factor']}"
    return None


def check_eos(where: str, value: Any, vocab_size: int | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple of ids below `vocab_size` (None: not known). Raises CheckpointError."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    high = MOST_VOCAB if vocab_size is None else vocab_size
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < high for i in ids):
        raise CheckpointError(f"{where}: eos_token_id: got {short(value)}, expected token ids in 0..{high - 1}")
    return ids

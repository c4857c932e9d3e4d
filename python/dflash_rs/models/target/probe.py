"""How a model attends: found out by running it once, and handed to the pages from then on.

transformers lets a name stand for attention (`ATTENTION_NAME`). While a model is probed a `Recorder` stands behind it, which learns each
layer's shape and window; in a step it is a `Step`, which reads and writes the pages.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import widened
from ...errors import UnsupportedModel
from .. import checkpoint
from ..hybrid import known_layers

# transformers takes any name with "flash" in it for a flash-attention package, so the project's own name is out.
ATTENTION_NAME = "block_paged_kv"
STEP = "paged_step"
# Angles that depend on the longest request of a batch would make one request's text depend on its neighbours.
STATIC_ROPE = (None, "default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class LayerKV:
    """What one attention layer keeps per token, and how it attends.

    `window`: keys at a distance below it are seen (None: all); `softcap`: scores pass through softcap * tanh(score / softcap);
    `sinks`: every head has one more key, without a value, whose score the model brings.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None = None
    sinks: bool = False


class Recorder:
    """Stands in for a step's attention while the model is probed: attends causally and notes each layer's shape and window.

    A window may reach a layer as an argument or in its mask only, which a step has none of. So the masks of the probe say which
    keys the model wants seen, at positions up to `limit`, far beyond the probe's own tokens. Some models make masks that no layer of theirs
    gets, such as one for a window that the configuration turned off: only what a layer gets has to be a causal window.
    """

    def __init__(self, limit: int):
        self.layers: dict[int, LayerKV] = {}
        self.modules: dict[int, nn.Module] = {}
        self._limit = max(2, limit)
        # What a layer may get, a copy, and its window or what is against it.
        self._masks: list[tuple[Tensor, Tensor, int | UnsupportedModel | None]] = []

    def mask(self, *, mask_function, batch_size, q_length, kv_length, device, use_vmap=False, local_size=None, **_):
        """The mask of the probe's tokens, bool [batch, 1, q, kv], after learning what it would be at any distance."""

        def seen(queries: Tensor, keys: Tensor) -> Tensor:
            zero = torch.zeros(1, dtype=torch.int64, device=queries.device)
            function = mask_function
            if use_vmap:
                for dims in (
                    (None, None, None, 0),
                    (None, None, 0, None),
                    (None, 0, None, None),
                    (0, None, None, None),
                ):
                    function = torch.vmap(function, in_dims=dims)
                found = function(zero, zero, queries, keys)
            else:
                found = function(
                    zero[:, None, None, None],
                    zero[None, :, None, None],
                    queries[None, None, :, None],
                    keys[None, None, None, :],
                )
            return found.expand(1, 1, len(queries), len(keys))[0, 0].to(torch.bool)

        window: int | UnsupportedModel | None
        try:
            try:
                window = self._window(seen, device, local_size)
            except UnsupportedModel as error:
                window = error
            own = seen(torch.arange(q_length, device=device), torch.arange(kv_length, device=device))
        except (IndexError, RuntimeError) as error:
            raise UnsupportedModel(
                f"its attention mask depends on more than positions ({type(error).__name__}: {line(error)}), expected a causal one, "
                "with or without a window"
            ) from error
        mask = own[None, None].expand(batch_size, 1, q_length, kv_length).contiguous()
        self._masks.append((mask, mask.clone(), window))
        return mask

    def _window(self, seen, device, hint: int | None) -> int | None:
        last = self._limit - 1
        at = lambda *positions: torch.tensor(positions, device=device)  # noqa: E731
        low, high = 0, last
        while low < high:  # the first key that the last position sees
            middle = (low + high) // 2
            low, high = (low, middle) if bool(seen(at(last), at(middle))) else (middle + 1, high)
        window = None if low == 0 else last - low + 1
        sizes = {1 << e for e in range(self._limit.bit_length())} | {self._limit} | {s for s in (window, hint) if s}
        near = {s * m + d for s in sizes for m in (1, 2) for d in (-2, -1, 0, 1)}
        points = torch.tensor(sorted({p for p in near | {0, last} if 0 <= p <= last}), device=device)
        distance = points[:, None] - points[None, :]
        expected = distance >= 0
        if window is not None:
            expected &= distance < window
        found = seen(points, points)
        if not torch.equal(found, expected):
            q, k = (int(x) for x in (found != expected).nonzero()[0])
            raise UnsupportedModel(
                f"its attention mask lets position {int(points[q])} {'see' if found[q, k] else 'not see'} position {int(points[k])}, "
                f"expected a causal one, with or without a window: chunks and blocks of positions are not supported"
            )
        return window

    def _window_of(self, mask: Tensor | None, window: int | None, name: str) -> int | None:
        """The window that a layer's mask and its argument agree on."""
        if mask is None:
            return window
        for given, kept, wanted in self._masks:
            if mask.data_ptr() == given.data_ptr() and mask.shape == given.shape and torch.equal(mask, kept):
                if isinstance(wanted, UnsupportedModel):
                    raise wanted
                if window is None or window == wanted or (wanted is None and window >= self._limit):
                    return wanted if window is None else window
                raise UnsupportedModel(
                    f"{name}: sliding_window is {window}, but its mask has {'none' if wanted is None else wanted}, expected the same "
                    "window in both"
                )
        raise UnsupportedModel(
            f"{name}: attention gets a mask that the layer or the model made itself, expected none but a causal one, with or without "
            "a window"
        )

    def attend_layer(self, index, q, k, v, scale, window, softcap, sinks, mask, module):
        if index in self.layers:
            raise UnsupportedModel(
                f"layer {index} attends twice per forward: cross-attention or shared layers have no pages"
            )
        self.modules[index] = module
        window = self._window_of(mask, window, type(module).__name__)
        self.layers[index] = LayerKV(
            k.shape[1], k.shape[-1], v.shape[-1], float(scale), window, softcap, sinks is not None
        )
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)


class Step:
    """A step's attention together with the caches, as the registered attention function needs them.

    `windows`: that of every layer, as the probe found it.
    """

    def __init__(self, attention, caches, windows):
        self.attention, self.caches, self.windows = attention, caches, windows

    def attend_layer(self, index, q, k, v, scale, window, softcap, sinks, mask, module):
        if mask is not None:
            name = type(module).__name__
            raise UnsupportedModel(f"{name}: attention gets a mask that the model made itself, expected none")
        k_cache, v_cache = self.caches[index]
        width = v.shape[-1]
        q, k, v = (widened(x[0].transpose(0, 1), c.shape[-1]) for x, c in ((q, k_cache), (k, k_cache), (v, v_cache)))
        found = self.attention.attend(
            q,
            k,
            v,
            k_cache,
            v_cache,
            scale=scale,
            causal=True,
            window=self.windows[index],
            softcap=softcap,
            sinks=sinks,
        )
        return found[None] if found.shape[-1] == width else found[None, ..., :width].contiguous()


def registered_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    step = kwargs.get(STEP)
    name = type(module).__name__
    if step is None:
        raise UnsupportedModel(
            f"{name} does not pass extra arguments on to its attention, so the pages cannot reach it"
        )
    for option in ("position_bias", "indices", "block_table"):
        if kwargs.get(option) is not None:
            raise UnsupportedModel(f"{name}: attention option {option!r} is not supported")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{name}: attention is not causal")
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise UnsupportedModel(f"{name} has no layer_idx, so its pages cannot be told apart")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None and softcap <= 0:
        raise UnsupportedModel(f"{name}: softcap: got {softcap}, expected a positive number")
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise UnsupportedModel(
            f"{name}: s_aux: got shape {tuple(sinks.shape)}, expected one number for each of the {query.shape[1]} heads"
        )
    return step.attend_layer(
        index,
        query,
        key,
        value,
        scale,
        kwargs.get("sliding_window"),
        None if softcap is None else float(softcap),
        None if sinks is None else sinks.reshape(-1),
        attention_mask,
        module,
    ), None


probing = threading.local()


def registered_mask(**kwargs):
    """No mask in a step, where attention knows what is seen; while the model is probed, one that tells."""
    recorder = getattr(probing, "recorder", None)
    return None if recorder is None else recorder.mask(**kwargs)


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, registered_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, registered_mask)


def line(error: BaseException) -> str:
    return (str(error).strip() or "no message").split("\n")[0][:200]


@contextlib.contextmanager
def named(model: nn.Module, what: str):
    """Turns whatever a model's own code raises into an UnsupportedModel that names the model."""
    name = type(model).__name__
    try:
        yield
    except UnsupportedModel as error:
        text = str(error)
        raise (error if name in text else UnsupportedModel(f"{name}: {text}")) from error.__cause__
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(f"{name}: {what} fails ({type(error).__name__}: {line(error)})") from error


def check_architecture(config) -> None:
    """Refuses, from the configuration alone, what paged causal attention does not hold. Raises UnsupportedModel."""
    text = config.get_text_config()
    kind = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{kind}: encoder-decoder models are not supported, expected a causal LM")
    for layer_type in getattr(text, "layer_types", None) or ():
        if layer_type not in ("full_attention", "sliding_attention", *known_layers(kind)):
            raise UnsupportedModel(
                f"{kind}: layer_types has {layer_type!r}, expected full_attention or sliding_attention, or recurrent layers that are known: "
                "the state of others and chunked attention cannot be rolled back by dropping pages"
            )
    if shared := getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModel(f"{kind}: num_kv_shared_layers = {shared!r} is not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for entry in nested or [rope]:
        if entry.get("rope_type") not in STATIC_ROPE:
            raise UnsupportedModel(
                f"{kind}: rope_type: got {checkpoint.short(entry.get('rope_type'))}, expected one whose angles are the same for every length "
                f"({', '.join(STATIC_ROPE[1:])})"
            )

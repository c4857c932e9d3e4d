"""A Hugging Face causal LM as a target: paged KV, packed ragged batches, tapped hidden states.

    StepBatch --> embed --> decoder layers ------------------> norm, lm_head on logit_rows --> logits [N, V]
                             |  attention reads and writes pages
                             +-- output of layer k, k in taps --> features [T, K*H]

The model's own code runs: attention is swapped through transformers' attention registry, and hidden states are tapped
with hooks. For the plain Llama-shaped families a shorter path does the same sums with fewer operations
(`fused.py`). Both are compared with the ordinary forward on a small ragged batch when the model is loaded, and an
architecture with state that pages do not hold is refused there. What only length shows is looked at without the length: the masks
that the model asks for are evaluated at positions far apart, and one of the compared requests stands at the end of the context.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention import kernel_serves, step_attention
from ..errors import CheckpointError, InvalidArgument, UnsupportedModel, warn
from . import checkpoint
from .batch import StepBatch
from .fused import FusedLayer, PackedLinear, RotaryTable

# transformers takes any name with "flash" in it for a flash-attention package, so the project's own name is out.
ATTENTION_NAME = "block_paged_kv"
_STEP = "paged_step"
_FUSED_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Angles that depend on the longest request of a batch would make one request's text depend on its neighbours.
_STATIC_ROPE = (None, "default", "linear", "llama3", "yarn", "proportional")


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


class _Recorder:
    """Stands in for a step's attention while the model is probed: attends causally and notes each layer's shape and window.

    A window may reach a layer as an argument or in its mask only, which a step has none of. So the masks of the probe say which
    keys the model wants seen, at positions up to `limit`, far beyond the probe's own tokens.
    """

    def __init__(self, limit: int):
        self.layers: dict[int, LayerKV] = {}
        self.modules: dict[int, nn.Module] = {}
        self._limit = max(2, limit)
        self._masks: list[tuple[Tensor, Tensor, int | None]] = []

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

        try:
            window = self._window(seen, device, local_size)
            own = seen(torch.arange(q_length, device=device), torch.arange(kv_length, device=device))
        except (IndexError, RuntimeError) as error:
            raise UnsupportedModel(
                f"its attention mask depends on more than positions ({type(error).__name__}: {_line(error)}), expected a causal one, "
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


class _Step:
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
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.attention.attend(
            *rows, k_cache, v_cache, scale=scale, causal=True, window=self.windows[index], softcap=softcap, sinks=sinks
        )[None]


def _registered_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    step = kwargs.get(_STEP)
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


_probing = threading.local()


def _registered_mask(**kwargs):
    """No mask in a step, where attention knows what is seen; while the model is probed, one that tells."""
    recorder = getattr(_probing, "recorder", None)
    return None if recorder is None else recorder.mask(**kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _registered_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _registered_mask)


def _line(error: BaseException) -> str:
    return (str(error).strip() or "no message").split("\n")[0][:200]


@contextlib.contextmanager
def _named(model: nn.Module, what: str):
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
        raise UnsupportedModel(f"{name}: {what} fails ({type(error).__name__}: {_line(error)})") from error


def check_architecture(config) -> None:
    """Refuses, from the configuration alone, what paged causal attention does not hold. Raises UnsupportedModel."""
    text = config.get_text_config()
    kind = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{kind}: encoder-decoder models are not supported, expected a causal LM")
    for layer_type in getattr(text, "layer_types", None) or ():
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"{kind}: layer_types has {layer_type!r}, expected full_attention or sliding_attention: recurrent state and "
                "chunked attention cannot be rolled back by dropping pages"
            )
    if shared := getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModel(f"{kind}: num_kv_shared_layers = {shared!r} is not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for entry in nested or [rope]:
        if entry.get("rope_type") not in _STATIC_ROPE:
            raise UnsupportedModel(
                f"{kind}: rope_type {entry.get('rope_type')!r} depends on the length of the batch, expected one of "
                f"{', '.join(_STATIC_ROPE[1:])}"
            )


class _Quiet:
    """transformers without its progress bar and its report of the tensors it met, which `load` goes through itself.

    Both are settings of the process: they are the caller's again when the last of several threads has left.
    """

    def __init__(self):
        self._lock, self._inside, self._bar = threading.Lock(), 0, False

    @staticmethod
    def _keep(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    def __enter__(self) -> None:
        from transformers.utils import logging

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._bar = logging.is_progress_bar_enabled()
                self._bars(logging, False)
                logging.get_logger("transformers.modeling_utils").addFilter(self._keep)

    def __exit__(self, *_) -> None:
        from transformers.utils import logging

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._bars(logging, self._bar)
                logging.get_logger("transformers.modeling_utils").removeFilter(self._keep)

    @staticmethod
    def _bars(logging, on: bool) -> None:
        from huggingface_hub import utils as hub

        # transformers switches the hub's bars along with its own. A download of gigabytes may show how far it is.
        hidden = hub.are_progress_bars_disabled()
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()
        if hidden != hub.are_progress_bars_disabled():
            (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()


_quiet = _Quiet()


class TargetModel:
    """A causal LM that reads and writes a paged KV cache.

    `model` is a transformers `...ForCausalLM`, put in eval mode and switched to our attention: it must not be used for
    anything else afterwards. `path` names which forward runs: "fused" or "modules"; `path_reason` says why.
    `kernel` tells whether attention runs in the extension; setting it to False selects the torch reference.
    `matmul_precision`: "highest", or "medium", which multiplies in bfloat16 (sums stay float32); the latter needs the fused forward.
    """

    def __init__(
        self, model: nn.Module, *, fused: bool = True, self_check: bool = True, matmul_precision: str = "highest"
    ):
        check_architecture(model.config)
        if not type(model)._supports_attention_backend:
            raise UnsupportedModel(f"{type(model).__name__} does not take its attention from the transformers registry")
        _register()
        self.matmul_precision = matmul_precision
        self.model = model.eval().requires_grad_(False)
        # What a checkpoint says of the form of its answers is about nobody's forward but its own code's, which reads them by name.
        model.config.return_dict = model.config.get_text_config().return_dict = True
        self.config = model.config.get_text_config()
        self.embedding: nn.Module = model.get_input_embeddings()
        self.lm_head: nn.Module = model.get_output_embeddings()
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        self.hidden_size, self.num_layers = int(self.config.hidden_size), int(self.config.num_hidden_layers)
        self.vocab_size = int(self.lm_head.weight.shape[0])
        self.taps: tuple[int, ...] = ()
        self._hooks: list = []
        self._tapped: dict[int, Tensor] = {}
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_slots = 0
        with torch.inference_mode():
            with _named(model, "its own forward on a few tokens"):
                check = _Check(self) if self_check else None
            self._fused, self.path_reason = None, "turned off"
            model.set_attn_implementation(ATTENTION_NAME)
            with _named(model, "its forward with attention over pages"):
                self.kv_layers, self.decoder_layers, self._layer_outputs = self._probe()
            self._windows = {index: kv.window for index, kv in self.kv_layers.items()}
            shapes = {(kv.key_dim, kv.value_dim) for kv in self.kv_layers.values()}
            self.kernel = all(kernel_serves(self.device, self.dtype, *shape) for shape in shapes)
            if check is not None:
                with _named(model, "its forward with attention over pages"):
                    check.compare(self, "modules")
            if fused:
                self._fused, self.path_reason = _FusedModel.build(self)
                if self._fused is not None and check is not None and not check.agrees(self):
                    self._fused, self.path_reason = None, "the fused path differs from the model's own forward"
        if self._fused is None and matmul_precision != "highest":
            raise InvalidArgument(
                f"matmul_precision: got {matmul_precision!r} for a {type(model).__name__}, expected 'highest': {self.path_reason}"
            )
        self.caches, self.num_slots = {}, 0

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu", **options
    ) -> TargetModel:
        """Loads a checkpoint folder or a hub name. `options` go to the constructor.

        Raises CheckpointError when there is none, or when it is damaged or incomplete; a tensor that is missing would
        otherwise be made up. Warns of tensors that the model has no place for: often spare parts, such as layers that predict
        further ahead, but they may be what makes the checkpoint another model.
        """
        with _quiet:
            model, spare = checkpoint.load_causal_lm(path, dtype, check_architecture)
        if spare:
            warn(
                f"target {path}: a {type(model).__name__} has no place for {len(spare)} of its tensors ({checkpoint.some(spare)}); they "
                "are ignored"
            )
        with checkpoint.readable(path):
            for name, tensor in model.named_parameters():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"target {path}: {name}: has values that are not finite")
            target = cls(model.to(device), **options)
            # Said here, before anything is made of them.
            target.eos_token_ids, target.max_context  # noqa: B018
            return target

    @property
    def path(self) -> str:
        """Which forward runs: "fused" or "modules"."""
        return "modules" if self._fused is None else "fused"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, from the generation configuration or else the model's; may be empty. Raises CheckpointError."""
        for source in (getattr(self.model, "generation_config", None), self.config):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return checkpoint.check_eos(self._name, ids, self.vocab_size)
        return ()

    @property
    def max_context(self) -> int:
        """Positions the model was made for, prompt and output together."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= checkpoint.MOST_POSITIONS:
            raise CheckpointError(
                f"{self._name}: max_position_embeddings: got {checkpoint.short(limit)}, expected an integer in "
                f"1..{checkpoint.MOST_POSITIONS}"
            )
        return limit

    @property
    def _name(self) -> str:
        return f"target {getattr(self.model, 'name_or_path', '') or type(self.model).__name__}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV one token takes over all layers."""
        per_head = (layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.kv_layers.values())
        return sum(per_head) * self.dtype.itemsize

    def _find_layers(self, attention: dict[int, nn.Module]) -> nn.ModuleList:
        """The list whose i-th entry holds the module that attended as layer i: a tower for pictures may be as deep."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                if all(any(part is attention[i] for part in layer.modules()) for i, layer in enumerate(module)):
                    return module
        raise UnsupportedModel(
            f"{type(self.model).__name__}: no list of {self.num_layers} decoder layers found (config num_hidden_layers)"
        )

    def _probe(self) -> tuple[dict[int, LayerKV], nn.ModuleList, list[tuple[int, ...]]]:
        """How its layers attend, the layers, and the shape of what each puts out for one request of two tokens."""
        recorder = _Recorder(self.max_context)
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        shapes: dict[nn.Module, tuple[int, ...]] = {}

        def note(module, args, output):
            shapes[module] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_layers]
        hooks = [layer.register_forward_hook(note) for layers in lists for layer in layers]
        _probing.recorder = recorder
        try:
            self.model(input_ids=tokens, position_ids=positions, use_cache=False, **{_STEP: recorder})
        finally:
            _probing.recorder = None
            for hook in hooks:
                hook.remove()
        layers = dict(sorted(recorder.layers.items()))
        if sorted(layers) != list(range(self.num_layers)):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: attention ran in layers {sorted(layers)}, expected every one of the "
                f"{self.num_layers}: a layer without paged attention keeps state that cannot be rolled back"
            )
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        for index, layer in layers.items():
            if softcap and layer.softcap != softcap:
                raise UnsupportedModel(
                    f"layer {index}: attn_logit_softcapping is {softcap}, but {layer.softcap} reached the attention"
                )
            if isinstance(getattr(recorder.modules[index], "sinks", None), Tensor) and not layer.sinks:
                raise UnsupportedModel(f"layer {index}: has sinks, but they did not reach the attention")
        for index, kind in enumerate(getattr(self.config, "layer_types", None) or ()):
            if kind == "sliding_attention" and layers[index].window is None:
                raise UnsupportedModel(
                    f"layer {index}: declared sliding_attention, but its window did not reach the attention"
                )
        decoder = self._find_layers(recorder.modules)
        return layers, decoder, [shapes.get(layer, ()) for layer in decoder]

    def set_taps(self, layer_ids) -> None:
        """Tap the outputs of these layers (0-based, order kept) as features; empty for none.

        The last layer is refused: some code hands out its output, some the normalised one.
        """
        layer_ids = tuple(int(k) for k in layer_ids)
        for k in layer_ids:
            if not 0 <= k < self.num_layers - 1:
                raise InvalidArgument(
                    f"target_layer_ids: got {k}, expected 0..{self.num_layers - 2}, below the last layer"
                )
            if self._layer_outputs[k] != (1, 2, self.hidden_size):
                raise UnsupportedModel(
                    f"{type(self.model).__name__}: layer {k} puts out {list(self._layer_outputs[k])} for two tokens, expected "
                    f"[1, 2, {self.hidden_size}]: there are no features for a drafter"
                )
        for hook in self._hooks:
            hook.remove()
        self.taps = layer_ids
        self._hooks = [self.decoder_layers[k].register_forward_hook(self._keep(k)) for k in sorted(set(layer_ids))]

    def _keep(self, index: int):
        def hook(module, args, output):
            self._tapped[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def alloc_kv(self, num_slots: int) -> None:
        """Allocates zeroed KV for `num_slots` tokens, [num_slots, kv_heads, dim] per layer and kind."""
        if num_slots < 1:
            raise InvalidArgument(f"num_slots: got {num_slots}, expected at least 1")
        self.num_slots = num_slots
        self.caches = {
            index: (
                torch.zeros(num_slots, kv.kv_heads, kv.key_dim, dtype=self.dtype, device=self.device),
                torch.zeros(num_slots, kv.kv_heads, kv.value_dim, dtype=self.dtype, device=self.device),
            )
            for index, kv in self.kv_layers.items()
        }

    def move_kv(self, sources: np.ndarray, places: np.ndarray) -> None:
        """Moves the KV of M tokens from slots `sources` to slots `places`, both int64 [M], in all layers. They may overlap: everything is
        read before anything is written."""
        with torch.inference_mode():
            sources, places = (torch.from_numpy(x.copy()).to(self.device) for x in (sources, places))
            for caches in self.caches.values():
                for cache in caches:
                    cache.index_copy_(0, places, cache.index_select(0, sources))

    def forward(self, batch: StepBatch) -> tuple[Tensor, Tensor | None]:
        """One step: logits [N, V] of `batch.logit_rows`, and features [T, K*H] when taps are set.

        Writes the KV of every token of the batch at its slot. Serves prefill chunks, plain decoding and block
        verification alike; row i's features are the concatenated outputs of the tapped layers at token i.
        """
        if not self.caches:
            raise InvalidArgument("cache: not allocated, call alloc_kv(num_slots) first")
        with torch.inference_mode():
            attention = step_attention(batch, num_slots=self.num_slots, write=True, kernel=self.kernel)
            return self.run(batch.token_ids, batch.positions, batch.max_length, attention, batch.logit_rows)

    def run(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention, logit_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The pass of `forward` over tensors on the device, in inference mode: token_ids and positions int64 [T], positions below
        `limit`; logit_rows int64 [N] (every row when None)."""
        if self._fused is not None:
            return self._fused.forward(token_ids, positions, limit, attention, self.caches, self.taps, logit_rows)
        output = self.model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if logit_rows is None else logit_rows,
            **{_STEP: _Step(attention, self.caches, self._windows)},
        )
        features = torch.cat([self._tapped[k][0] for k in self.taps], dim=-1) if self.taps else None
        self._tapped.clear()
        return output.logits[0], features

    def prepare(self, limit: int) -> None:
        """Makes what a pass over positions below `limit` would make when it is first needed, as a captured graph must not."""
        if self._fused is not None:
            self._fused.rotary.rows(limit, self.device)


class _FusedModel:
    """The short path of a Llama-shaped model."""

    @classmethod
    def build(cls, target: TargetModel) -> tuple[_FusedModel | None, str]:
        """The path, or None and the reason why it does not apply."""
        model = target.model
        name = type(model).__name__
        family = name.removesuffix("ForCausalLM")
        if family not in _FUSED_FAMILIES or not type(model).__module__.startswith("transformers.models."):
            return None, f"{name} is not one of {', '.join(_FUSED_FAMILIES)}"
        if target.config.hidden_act != "silu":
            return None, f"hidden_act is {target.config.hidden_act!r}"
        for layer in target.decoder_layers:
            if type(layer).__name__ != f"{family}DecoderLayer":
                return None, f"a layer is a {type(layer).__name__}"
            attention, mlp = layer.self_attn, layer.mlp
            linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            if any(
                type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks
                for linear in linears
            ):
                return None, "a projection is not a plain Linear"
        return cls(target), "Llama-shaped"

    def __init__(self, target: TargetModel):
        base = target.model.model
        eps = float(target.config.rms_norm_eps)
        self.layers = [
            FusedLayer(
                layer,
                head_dim=kv.key_dim,
                eps=eps,
                scale=kv.scale,
                window=kv.window,
                causal=True,
                precision=target.matmul_precision,
            )
            for layer, kv in zip(target.decoder_layers, target.kv_layers.values(), strict=True)
        ]
        self.embedding = target.embedding.weight.detach()
        self.norm, self.eps, self.hidden = base.norm.weight.detach(), eps, (target.hidden_size,)
        self.head = PackedLinear([target.lm_head], share=False, precision=target.matmul_precision)
        probe = self.embedding[:1, None]

        def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = base.rotary_emb(probe, positions[None])
            return cos[0], sin[0]

        self.rotary = RotaryTable(angles)

    def forward(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention, caches, taps, logit_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = self.rotary.lookup(positions, limit)
        x = F.embedding(token_ids, self.embedding)
        tapped = {}
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attention, *caches[index])
            if index in taps:
                tapped[index] = x
        features = torch.cat([tapped[k] for k in taps], dim=-1) if taps else None
        rows = x if logit_rows is None else x.index_select(0, logit_rows)
        return self.head(torch.rms_norm(rows, self.hidden, self.norm, self.eps)), features


class _Routing(TorchFunctionMode):
    """Gives the tokens of a paged forward the experts that the model's own forward chose for them.

    In 16-bit types rounding decides between experts that are nearly as good, and another expert is another row altogether: no
    measure of error would tell that from a fault. With the same experts in both, what is left is rounding or a fault.
    Routers choose with torch.topk along the last dimension; the n-th choice of a forward is the n-th of the other.
    """

    def __init__(self):
        super().__init__()
        self._chosen: dict[int, list[Tensor | None]] = {}
        self._request: int | None = None
        self._rows: list[tuple[int, int, int]] = []
        self._count = self._tokens = 0

    def of(self, request: int, tokens: int) -> _Routing:
        """To be entered around the model's own forward over the `tokens` tokens of a request."""
        self._request, self._tokens = request, tokens
        self._chosen[request] = []
        return self

    def again(self, spans: list[tuple[int, int, int]]) -> _Routing:
        """To be entered around a forward over packed spans (request, first token, end)."""
        self._request, self._rows, self._count = None, spans, 0
        self._tokens = sum(end - start for _, start, end in spans)
        return self

    def _per_token(self, choice: Tensor) -> Tensor | None:
        """[tokens, ...] of what the router chose, or None when it is nothing per token."""
        choice = choice[0] if choice.dim() > 2 and choice.shape[0] == 1 else choice
        return choice if choice.dim() > 1 and choice.shape[0] == self._tokens else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk) or found.indices.dim() < 2:
            return found
        dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        if dim not in (-1, found.indices.dim() - 1):
            return found
        if self._request is not None:
            self._chosen[self._request].append(self._per_token(found.indices))
            return found
        nth, self._count = self._count, self._count + 1
        parts = []
        for request, start, end in self._rows:
            choices = self._chosen[request]
            if nth >= len(choices) or choices[nth] is None:
                return found
            parts.append(choices[nth][start:end])
        own = self._per_token(found.indices)
        if own is None or any(part.shape[1:] != own.shape[1:] for part in parts):
            return found
        indices = torch.cat(parts).view(found.indices.shape)
        scores = args[0] if args else kwargs["input"]
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def _elsewhere(config, tokens: int):
    """A cache of transformers that says it holds `tokens` tokens and holds none: a forward with it runs far from the start of the text,
    by the model's own reckoning of positions, at the cost of its few tokens."""
    from transformers import DynamicCache

    class Elsewhere(DynamicCache):
        def get_seq_length(self, layer_idx=0):
            return tokens

        def get_query_offset(self, layer_idx=0):
            return tokens

        def get_mask_sizes(self, query_length, layer_idx=0):
            return query_length, tokens

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return key_states, value_states

    return Elsewhere(config=config)


class _Check:
    """Compares the paged forward with the model's ordinary one on four short requests, two of them fed in chunks.

    The last one stands at the end of the context: rotations, scales and embeddings that change with the position, or with the longest
    request of a batch, differ there. Windows are the probe's business: see `_Recorder`.
    """

    lengths = (6, 1, 4, 3)
    page_size = 2

    def __init__(self, target: TargetModel):
        generator = torch.Generator().manual_seed(0)
        high = min(target.vocab_size, target.embedding.weight.shape[0])
        self.tokens = [torch.randint(high, (n,), generator=generator) for n in self.lengths]
        self.bases = (0, 0, 0, max(0, target.max_context - self.lengths[3]))
        self.routing = _Routing() if target.dtype != torch.float32 else None
        self.expected = []
        for r, (tokens, base) in enumerate(zip(self.tokens, self.bases, strict=True)):
            given = (
                {"past_key_values": _elsewhere(target.model.config, base), "use_cache": True}
                if base
                else {"use_cache": False}
            )
            with contextlib.nullcontext() if self.routing is None else self.routing.of(r, len(tokens)):
                out = target.model(input_ids=tokens[None].to(target.device), **given)
            self.expected.append(out.logits[0].float())

    def _run(self, target: TargetModel) -> list[Tensor]:
        target.alloc_kv(32)
        pages = np.array([[7, 2, 5], [9, 0, 0], [1, 12, 0], [4, 3, 0]], dtype=np.int32)
        got: list[list[Tensor]] = [[] for _ in self.lengths]
        spans = ([(0, 0, 4), (1, 0, 1), (3, 0, 2)], [(2, 0, 1), (0, 4, 6)], [(3, 2, 3), (2, 1, 4)])
        for step in spans:
            if (
                target._fused is not None
            ):  # its table of rotations would grow to the whole context; they are the model's own
                step = [span for span in step if span[0] != 3]
            starts = np.cumsum([0] + [end - start for _, start, end in step])
            places = np.concatenate([np.arange(start, end) for _, start, end in step])
            rows = np.repeat([r for r, _, _ in step], np.diff(starts))
            batch = StepBatch.from_arrays(
                token_ids=torch.cat([self.tokens[r][start:end] for r, start, end in step]).numpy(),
                positions=places + np.array(self.bases)[rows],
                slots=pages[rows, places // self.page_size].astype(np.int64) * self.page_size + places % self.page_size,
                query_starts=starts,
                context_lens=[start for _, start, _ in step],
                page_table=pages,
                row_ids=[r for r, _, _ in step],
                logit_rows=np.arange(starts[-1]),
                page_size=self.page_size,
                device=target.device,
            )
            with contextlib.nullcontext() if self.routing is None else self.routing.again(step):
                logits = target.forward(batch)[0].float()
            for (r, _, _), start, end in zip(step, starts[:-1], starts[1:], strict=True):
                got[r].append(logits[start:end])
        return [torch.cat(parts) if parts else self.expected[r] for r, parts in enumerate(got)]

    def error(self, target: TargetModel) -> float:
        """Largest relative error of a row of logits, in the Euclidean norm; infinite where a logit is not a number."""
        worst = 0.0
        for got, expected in zip(self._run(target), self.expected, strict=True):
            errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
            worst = max(worst, float(errors.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
        return worst

    def agrees(self, target: TargetModel) -> bool:
        """Whether the error is rounding. In 16-bit types two correct orders of summation differ by several percent of a
        row's norm on an untrained model; a wrong mask, position or scale differs by the norm itself."""
        exact = target.dtype == torch.float32 and (target._fused is None or target.matmul_precision == "highest")
        return self.error(target) <= (1e-4 if exact else 0.2)

    def compare(self, target: TargetModel, what: str) -> None:
        if not self.agrees(target):
            raise UnsupportedModel(
                f"{type(target.model).__name__}: the paged forward ({what}) differs from the model's own by "
                f"{self.error(target):.2g} relative, expected rounding only"
            )

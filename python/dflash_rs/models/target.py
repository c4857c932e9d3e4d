"""Any Hugging Face causal LM as a target: paged KV, packed ragged batches, tapped hidden states.

    StepBatch --> embed --> decoder layers ------------------> norm, lm_head on logit_rows --> logits [N, V]
                             |  attention reads and writes pages
                             +-- output of layer k, k in taps --> features [T, K*H]

The model's own code runs: attention is swapped through transformers' attention registry, and hidden states are tapped
with hooks. For the plain Llama-shaped families a shorter path does the same sums with fewer operations
(`fused.py`). Both are compared with the ordinary forward on a small ragged batch when the model is loaded, and an
architecture with state that pages do not hold is refused there.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import kernel_serves, step_attention
from ..errors import CheckpointError, InvalidArgument, UnsupportedModel
from . import checkpoint
from .batch import StepBatch
from .fused import FusedLayer, PackedLinear, RotaryTable

# transformers takes any name with "flash" in it for a flash-attention package, so the project's own name is out.
ATTENTION_NAME = "block_paged_kv"
_STEP = "paged_step"
_FUSED_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Angles that depend on the longest request of a batch would make one request's text depend on its neighbours.
_STATIC_ROPE = (None, "default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class LayerKV:
    """What one attention layer keeps per token, and how it attends."""

    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None


class _Recorder:
    """Stands in for a step's attention while the model is probed: attends causally and notes each layer's shape."""

    def __init__(self):
        self.layers: dict[int, LayerKV] = {}

    def attend_layer(self, index, q, k, v, scale, window):
        if index in self.layers:
            raise UnsupportedModel(
                f"layer {index} attends twice per forward: cross-attention or shared layers have no pages"
            )
        self.layers[index] = LayerKV(k.shape[1], k.shape[-1], v.shape[-1], float(scale), window)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)


class _Step:
    """A step's attention together with the caches, as the registered attention function needs them."""

    def __init__(self, attention, caches):
        self.attention, self.caches = attention, caches

    def attend_layer(self, index, q, k, v, scale, window):
        k_cache, v_cache = self.caches[index]
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.attention.attend(*rows, k_cache, v_cache, scale=scale, causal=True, window=window)[None]


def _registered_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    step = kwargs.get(_STEP)
    name = type(module).__name__
    if step is None:
        raise UnsupportedModel(
            f"{name} does not pass extra arguments on to its attention, so the pages cannot reach it"
        )
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise UnsupportedModel(f"{name}: attention option {option!r} is not supported")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{name}: attention is not causal")
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise UnsupportedModel(f"{name} has no layer_idx, so its pages cannot be told apart")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.attend_layer(index, query, key, value, scale, kwargs.get("sliding_window")), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _registered_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


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
    for option in ("attn_logit_softcapping", "num_kv_shared_layers"):
        if getattr(text, option, None):
            raise UnsupportedModel(f"{kind}: {option} = {getattr(text, option)!r} is not supported")
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
        self.config = model.config.get_text_config()
        self.embedding: nn.Module = model.get_input_embeddings()
        self.lm_head: nn.Module = model.get_output_embeddings()
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        self.hidden_size, self.num_layers = int(self.config.hidden_size), int(self.config.num_hidden_layers)
        self.vocab_size = int(self.lm_head.weight.shape[0])
        self.decoder_layers = self._find_layers()
        self.taps: tuple[int, ...] = ()
        self._hooks: list = []
        self._tapped: dict[int, Tensor] = {}
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_slots = 0
        with torch.inference_mode():
            check = _Check(self) if self_check else None
            self._fused, self.path_reason = None, "turned off"
            model.set_attn_implementation(ATTENTION_NAME)
            self.kv_layers = self._probe()
            shapes = {(kv.key_dim, kv.value_dim) for kv in self.kv_layers.values()}
            self.kernel = all(kernel_serves(self.device, self.dtype, *shape) for shape in shapes)
            if check is not None:
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
            warnings.warn(
                f"target {path}: a {type(model).__name__} has no place for {len(spare)} of its tensors ({checkpoint.some(spare)}); they "
                "are ignored",
                stacklevel=3,
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

    def _find_layers(self) -> nn.ModuleList:
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        for module in base.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise UnsupportedModel(
            f"{type(self.model).__name__}: no list of {self.num_layers} decoder layers found (config num_hidden_layers)"
        )

    def _probe(self) -> dict[int, LayerKV]:
        recorder = _Recorder()
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        self.model(input_ids=tokens, position_ids=positions, use_cache=False, **{_STEP: recorder})
        layers = dict(sorted(recorder.layers.items()))
        if sorted(layers) != list(range(self.num_layers)):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: attention ran in layers {sorted(layers)}, expected every one of the "
                f"{self.num_layers}: a layer without paged attention keeps state that cannot be rolled back"
            )
        for index, kind in enumerate(getattr(self.config, "layer_types", None) or ()):
            if kind == "sliding_attention" and layers[index].window is None:
                raise UnsupportedModel(
                    f"layer {index}: declared sliding_attention, but its window did not reach the attention"
                )
        return layers

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
            **{_STEP: _Step(attention, self.caches)},
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


class _Check:
    """Compares the paged forward with the model's ordinary one on three short requests, one fed in two chunks."""

    lengths = (6, 1, 4)
    page_size = 2

    def __init__(self, target: TargetModel):
        generator = torch.Generator().manual_seed(0)
        high = min(target.vocab_size, target.embedding.weight.shape[0])
        self.tokens = [torch.randint(high, (n,), generator=generator) for n in self.lengths]
        self.expected = []
        for tokens in self.tokens:
            out = target.model(input_ids=tokens[None].to(target.device), use_cache=False)
            self.expected.append(out.logits[0].float())

    def _run(self, target: TargetModel) -> list[Tensor]:
        target.alloc_kv(32)
        pages = np.array([[7, 2, 5], [9, 0, 0], [1, 12, 0]], dtype=np.int32)
        got: list[list[Tensor]] = [[] for _ in self.lengths]
        spans = ([(0, 0, 4), (1, 0, 1)], [(2, 0, 1), (0, 4, 6)], [(2, 1, 4)])
        for step in spans:
            starts = np.cumsum([0] + [end - start for _, start, end in step])
            positions = np.concatenate([np.arange(start, end) for _, start, end in step])
            rows = np.repeat([r for r, _, _ in step], np.diff(starts))
            batch = StepBatch.from_arrays(
                token_ids=torch.cat([self.tokens[r][start:end] for r, start, end in step]).numpy(),
                positions=positions,
                slots=pages[rows, positions // self.page_size].astype(np.int64) * self.page_size
                + positions % self.page_size,
                query_starts=starts,
                context_lens=[start for _, start, _ in step],
                page_table=pages,
                row_ids=[r for r, _, _ in step],
                logit_rows=np.arange(starts[-1]),
                page_size=self.page_size,
                device=target.device,
            )
            logits = target.forward(batch)[0].float()
            for (r, _, _), start, end in zip(step, starts[:-1], starts[1:], strict=True):
                got[r].append(logits[start:end])
        return [torch.cat(parts) for parts in got]

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

"""A Hugging Face causal LM as a target: paged KV, packed ragged batches, tapped hidden states.

    StepBatch --> embed --> decoder layers ------------------> norm, lm_head on logit_rows --> logits [N, V]
                             |  attention reads and writes pages
                             +-- output of layer k, k in taps --> features [T, K*H]

The model's own code runs: attention is swapped through transformers' attention registry, and hidden states are tapped
with hooks. For the plain Llama-shaped families a shorter path does the same sums with fewer operations
(`FusedModel`); hybrids on a device with kernels for them are run layer by layer (`LayerwiseModel`); on a CPU, layers of experts
are one call of the extension each (`HostExperts`). All are compared with the ordinary forward on a small ragged batch when the
model is loaded, and an architecture with state that pages do not hold is refused there, unless its recurrent layers are known (`models.hybrid`). What only length shows is looked at without the length: the masks
that the model asks for are evaluated at positions far apart, and one of the compared requests stands at the end of the context.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ... import threads
from ...attention import kernel_serves, step_attention
from ...errors import CheckpointError, InvalidArgument, UnsupportedModel
from .. import checkpoint
from ..batch import StepBatch
from ..drafter import FINAL
from ..hybrid import MixerState, attending, find_mixers, known_layers
from ..hybrid.state import attach
from ..linear import multiplies
from . import products
from .check import Check
from .experts import HostExperts, run_unaligned_one_by_one
from .fused import FusedModel
from .layerwise import LayerwiseModel
from .load import check_finite, read_model
from .pointwise import Padded
from .probe import ATTENTION_NAME, STEP, LayerKV, Recorder, Step, check_architecture, named, probing, register


class TargetModel:
    """A causal LM that reads and writes a paged KV cache.

    `model` is a transformers `...ForCausalLM`, put in eval mode and switched to our attention: it must not be used for
    anything else afterwards. `path` names which forward runs: "fused", "layers" or "modules"; `path_reason` says why.
    `experts`: what of its experts runs in the extension, or None.
    `kernel` tells whether attention runs in the extension; setting it to False selects the torch reference.
    `matmul_precision`: "highest", or "medium", which multiplies in bfloat16 (sums stay float32); the latter needs the fused forward.
    """

    def __init__(
        self, model: nn.Module, *, fused: bool = True, self_check: bool = True, matmul_precision: str = "highest"
    ):
        check_architecture(model.config)
        hybrid = bool(known_layers(getattr(model.config.get_text_config(), "model_type", "")))
        # Hybrids do not say so, although what attends in them does.
        if not type(model)._supports_attention_backend and not hybrid:
            raise UnsupportedModel(f"{type(model).__name__} does not take its attention from the transformers registry")
        register()
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
        self.state: MixerState | None = None
        self.experts: HostExperts | None = None
        # Whether torch is left with what lies between products, see `threads`.
        self.handed_over = False
        self._padded: Padded | None = None
        run_unaligned_one_by_one(model)
        with torch.inference_mode():
            with named(model, "its own forward on a few tokens"):
                check = Check(self) if self_check else None
            self._fused: FusedModel | None = None
            self._layers: LayerwiseModel | None = None
            self.path_reason = "turned off"
            model.set_attn_implementation(ATTENTION_NAME)
            with named(model, "its forward with attention over pages"):
                self.kv_layers, self.decoder_layers, self._layer_outputs = self._probe()
                mixers = find_mixers(model, self.decoder_layers, set(self.kv_layers))
            if mixers:
                self.state = MixerState(mixers, self.device)
                attach(self.state)
            self._windows = {index: kv.window for index, kv in self.kv_layers.items()}
            shapes = {(kv.key_dim, kv.value_dim) for kv in self.kv_layers.values()}
            self.kernel = all(kernel_serves(self.device, self.dtype, *shape) for shape in shapes)
            if check is not None:
                with named(model, "its forward with attention over pages"):
                    check.compare(self, "modules")
            if fused and self.device.type == "cpu":
                self.experts = self._place_experts(check)
            if fused:
                self._fused, self.path_reason = FusedModel.build(self)
                if self._fused is not None and check is not None and not check.agrees(self):
                    self._fused, self.path_reason = None, "the fused path differs from the model's own forward"
                if self.state is not None:
                    self._layers, self.path_reason = LayerwiseModel.build(self)
                    if self._layers is not None and check is not None and not check.agrees(self):
                        self._layers, self.path_reason = None, "the layers in a row differ from the model's own forward"
                if multiplies(self.device, self.dtype):
                    if self._fused is None:
                        self._place_products(check)
                    else:
                        self.handed_over = self.kernel
        if self._fused is None and matmul_precision != "highest":
            raise InvalidArgument(
                f"matmul_precision: got {matmul_precision!r} for a {type(model).__name__}, expected 'highest': {self.path_reason}"
            )
        self.free()
        if self.state is not None:
            self.state.free()

    @classmethod
    def load(
        cls,
        about: str | Path | checkpoint.Described,
        *,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        **options,
    ) -> TargetModel:
        """Loads a checkpoint folder, a hub name, or what `load.describe` made of one; see `read_model` for its errors and warnings.
        `options` go to the constructor."""
        model = read_model(about, dtype)
        path = about.path if isinstance(about, checkpoint.Described) else about
        with checkpoint.readable(path):
            check_finite(path, model)
            target = cls(model.to(device), **options)
            # Said here, before anything is made of them.
            target.eos_token_ids, target.max_context  # noqa: B018
            return target

    def twin(self) -> TargetModel:
        """Another target over the same weights, with KV and taps of its own: for a second engine that takes turns with the first.
        Raises UnsupportedModel for a target with state beside its pages, which would be shared."""
        if self.state is not None:
            raise UnsupportedModel(
                f"{self._name}: keeps state beside pages, so an engine has to have a target of its own"
            )
        other = copy.copy(self)
        other.caches, other.num_slots = {}, 0
        other.taps, other._hooks, other._tapped = (), [], {}
        return other

    @property
    def path(self) -> str:
        """Which forward runs: "fused", "layers", or the model's own, "modules". The last alone may ask the device for values."""
        if self._fused is not None:
            return "fused"
        return "modules" if self._layers is None else "layers"

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
        return sum(kv.kv_heads * sum(self._widths(kv)) for kv in self.kv_layers.values()) * self.dtype.itemsize

    def _widths(self, kv: LayerKV) -> tuple[int, int]:
        """Those of keys and values in the cache: equal ones for the kernel of the host, which has one width for both."""
        wide = max(kv.key_dim, kv.value_dim)
        return (wide, wide) if self.kernel else (kv.key_dim, kv.value_dim)

    def _place_experts(self, check: Check | None) -> HostExperts | None:
        """Layers of experts that run in the extension; None where none does, or where that is not the model's own forward."""
        experts = HostExperts(self.model)
        if experts.layers and check is not None and not check.agrees(self):
            if experts.given_up:
                check.compare(self, "experts in one call")
            experts.undo()
            return None
        return experts if experts.layers else None

    def _place_products(self, check: Check | None) -> None:
        """Has the modules' products be the extension's, and learns whether all of them are and whether functions between them hang on places."""
        products.place(self.model)
        padded = self._padded = Padded()
        if check is None:
            return
        with products.Others() as others:
            check.compare(self, "products in the extension")
        self.handed_over = self.kernel and not others.names
        if not padded.needed:
            self._padded = None

    def _find_layers(self, attention: dict[int, nn.Module]) -> nn.ModuleList:
        """The list whose i-th entry holds the module that attended as layer i, if one did: a tower for pictures may be as deep."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                if all(any(part is attention[i] for part in module[i].modules()) for i in attention):
                    return module
        raise UnsupportedModel(
            f"{type(self.model).__name__}: no list of {self.num_layers} decoder layers found (config num_hidden_layers)"
        )

    def _probe(self) -> tuple[dict[int, LayerKV], nn.ModuleList, list[tuple[int, ...]]]:
        """How its layers attend, the layers, and the shape of what each puts out for one request of two tokens."""
        recorder = Recorder(self.max_context)
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        shapes: dict[nn.Module, tuple[int, ...]] = {}

        def note(module, args, output):
            shapes[module] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        base = self.model.base_model
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_layers]
        hooks = [layer.register_forward_hook(note) for layers in lists for layer in layers]
        hooks.append(base.register_forward_hook(lambda module, args, output: note(module, args, output[0])))
        probing.recorder = recorder
        try:
            self.model(input_ids=tokens, position_ids=positions, use_cache=False, **{STEP: recorder})
        finally:
            probing.recorder = None
            for hook in hooks:
                hook.remove()
        layers = dict(sorted(recorder.layers.items()))
        expected = attending(self.config)
        if sorted(layers) != expected or not layers:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: attention ran in layers {sorted(layers)}, expected "
                f"{f'every one of the {self.num_layers}' if len(expected) == self.num_layers else expected}: a layer without paged attention "
                "keeps state that cannot be rolled back"
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
        self._final_output = shapes.get(base, ())
        decoder = self._find_layers(recorder.modules)
        return layers, decoder, [shapes.get(layer, ()) for layer in decoder]

    def set_taps(self, layer_ids) -> None:
        """Tap the outputs of these layers (0-based, order kept) as features, FINAL for what the head reads; empty for none.

        The last layer is refused: some code hands out its output, some the normalised one.
        """
        layer_ids = tuple(int(k) for k in layer_ids)
        for k in layer_ids:
            if k == FINAL:
                if self._final_output != (1, 2, self.hidden_size):
                    raise UnsupportedModel(
                        f"{type(self.model).__name__}: its last norm puts out {list(self._final_output)} for two tokens, expected "
                        f"[1, 2, {self.hidden_size}]: there are no features for a drafter"
                    )
                continue
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
        tapped = {k: self.model.base_model if k == FINAL else self.decoder_layers[k] for k in sorted(set(layer_ids))}
        self._hooks = [module.register_forward_hook(self._keep(k)) for k, module in tapped.items()]

    def _keep(self, index: int):
        def hook(module, args, output):
            # A layer gives its states, alone or first of a tuple; a model gives an object that counts them from 0 likewise.
            self._tapped[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    def alloc_kv(self, num_slots: int) -> None:
        """Allocates zeroed KV for `num_slots` tokens, [num_slots, kv_heads, dim] per layer and kind."""
        if num_slots < 1:
            raise InvalidArgument(f"num_slots: got {num_slots}, expected at least 1")
        self.num_slots = num_slots
        self.caches = {}
        for index, kv in self.kv_layers.items():
            keys, values = (
                torch.zeros(num_slots, kv.kv_heads, dim, dtype=self.dtype, device=self.device)
                for dim in self._widths(kv)
            )
            self.caches[index] = keys, values

    def free(self) -> None:
        """Gives the KV back."""
        self.caches, self.num_slots = {}, 0

    @contextlib.contextmanager
    def scratch(self, num_slots: int) -> Iterator[None]:
        """Within it, passes see KV of their own for `num_slots` tokens."""
        kept = self.caches, self.num_slots
        try:
            self.alloc_kv(num_slots)
            with contextlib.nullcontext() if self.state is None else self.state.scratch():
                yield
        finally:
            self.caches, self.num_slots = kept

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
        with torch.inference_mode(), contextlib.nullcontext() if self.state is None else self.state.running(batch):
            attention = step_attention(batch, num_slots=self.num_slots, write=True, kernel=self.kernel)
            return self.run(batch.token_ids, batch.positions, batch.max_length, attention, batch.logit_rows)

    def run(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention, logit_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The pass of `forward` over tensors on the device, in inference mode: token_ids and positions int64 [T], positions below
        `limit`; logit_rows int64 [N] (every row when None)."""
        with threads.handed_over(self.handed_over), self._padded or contextlib.nullcontext():
            if (path := self._fused or self._layers) is not None:
                return path.forward(token_ids, positions, limit, attention, self.caches, self.taps, logit_rows)
            output = self.model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if logit_rows is None else logit_rows,
                **{STEP: Step(attention, self.caches, self._windows)},
            )
        features = torch.cat([self._tapped[k][0] for k in self.taps], dim=-1) if self.taps else None
        self._tapped.clear()
        return output.logits[0], features

    def prepare(self, limit: int) -> None:
        """Makes what a pass over positions below `limit` would make when it is first needed, as a captured graph must not."""
        if self._fused is not None:
            self._fused.rotary.rows(limit, self.device)

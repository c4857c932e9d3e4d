"""The short forward of Llama-shaped models: the same sums as transformers' own code, with fewer operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import HostAttention
from ..drafter import FINAL
from ..fused import FusedLayer, HostRun, RotaryTable
from ..linear import PackedLinear

if TYPE_CHECKING:
    from .adapter import TargetModel

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


class FusedModel:
    """The short forward of one model."""

    @classmethod
    def build(cls, target: TargetModel) -> tuple[FusedModel | None, str]:
        """The path, or None and the reason why it does not apply."""
        model = target.model
        name = type(model).__name__
        family = name.removesuffix("ForCausalLM")
        if family not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
            return None, f"{name} is not one of {', '.join(FAMILIES)}"
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
        on_host = target.kernel and target.device.type == "cpu"
        self.run = HostRun.build(self.layers, self.norm, self.head, self.embedding, self.rotary, host_kernel=on_host)

    def forward(
        self, token_ids: Tensor, positions: Tensor, limit: int, attention, caches, taps, logit_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.run is not None and isinstance(attention, HostAttention):
            layers = [len(self.layers) if tap == FINAL else tap for tap in taps]
            return self.run.forward(token_ids, positions, limit, attention, caches.values(), layers, logit_rows)
        cos, sin = self.rotary.lookup(positions, limit)
        x = F.embedding(token_ids, self.embedding)
        tapped = {}
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attention, *caches[index])
            if index in taps:
                tapped[index] = x
        if FINAL in taps:
            tapped[FINAL] = torch.rms_norm(x, self.hidden, self.norm, self.eps)
            rows = tapped[FINAL] if logit_rows is None else tapped[FINAL].index_select(0, logit_rows)
        else:
            rows = x if logit_rows is None else x.index_select(0, logit_rows)
            rows = torch.rms_norm(rows, self.hidden, self.norm, self.eps)
        features = torch.cat([tapped[k] for k in taps], dim=-1) if taps else None
        return self.head(rows), features

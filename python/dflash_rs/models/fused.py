"""A short path through a pre-norm decoder layer (RMSNorm, rotary attention, SwiGLU), for target and drafter alike.

A small model at batch 1 on a CPU spends most of a step in per-operation overhead, not in arithmetic. This path does
the same sums with a third of the operations: q, k and v in one product, gate and up in one, q and k normalised and
rotated together, the residual added inside the product, cos and sin looked up instead of computed.
Whoever uses it checks it against the ordinary forward once, when the model is loaded.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core, threads
from .linear import PackedLinear


class RotaryTable:
    """cos and sin of every position, computed once by `compute(positions) -> (cos, sin)`, each [N, head_dim].

    Only for rotary variants whose angles depend on nothing but the position. The table doubles when a longer request
    arrives. Rows hold cos and the signed sin (first half negated), so that a rotation is x*cos + swap_halves(x)*sin.
    """

    def __init__(self, compute, start: int = 512):
        self._compute = compute
        self._rows: Tensor | None = None
        self._start = start

    def rows(self, limit: int, device: torch.device | str = "cpu") -> Tensor:
        """cos and signed sin of at least `limit` positions, [N, 2, 1, head_dim]."""
        if self._rows is None or self._rows.shape[0] < limit:
            size = self._start if self._rows is None else self._rows.shape[0]
            while size < limit:
                size *= 2
            cos, sin = self._compute(torch.arange(size, device=device))
            half = sin.shape[-1] // 2
            sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._rows = torch.stack((cos, sin), dim=1).unsqueeze(2).contiguous()
        return self._rows

    def lookup(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """positions int64 [T], all below `limit` -> cos, signed sin, each [T, 1, head_dim]."""
        rows = self.rows(limit, positions.device).index_select(0, positions)
        return rows[:, 0], rows[:, 1]

    def address(self, limit: int) -> tuple[tuple[int, int, int], int]:
        """The table for the extension: address with strides, and its number of positions."""
        rows = self.rows(limit)
        return (rows.data_ptr(), rows.stride(0), rows.stride(1)), rows.shape[0]


def rotate_rows(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, head_dim] with the rows of a `RotaryTable`; overwrites x."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x.mul_(cos).addcmul_(swapped, signed_sin)


class FusedLayer:
    """One decoder layer. `layer` has input_layernorm, self_attn.{q,k,v,o}_proj (q_norm and k_norm optional),
    post_attention_layernorm and mlp.{gate,up,down}_proj, in the order Llama uses them."""

    def __init__(
        self,
        layer: nn.Module,
        *,
        head_dim: int,
        eps: float,
        scale: float,
        window: int | None,
        causal: bool,
        precision: str = "highest",
    ):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm1, self.norm2 = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
        self.qkv, self.out, self.gate_up, self.down = (
            PackedLinear(modules, precision=precision)
            for modules in (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            )
        )
        self.heads = attention.q_proj.out_features // head_dim
        self.kv_heads = attention.k_proj.out_features // head_dim
        self.head_dim, self.eps, self.scale, self.window, self.causal = head_dim, eps, scale, window, causal
        self.hidden, self.inner = (self.norm1.numel(),), mlp.gate_proj.out_features
        self.head_norm = self.q_norm = self.k_norm = None
        if getattr(attention, "q_norm", None) is not None:
            self.q_norm, self.k_norm = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            rows = [attention.q_norm.weight.detach()] * self.heads + [attention.k_norm.weight.detach()] * self.kv_heads
            self.head_norm = torch.stack(rows).contiguous()
        self._width = (head_dim,)
        self._split = self.heads + self.kv_heads

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """x [T, H] -> [T, H]; `attention` is the step's attention, see attention.py."""
        attended = self.attend(
            torch.rms_norm(x, self.hidden, self.norm1, self.eps), cos, sin, attention, k_cache, v_cache
        )
        x = self.out.plus(attended, x)
        gate_up = self.gate_up(torch.rms_norm(x, self.hidden, self.norm2, self.eps))
        return self.down.plus(self.swiglu(gate_up), x)

    def products(self) -> list[PackedLinear]:
        """All of this layer's weights that are multiplied by."""
        return [self.qkv, self.out, self.gate_up, self.down]

    def convolutions(self) -> tuple[_core.HostConv, _core.HostConv] | None:
        """Those around attention and MLP for the extension, of a layer that has some."""
        return None

    def attend(self, normed: Tensor, cos: Tensor, sin: Tensor, attention, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """normed [T, H] -> [T, heads * head_dim], before the output projection."""
        qkv = self.qkv(normed).view(-1, self._split + self.kv_heads, self.head_dim)
        qk, v = qkv[:, : self._split], qkv[:, self._split :]
        if self.head_norm is not None:
            qk = torch.rms_norm(qk, self._width, None, self.eps).mul_(self.head_norm)
        qk = rotate_rows(qk, cos, sin)
        attended = attention.attend(
            qk[:, : self.heads], qk[:, self.heads :], v, k_cache, v_cache,
            scale=self.scale, causal=self.causal, window=self.window,
        )  # fmt: skip
        return attended.reshape(normed.shape[0], -1)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> [T, I]."""
        if gate_up.dtype != torch.float32 or gate_up.device.type != "cpu":
            return F.silu(gate_up[:, : self.inner]).mul_(gate_up[:, self.inner :])
        # From some tens of rows on torch would start threads of its own, which then keep the processors from those of the products.
        rows, width = gate_up.shape[0], self.inner
        out = torch.empty(rows, width)
        _core.swiglu(
            (gate_up.data_ptr(), 2 * width, 2 * width),
            rows,
            width,
            (out.data_ptr(), width, width),
            threads.of_the_extension(),
        )
        return out


class HostRun:
    """Layers and head as one call of the extension: float32 on a CPU, where what lies between operations costs as much as they do.

    A pass reads and writes the caches in place. The tensors behind the addresses it is given are alive for the call.
    """

    def __init__(
        self, layers: list[FusedLayer], norm: Tensor, head: PackedLinear, embedding: Tensor, rotary: RotaryTable
    ):
        self.embedding, self.rotary, self._outputs = embedding, rotary, head.outputs
        self._decoder = _core.HostDecoder(norm.numpy(), head.packed_host, layers[0].eps)
        for layer in layers:
            attention_conv, mlp_conv = layer.convolutions() or (None, None)
            self._decoder.add_layer(
                attention_norm=layer.norm1.numpy(),
                qkv=layer.qkv.packed_host,
                out=layer.out.packed_host,
                mlp_norm=layer.norm2.numpy(),
                gate_up=layer.gate_up.packed_host,
                down=layer.down.packed_host,
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                scale=layer.scale,
                mask="causal" if layer.causal else "block",
                window=layer.window,
                query_norm=None if layer.q_norm is None else layer.q_norm.numpy(),
                key_norm=None if layer.k_norm is None else layer.k_norm.numpy(),
                attention_conv=attention_conv,
                mlp_conv=mlp_conv,
            )

    @classmethod
    def build(cls, layers, norm, head, embedding, rotary, *, host_kernel: bool) -> HostRun | None:
        """The run, or None where it does not apply: another device or type, weights too large for a second copy."""
        products = [p for layer in layers for p in layer.products()]
        if not host_kernel or embedding.dtype != torch.float32 or not isinstance(head, PackedLinear):
            return None
        if any(product.host is None for product in (*products, head)):
            return None
        return cls(layers, norm, head, embedding, rotary)

    def draft(
        self,
        positions,
        tokens,
        limit: int,
        attention,
        caches,
        block: int,
        never: int | None,
        k: int,
        selector=None,
        codebooks=(),
    ):
        """The k likeliest tokens int64 [n, block-1, k] and their probabilities float32; positions and tokens int64 [n * block], host. With a
        selector and its codebooks [V, rank], those along its path."""
        books = None
        if codebooks:
            first, second = (((book.data_ptr(), book.stride(0), book.shape[1]), book.shape[0]) for book in codebooks)
            books = first, second
        return self._decoder.draft(
            attention.batch, tokens, positions, *self._tables(limit), addresses(caches), block, never, k,
            threads.of_the_extension(), selector, books,
        )  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        limit: int,
        attention,
        caches,
        taps: list[int],
        logit_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """A pass: tokens and positions int64 [T], on the host -> logits [N, V] of logit_rows int64 [N] (every row when None), and the outputs of
        the layers `taps` side by side, [T, K*H], or None without any. One past the last layer stands for what the head reads."""
        rows, hidden = tokens.shape[0], self.embedding.shape[1]
        asked = np.arange(rows) if logit_rows is None else logit_rows.numpy()
        logits = torch.empty(asked.size, self._outputs)
        features = torch.empty(rows, len(taps) * hidden) if taps else None
        self._decoder.forward(
            attention.batch, tokens.numpy(), positions.numpy(), *self._tables(limit), addresses(caches),
            asked, (logits.data_ptr(), self._outputs, self._outputs),
            taps, (0, 0, 0) if features is None else (features.data_ptr(), len(taps) * hidden, hidden),
            threads.of_the_extension(),
        )  # fmt: skip
        return logits, features

    def _tables(self, limit: int) -> tuple[tuple[tuple[int, int, int], int], tuple[tuple[int, int, int], int]]:
        rows, width = self.embedding.shape
        return ((self.embedding.data_ptr(), self.embedding.stride(0), width), rows), self.rotary.address(limit)


def addresses(caches) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """K and V caches [num_slots, heads, dim] of every layer for the extension."""

    def place(t: Tensor) -> tuple[int, int, int]:
        return t.data_ptr(), t.stride(0), t.stride(1)

    return [(place(keys), place(values)) for keys, values in caches]

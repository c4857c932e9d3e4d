"""Products with fixed weights on a CPU: the extension's, which give a row the same bits in any company."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _core, threads
from ..errors import InvalidArgument

# What the extension multiplies.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Above this many weights a second copy for the sake of its layout is not worth its memory.
COPY_LIMIT = 1 << 25


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the extension multiplies such weights."""
    return device.type == "cpu" and dtype in DTYPES


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: _core.PackedWeight | None = None) -> Tensor:
    """x W^T + b for x [..., K], weight [N, K], bias [N], all float32 or all bfloat16, on a CPU: [..., N]. Sums are float32, rounded once.

    A row's result depends on that row alone, bit for bit. `packed`: the weight once more, where it has been packed.
    """
    outputs, inputs = weight.shape
    if x.dtype != weight.dtype or x.shape[-1] != inputs or not x.is_cpu:
        raise InvalidArgument(
            f"x: got {x.dtype} of shape {list(x.shape)} on {x.device}, expected {weight.dtype} [..., {inputs}] on the CPU"
        )
    rows = x.reshape(-1, inputs)
    count = rows.shape[0]
    # Rows that overlap, as those of an expanded tensor, are not for the extension.
    if rows.stride(1) != 1 or (count > 1 and rows.stride(0) < inputs):
        rows = rows.contiguous()
    out = torch.empty(count, outputs, dtype=weight.dtype)
    if packed is not None and weight.dtype == torch.float32:
        given = (rows.data_ptr(), rows.stride(0), inputs), count, (out.data_ptr(), outputs, outputs)
        packed.product(*given, None, threads.of_the_extension())
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], outputs)
    _core.linear(
        (rows.data_ptr(), rows.stride(0), inputs),
        count,
        (weight.data_ptr(), weight.stride(0), inputs),
        outputs,
        inputs,
        (out.data_ptr(), outputs, outputs),
        DTYPES[weight.dtype],
        None if bias is None else (bias.data_ptr(), outputs, outputs),
        threads.of_the_extension(),
    )
    return out.view(*x.shape[:-1], outputs)


class PackedLinear:
    """y = x W^T + b over the stacked rows of one or more linear modules, whose own parameters become views of the stack (unless `share` is
    False).

    On a CPU, in float32 and bfloat16, the extension multiplies: a row gets the same bits whatever else is in the batch. In float32 the weight
    is packed once more for that, in two bytes a weight where the checkpoint was bfloat16; above `COPY_LIMIT`, and in bfloat16, it is read where
    it is. Elsewhere torch multiplies.

    `precision` "medium" (float32 on a CPU only) rounds x and W to bfloat16 before they are multiplied, whatever their size.
    """

    def __init__(self, modules: list[nn.Linear], *, share: bool = True, precision: str = "highest"):
        # Models are laid out in inference mode; their parameters are to remain what can be trained.
        with torch.inference_mode(False):
            parts = [m.weight.detach() for m in modules]
            weight = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        on_host = multiplies(weight.device, weight.dtype)
        if precision != "highest" and not (on_host and weight.dtype == torch.float32):
            raise InvalidArgument(
                f"matmul_precision: got {precision!r} with {weight.dtype} on {weight.device}, expected 'highest': other precisions "
                "are for float32 on a CPU"
            )
        self.bias = None
        if any(m.bias is not None for m in modules):
            biases = [m.bias.detach() if m.bias is not None else weight.new_zeros(m.out_features) for m in modules]
            self.bias = torch.cat(biases)
        self.weight, self.host = weight, None
        self.outputs, self.inputs = weight.shape
        if share and len(modules) > 1:
            start = 0
            for m in modules:
                m.weight.data = weight[start : start + m.out_features]
                start += m.out_features
        if on_host and weight.dtype == torch.float32 and (weight.numel() <= COPY_LIMIT or precision != "highest"):
            bias = None if self.bias is None else self.bias.numpy()
            self.host = _core.PackedWeight(weight.numpy(), bias, precision)
        self._multiply = linear if on_host else F.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.host is not None:
            return self._product(x, None)
        return self._multiply(x, self.weight, self.bias)

    @property
    def packed_host(self) -> _core.PackedWeight:
        """What the extension multiplies by, of a layer that has it."""
        assert self.host is not None
        return self.host

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T + b."""
        if self.host is not None:
            return self._product(x, residual)
        return residual + self(x)

    def _product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.shape[0]
        if x.shape != (rows, self.inputs) or x.dtype != torch.float32 or x.stride(1) != 1:
            raise InvalidArgument(
                f"x: got {x.dtype} of shape {tuple(x.shape)}, expected torch.float32 [rows, {self.inputs}], rows contiguous"
            )
        out = torch.empty(rows, self.outputs)
        if residual is not None:
            if residual.shape != out.shape or residual.dtype != out.dtype or residual.stride(1) != 1:
                raise InvalidArgument(
                    f"residual: got {residual.dtype} of shape {tuple(residual.shape)}, expected torch.float32 {tuple(out.shape)}"
                )
            residual = (residual.data_ptr(), residual.stride(0), self.outputs)
        self.packed_host.product(
            (x.data_ptr(), x.stride(0), self.inputs),
            rows,
            (out.data_ptr(), self.outputs, self.outputs),
            residual,
            threads.of_the_extension(),
        )
        return out

"""Functions of single numbers on a CPU, the same for a row in any company.

torch takes two vectors of a tensor's elements at a time, and what is left over one by one, with another routine for exp, tanh and their like.
Its last bit can be another: SiLU of a [5, 37] is 185 elements, of which the last 25 (with vectors of 16) are computed unlike the same row's in a
[6, 37]. Where rows are a multiple of two vectors nothing is left over, and torch's one thread (see `threads`) has no shares whose ends
could be anywhere; elsewhere `Padded` has these functions computed with numbers to spare.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Bytes of the two vectors, the widest that there are; a multiple of those is one of all others.
_STEP = 128
_F32, _BF16 = torch.float32, torch.bfloat16
# In which types a function's bits hang on an element's place, as tests measure it of torch: those of bfloat16 with all its numbers.
_HANGING: dict[object, tuple[torch.dtype, ...]] = {
    F.gelu: (_F32, _BF16),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), (_BF16,)),
    **dict.fromkeys((torch.sinh, Tensor.sinh, torch.cosh, Tensor.cosh), (_F32, _BF16)),
    **dict.fromkeys(
        (
            F.silu, F.mish, F.softplus, F.elu, F.selu, F.celu, torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid,
            Tensor.sigmoid_, torch.exp2, torch.special.exp2, Tensor.exp2,
        ),
        (_F32,),
    ),
}  # fmt: skip


class Padded(TorchFunctionMode):
    """Within it no element of such a function is one of those that are left over.

    `needed`: whether a tensor was seen whose rows are no multiple of two vectors, or have gaps. Where none was, torch alone gives the same.
    """

    def __init__(self):
        super().__init__()
        self.needed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        hanging = _HANGING.get(function)
        if hanging is None:
            return function(*args, **kwargs)
        x, args = (args[0], args[1:]) if args else (kwargs.pop("input"), args)
        # What is a parameter is of one shape in every pass.
        if x.dtype not in hanging or not x.is_cpu or not x.numel() or not x.dim() or isinstance(x, nn.Parameter):
            return function(x, *args, **kwargs)
        step = _STEP // x.dtype.itemsize
        # A GELU is oneDNN's where there are no gaps between rows, as there are none in a single one.
        whole = x.stride(-1) == 1 and (x.is_contiguous() or function is not F.gelu)
        if whole and x.shape[-1] % step == 0:
            return function(x, *args, **kwargs)
        self.needed = True
        padded = F.pad(x.reshape(-1), (0, -x.numel() % step))
        found = function(padded, *args, **kwargs)
        values = found[: x.numel()].view(x.shape)
        return x.copy_(values) if found.data_ptr() == padded.data_ptr() else values

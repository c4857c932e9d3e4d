"""Products of a target's own modules on a CPU, by the extension, in place of torch's.

What torch gives a row hangs on how many rows there are: in bfloat16 up to a thousandth of a row's outputs change in their last bit, and then a
drafted text need not be the plain one. The extension's product (`device/host/linear/stored`) reads weights where they are, so there is no second
copy of any, and gives a row the same bits in any company and with any number of threads. In float32 weights are packed (`device/host/linear`) as far as
`linear.COPY_LIMIT` lets them: that reads two bytes a weight where they were bfloat16, and is faster for many rows.

A module's code stays as it is, whatever it is: the weights are what has it multiplied elsewhere. `Weight` is a parameter that takes
`F.linear` to the extension, be it called by an `nn.Linear`, by a router with a weight of its own, or for one of many experts, and in float32, too,
where a router widens its weight first. Everything else that is done with it is torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ... import _core
from ..linear import COPY_LIMIT, DTYPES, linear

# What torch multiplies by, and the elements of an operand up to which that is no work.
_PRODUCTS = {
    F.linear, F.bilinear, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.einsum, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.mm, Tensor.mm, torch.addmm, Tensor.addmm, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch._grouped_mm,
}  # fmt: skip
_SMALL = 1 << 16
# Operations whose result stands for the weight: in another type, or one of several.
_SAME = {Tensor.to, Tensor.type, Tensor.float, Tensor.type_as, Tensor.__getitem__}


def _served(input: object, weight: object, bias: object = None) -> bool:
    """Whether the extension multiplies these; what it does not is torch's to do or to refuse."""
    x = input
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2 or not x.dim():
        return False
    if isinstance(bias, Tensor):
        if bias.dtype != weight.dtype or bias.shape != weight.shape[:1] or not bias.is_contiguous():
            return False
    elif bias is not None:
        return False
    return (
        weight.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == weight.shape[1] > 0
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
        # Drafters are trained through a target's head.
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(input, weight, bias, getattr(weight, "packed", None))


class _Linear:
    """What `F.linear` does with a weight of these classes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear and _served(*args, **kwargs):
                return _product(*args, **kwargs)
            found = function(*args, **kwargs)
        if function in _SAME and type(found) is Tensor and isinstance(args[0], _Linear):
            return found.as_subclass(_Part)
        return found


class _Part(_Linear, Tensor):
    """A weight for the time being: a `Weight` in another type, or one of several."""


class Weight(_Linear, nn.Parameter):
    """A parameter over the memory of another one. `packed`: the same once more, where that is multiplied."""

    packed: _core.PackedWeight | None = None


def place(model: nn.Module) -> None:
    """Has the products of all of a model's weights on a CPU be the extension's.

    Embeddings stay plain parameters, and share their memory with a head that is tied to them.
    """
    made: dict[int, Weight] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module._parameters.items():
            if type(weight) is not nn.Parameter or weight.dtype not in DTYPES or weight.device.type != "cpu":
                continue
            # One weight, or one of each expert.
            if weight.dim() not in (2, 3):
                continue
            if id(weight) not in made:
                new = made[id(weight)] = Weight(weight.data, requires_grad=False)
                if weight.dtype == torch.float32 and weight.dim() == 2 and weight.numel() <= COPY_LIMIT:
                    new.packed = _core.PackedWeight(weight.detach().contiguous().numpy(), None, "highest")
            module._parameters[name] = made[id(weight)]


class Others(TorchFunctionMode):
    """Notes by name which products within it torch itself computes, but for small ones."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS:
            operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            placed = function is F.linear and any(isinstance(x, _Linear) for x in operands)
            if not placed and max((x.numel() for x in operands), default=0) > _SMALL:
                self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))

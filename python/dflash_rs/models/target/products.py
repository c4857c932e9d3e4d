"""Products of a target's own modules on a CPU in bfloat16, by the extension, in place of torch's.

What torch gives a row in bfloat16 hangs on how many rows there are: up to a thousandth of a row's outputs change in their last bit, and then a
drafted text need not be the plain one. The extension's product (`device/host/linear/stored`) reads weights where they are, so there is no second
copy of any, and gives a row the same bits in any company and with any number of threads.

A module's code stays as it is, whatever it is: the weights are what has it multiplied elsewhere. `Weight` is a parameter that takes
`F.linear` to the extension, be it called by an `nn.Linear`, by a router with a weight of its own, or for one of many experts, and in float32, too,
where a router widens its weight first. Everything else that is done with it is torch's.

GELU is the one activation whose bits torch has hang on an element's place among the others in bfloat16 (its vectors and what is left over
of them round differently): modules that are one compute it from operations that do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _core

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Operations whose result stands for the weight: in another type, or one of several.
_SAME = {Tensor.to, Tensor.type, Tensor.float, Tensor.type_as, Tensor.__getitem__}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., K], weight [N, K], bias [N], all float32 or all bfloat16, on a CPU: [..., N]. Sums are float32, rounded once.

    A row's result depends on that row alone, bit for bit.
    """
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    count = rows.shape[0]
    # Rows that overlap, as those of an expanded tensor, are not for the extension.
    if rows.stride(1) != 1 or (count > 1 and rows.stride(0) < inputs):
        rows = rows.contiguous()
    out = torch.empty(count, outputs, dtype=weight.dtype)
    _core.linear(
        (rows.data_ptr(), rows.stride(0), inputs),
        count,
        (weight.data_ptr(), weight.stride(0), inputs),
        outputs,
        inputs,
        (out.data_ptr(), outputs, outputs),
        _DTYPES[weight.dtype],
        None if bias is None else (bias.data_ptr(), outputs, outputs),
        torch.get_num_threads(),
    )
    return out.view(*x.shape[:-1], outputs)


def _served(x: object, weight: object, bias: object = None) -> bool:
    """Whether the extension multiplies these; what it does not is torch's to do or to refuse."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2 or not x.dim():
        return False
    if isinstance(bias, Tensor):
        if bias.dtype != weight.dtype or bias.shape != weight.shape[:1] or not bias.is_contiguous():
            return False
    elif bias is not None:
        return False
    return (
        weight.dtype in _DTYPES
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == weight.shape[1] > 0
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
        # Drafters are trained through a target's head.
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


class _Linear:
    """What `F.linear` does with a weight of these classes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear and _served(*args, **kwargs):
                return linear(*args, **kwargs)
            found = function(*args, **kwargs)
        if function in _SAME and type(found) is Tensor and isinstance(args[0], _Linear):
            return found.as_subclass(_Part)
        return found


class _Part(_Linear, Tensor):
    """A weight for the time being: a `Weight` in another type, or one of several."""


class Weight(_Linear, nn.Parameter):
    """A parameter over the memory of another one."""


def _gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + torch.erf(wide * 0.5**0.5))).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide * wide * wide)))).to(x.dtype)


_ACTIVATIONS = {"GELUActivation": _gelu, "GELUTanh": _gelu_tanh}


def place(model: nn.Module) -> None:
    """Has the products of all of a model's bfloat16 weights on a CPU be the extension's, and its GELUs the same for every row.

    Embeddings stay plain parameters, and share their memory with a head that is tied to them.
    """
    made: dict[int, Weight] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        if type(module).__module__ == "transformers.activations" and type(module).__name__ in _ACTIVATIONS:
            module.forward = _ACTIVATIONS[type(module).__name__]  # type: ignore[method-assign]
        for name, weight in module._parameters.items():
            if type(weight) is not nn.Parameter or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
                continue
            # One weight, or one of each expert.
            if weight.dim() in (2, 3):
                module._parameters[name] = made.setdefault(id(weight), Weight(weight.data, requires_grad=False))

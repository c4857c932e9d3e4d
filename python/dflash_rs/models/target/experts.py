"""Layers of experts on a CPU, in one call of the extension each, in place of transformers' grouped products.

Rows of one request meet more experts than one row does, and that is what makes a block dear. The extension groups rows by expert and reads an
expert's weights once for all of them (`device/host/experts`); a row gets the same bits in any company.

What is taken is what `_against` finds nothing against: SwiGLU experts without biases or norms, plainly stored. Whatever else transformers has
(biases and clamped activations as in gpt-oss, experts without a gate as in Nemotron-H) runs as before. Of blocks that were looked at (`_BLOCKS`)
the router and the shared expert are in the same call, in float32; in 16-bit types, where rounding decides between experts, the model's own
router chooses. Each layer is compared with its own forward before it is replaced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _core

# Above this many weights of a layer the modules' own are given up once they are packed: a second copy would be most of the model again.
_COPY_LIMIT = 1 << 25
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Largest relative error of a row in the comparison; in bfloat16 the model's own products round in between.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# What the decorator of transformers' experts says of a class, and has to.
_SAID = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}
# Blocks whose router is a softmax over all experts of which the largest are taken, divided by their sum unless `norm_topk_prob` is there and
# False. They may have an expert that all rows meet, weighed by a sigmoid.
_BLOCKS = (
    "MixtralSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
    "Qwen3NextSparseMoeBlock",
    "Qwen3_5MoeSparseMoeBlock",
)


def _touched(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _silu(module: nn.Module) -> bool:
    activation = getattr(module, "act_fn", None)
    return activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def _plain(weight: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is stored as such, on a CPU."""
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == dtype
        and tuple(weight.shape) == shape
        and weight.is_contiguous()
    )


def _against(module: nn.Module) -> str | None:
    """What is against running these experts in the extension; None where nothing is."""
    name = type(module).__name__
    if not _of_transformers(module):
        return f"{name} is not one of transformers'"
    for attribute, expected in _SAID.items():
        if getattr(module, attribute, None) is not expected:
            return f"{name}: {attribute} is {getattr(module, attribute, None)}"
    if getattr(type(module)._apply_gate, "__module__", "") != "transformers.integrations.moe":
        return f"{name} has a gate of its own"
    if not _silu(module):
        activation = getattr(module, "act_fn", None)
        return f"{name}: act_fn is {getattr(activation, '__name__', type(activation).__name__)}"
    if _touched(module):
        return f"{name} has hooks"
    held = {key for key, _ in module.named_parameters()} | {key for key, _ in module.named_buffers()}
    if held != {"gate_up_proj", "down_proj"} or {key for key, _ in module.named_children()} - {"act_fn"}:
        return f"{name} has {', '.join(sorted(held))}"
    gate_up, down = module.gate_up_proj, module.down_proj
    if down.ndim != 3 or 0 in down.shape:
        return f"{name}: down_proj has shape {tuple(down.shape)}"
    count, hidden, inner = down.shape
    if down.dtype not in _DTYPES or not (
        _plain(down, down.dtype, (count, hidden, inner)) and _plain(gate_up, down.dtype, (count, 2 * inner, hidden))
    ):
        return f"{name}: weights are {gate_up.dtype} {tuple(gate_up.shape)} and {down.dtype} {tuple(down.shape)} on {down.device}"
    return None


def _rest(block: nn.Module, experts: nn.Module) -> dict | None:
    """Router and shared expert of a block as `_core.Experts` takes them; None where the block is not known or not as it is known."""
    if type(block).__name__ not in _BLOCKS or not _of_transformers(block) or any(_touched(m) for m in block.modules()):
        return None
    count, hidden, _ = experts.down_proj.shape
    router = block.gate
    parts = {key for key, _ in block.named_children()}
    if [key for key, _ in router.named_parameters()] != ["weight"] or list(router.buffers()):
        return None
    if not _plain(router.weight, torch.float32, (count, hidden)) or not 1 <= router.top_k <= count:
        return None
    found = {
        "router": router.weight.detach().numpy(),
        "top_k": router.top_k,
        "normalised": bool(getattr(router, "norm_topk_prob", True)),
    }
    if parts == {"gate", "experts"}:
        return found
    if parts != {"gate", "experts", "shared_expert", "shared_expert_gate"}:
        return None
    shared, gate = block.shared_expert, block.shared_expert_gate
    linears = [shared.gate_proj, shared.up_proj, shared.down_proj, gate]
    if not _silu(shared) or any(type(linear) is not nn.Linear or linear.bias is not None for linear in linears):
        return None
    inner = shared.gate_proj.out_features
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner), (1, hidden)]
    if not all(_plain(linear.weight, torch.float32, shape) for linear, shape in zip(linears, shapes, strict=True)):
        return None
    gate_up = torch.cat((shared.gate_proj.weight.detach(), shared.up_proj.weight.detach()))
    return found | {
        "shared_gate_up": gate_up.numpy(),
        "shared_down": shared.down_proj.weight.detach().numpy(),
        "shared_gate": gate.weight.detach()[0].numpy(),
    }


class _Layer:
    """The experts of one layer, packed; with `rest`, what `_rest` found, the whole block."""

    def __init__(self, experts: nn.Module, rest: dict | None):
        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.dtype, (self.count, self.hidden, inner) = down.dtype, down.shape
        # Products of bfloat16 values are exact in either precision; in pairs they are twice as fast where the processor has them.
        precision = "highest" if self.dtype == torch.float32 else "medium"
        self.packed = _core.Experts(
            (gate_up.data_ptr(), gate_up.stride(0), gate_up.stride(1)),
            (down.data_ptr(), down.stride(0), down.stride(1)),
            self.count,
            self.hidden,
            inner,
            _DTYPES[self.dtype],
            precision,
            torch.get_num_threads(),
            **rest or {},
        )

    def chosen(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The forward of transformers' experts: rows [T, H], and the experts of each with what they count, [T, k]."""
        indices, weights = top_k_index.to(torch.int64).contiguous(), top_k_weights.float().contiguous()
        return self._run(hidden_states, indices.numpy(), weights.numpy())

    def routed(self, hidden_states: Tensor) -> Tensor:
        """The forward of a block: [..., H]."""
        return self._run(hidden_states, None, None)

    def _run(self, hidden_states: Tensor, indices, weights) -> Tensor:
        x = hidden_states
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        out, width = torch.empty_like(x), self.hidden
        self.packed.run(
            (x.data_ptr(), width, width),
            x.numel() // width,
            (out.data_ptr(), width, width),
            indices,
            weights,
            torch.get_num_threads(),
        )
        return out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)


def _close(got: Tensor, expected: Tensor) -> bool:
    """Whether all rows are equal up to rounding."""
    errors = (got.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-20)
    return bool((errors <= _ROUNDING[expected.dtype]).all())


def _as_before(layer: _Layer, experts: nn.Module, block: nn.Module | None) -> bool:
    """Whether a layer gives what the modules give for a few random rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, layer.hidden, generator=generator).to(layer.dtype)
    if block is not None:
        return _close(layer.routed(x), block(x))
    scores = torch.rand(5, layer.count, generator=generator).softmax(-1)
    weights, indices = scores.topk(min(3, layer.count), dim=-1)
    given = x[0], indices, weights.to(layer.dtype)
    return _close(layer.chosen(*given), experts(*given))


class HostExperts:
    """The layers of a model that run in the extension, which is what their modules' forward is from now on.

    `against`: why the others do not, as far as they are transformers' experts. `layers` counts what was taken. To be made in inference mode.
    """

    def __init__(self, model: nn.Module):
        self.against: list[str] = []
        self.given_up = False
        self._forwards: list[tuple[nn.Module, Callable]] = []
        parents = {child: parent for parent in model.modules() for child in parent.children()}
        for module in list(model.modules()):
            if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                continue
            reason = _against(module)
            if reason is None:
                reason = self._take(module, parents.get(module))
            if reason is not None and reason not in self.against:
                self.against.append(reason)
        self.use()

    @property
    def layers(self) -> int:
        return len(self._forwards)

    def _take(self, experts: nn.Module, block: nn.Module | None) -> str | None:
        # What a router says is recorded where a model wants it for a loss.
        wanted = getattr(experts.config, "output_router_logits", False)
        alone = block is None or wanted or experts.down_proj.dtype != torch.float32
        rest = None if alone or block is None else _rest(block, experts)
        whole = block if rest is not None else None
        layer = _Layer(experts, rest)
        if not _as_before(layer, experts, whole):
            return f"{type(experts).__name__} differs from its own forward"
        self._forwards.append((experts, layer.chosen) if whole is None else (whole, layer.routed))
        if experts.gate_up_proj.numel() + experts.down_proj.numel() > _COPY_LIMIT:
            self.given_up = True
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.data = weight.new_empty(0)
        return None

    def use(self) -> None:
        """Has the modules run in the extension."""
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[method-assign]

    def undo(self) -> None:
        """Has the modules run their own code again. Not after weights were given up."""
        assert not self.given_up
        for module, _ in self._forwards:
            del module.forward

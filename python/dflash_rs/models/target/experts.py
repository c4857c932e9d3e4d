"""Layers of experts on a CPU, in one call of the extension each, in place of transformers' grouped products.

Rows of one request meet more experts than one row does, and that is what makes a block dear. The extension groups rows by expert and reads an
expert's weights once for all of them (`device/host/experts`); a row gets the same bits in any company.

What is taken is what `_against` finds nothing against: plainly stored experts of two products, with or without gates and biases, whose activation
is one that the extension has (`_FUNCTIONS`, and the clamped gate of gpt-oss). Whatever else transformers has (norms behind experts, other
activations, classes that are not marked as experts) runs as before. Of blocks that were looked at (`_BLOCKS`) the router and the shared expert
are in the same call, in float32; in 16-bit types, where rounding decides between experts, the model's own router chooses. Each layer is compared
with its own forward before it is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _core, threads

# Above this many weights of a layer the modules' own are given up once they are packed: a second copy would be most of the model again.
_COPY_LIMIT = 1 << 25
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Largest relative error of a row in the comparison; in bfloat16 the model's own products round in between.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# What the decorator of transformers' experts says of a class: what it has to say, and what there are two of.
_SAID = {"has_post_expert_norm": (False,), "_is_expert_parallel": (False,)} | dict.fromkeys(
    ("has_gate", "has_bias", "is_transposed", "is_concatenated"), (False, True)
)
# Activations of the extension, by its names.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
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


# Rows of weights that torch multiplies in groups have a multiple of so many bytes.
_GROUPED_BYTES = 16


def _is_marked(module: nn.Module) -> bool:
    """Whether it is what transformers marks as experts."""
    return hasattr(module, "has_gate") and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def run_unaligned_one_by_one(model: nn.Module) -> None:
    """Has experts of odd sizes run one after the other: transformers would give them to torch's grouped products, which refuse them."""
    for module in filter(_is_marked, model.modules()):
        weights = getattr(module, _first(module), None), module.down_proj
        sizes = [n * w.element_size() for w in weights if isinstance(w, nn.Parameter) for n in w.shape[1:]]
        if any(size % _GROUPED_BYTES for size in sizes):
            model.set_experts_implementation("eager")  # type: ignore[operator]
            return


def _touched(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


@dataclass(frozen=True)
class _Between:
    """What stands between the products: `activation` as the extension names it; `clamped`: alpha and limit of a clamped gate."""

    activation: str
    gated: bool = True
    clamped: tuple[float, float] | None = None


def _same(got: object, expected: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == expected.shape and torch.allclose(got, expected, 1e-5, 1e-5)


def _activation(function: Callable[[Tensor], object] | None) -> str | None:
    """The name of a function of one number, by what it gives."""
    x = torch.linspace(-12, 12, 97)
    return next((name for name, of in _FUNCTIONS.items() if function is not None and _same(function(x), of(x))), None)


def _between(module: nn.Module) -> _Between | None:
    """What stands between the products of some experts, by what it gives; None where the extension has nothing like it."""
    if not module.has_gate:
        name = _activation(getattr(module, "act_fn", None))
        return None if name is None else _Between(name, gated=False)
    clamps: list[tuple[float, float]] = []
    for prefix in ("", "swiglu_"):
        alpha, limit = (getattr(module, prefix + name, None) for name in ("alpha", "limit"))
        if isinstance(alpha, int | float) and isinstance(limit, int | float) and limit > 0:
            clamps.append((float(alpha), float(limit)))
    # Far enough for every limit to cut.
    span = 12 + 2 * max((limit for _, limit in clamps), default=0)
    gate, up = (x.flatten()[None] for x in torch.meshgrid(*[torch.linspace(-span, span, 49)] * 2, indexing="ij"))
    both = torch.cat((gate, up), -1) if module.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
    try:
        got = module._apply_gate(both)
    except (RuntimeError, TypeError):
        return None
    for name, function in _FUNCTIONS.items():
        if _same(got, function(gate) * up):
            return _Between(name)
    for alpha, limit in clamps:
        low, cut = gate.clamp(max=limit), up.clamp(-limit, limit)
        if _same(got, low * torch.sigmoid(alpha * low) * (cut + 1)):
            return _Between("silu", clamped=(alpha, limit))
    return None


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


def _first(module: nn.Module) -> str:
    """The name of the weights of the first product."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _against(module: nn.Module) -> str | None:
    """What is against running these experts in the extension; None where nothing is."""
    name = type(module).__name__
    if not _of_transformers(module):
        return f"{name} is not one of transformers'"
    for attribute, expected in _SAID.items():
        if not any(getattr(module, attribute, None) is value for value in expected):
            return f"{name}: {attribute} is {getattr(module, attribute, None)}"
    if _touched(module):
        return f"{name} has hooks"
    weights = {_first(module), "down_proj"}
    expected_names = weights | ({f"{weight}_bias" for weight in weights} if module.has_bias else set())
    held = {key for key, _ in module.named_parameters()} | {key for key, _ in module.named_buffers()}
    if held != expected_names or {key for key, _ in module.named_children()} - {"act_fn"}:
        return f"{name} has {', '.join(sorted(held))}"
    first, down = getattr(module, _first(module)), module.down_proj
    if down.ndim != 3 or 0 in down.shape:
        return f"{name}: down_proj has shape {tuple(down.shape)}"
    count, hidden, inner = (down.transpose(1, 2) if module.is_transposed else down).shape
    rows = inner * (1 + module.has_gate)
    shape = (count, hidden, rows) if module.is_transposed else (count, rows, hidden)
    if down.dtype not in _DTYPES or not (
        _plain(down, down.dtype, tuple(down.shape)) and _plain(first, down.dtype, shape)
    ):
        return f"{name}: weights are {first.dtype} {tuple(first.shape)} and {down.dtype} {tuple(down.shape)} on {down.device}"
    if module.has_bias and not (
        _plain(getattr(module, f"{_first(module)}_bias"), down.dtype, (count, rows))
        and _plain(module.down_proj_bias, down.dtype, (count, hidden))
    ):
        return f"{name}: biases have another type or shape than its weights"
    if _between(module) is None:
        if module.has_gate and getattr(type(module)._apply_gate, "__module__", "") != "transformers.integrations.moe":
            return f"{name} has a gate of its own"
        activation = getattr(module, "act_fn", None)
        return f"{name}: act_fn is {getattr(activation, '__name__', type(activation).__name__)}"
    return None


def _packing(module: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weights [count, rows, hidden] and [count, hidden, inner], and biases (none for experts without) in float32, as the extension takes
    them: gate, then up."""

    def rows(x: Tensor) -> Tensor:
        return x if module.is_concatenated or not module.has_gate else torch.cat((x[:, ::2], x[:, 1::2]), dim=1)

    first, down = getattr(module, _first(module)).detach(), module.down_proj.detach()
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    biases = {}
    if module.has_bias:
        biases["gate_up_bias"] = rows(getattr(module, f"{_first(module)}_bias").detach().float()).contiguous()
        biases["down_bias"] = module.down_proj_bias.detach().float().contiguous()
    return rows(first).contiguous(), down.contiguous(), biases


def _rest(block: nn.Module, experts: nn.Module, between: _Between) -> dict | None:
    """Router and shared expert of a block as `_core.Experts` takes them; None where the block is not known or not as it is known."""
    if type(block).__name__ not in _BLOCKS or not _of_transformers(block) or any(_touched(m) for m in block.modules()):
        return None
    if experts.is_transposed or experts.has_bias:
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
    if between != _Between(_activation(shared.act_fn) or "") or any(
        type(linear) is not nn.Linear or linear.bias is not None for linear in linears
    ):
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

    def __init__(self, experts: nn.Module, between: _Between, rest: dict | None):
        gate_up, down, biases = _packing(experts)
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
            threads.of_the_extension(),
            activation=between.activation,
            gated=between.gated,
            clamped=between.clamped,
            **{name: bias.numpy() for name, bias in biases.items()},
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
            threads.of_the_extension(),
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
            if not _is_marked(module):
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
        between = _between(experts)
        assert between is not None
        rest = None if alone or block is None else _rest(block, experts, between)
        whole = block if rest is not None else None
        layer = _Layer(experts, between, rest)
        if not _as_before(layer, experts, whole):
            return f"{type(experts).__name__} differs from its own forward"
        self._forwards.append((experts, layer.chosen) if whole is None else (whole, layer.routed))
        weights = getattr(experts, _first(experts)), experts.down_proj
        if sum(weight.numel() for weight in weights) > _COPY_LIMIT:
            self.given_up = True
            for weight in weights:
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

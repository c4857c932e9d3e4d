"""LoRA adapters of the target: DFLASH_RS gives the tokens of plain SGLang with the same adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from cases import matrix, tokens
from safetensors.torch import save_file
from servers import TARGET, Server, speculative

RANK = 4


def adapter(folder: Path) -> Path:
    """An adapter of the bundled target in PEFT's form, strong enough that texts change."""
    config = json.loads((Path(TARGET) / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    sizes = {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.v_proj": (hidden, values),
        "mlp.down_proj": (config["intermediate_size"], hidden),
    }
    generator, weights = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (wide, out) in sizes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, wide, generator=generator)
            weights[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, RANK, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": TARGET,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in sizes],
    }
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def servers(logs, tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """DFLASH_RS, plain steps, chains and trees in turn, and plain SGLang."""
    common = {
        "enable_lora": True,
        "lora_paths": f"other={adapter(tmp_path_factory.mktemp('adapter'))}",
        "lora_backend": "torch_native",
        "max_lora_rank": RANK,
        "enable_deterministic_inference": True,
        "grammar_backend": "none",
    }
    env = {"DFLASH_RS_CONFIG": json.dumps({"tree_nodes": 12, "adaptive": "cycle", "widths": [1, 8]})}
    started = (
        Server(logs / "adapters.log", env=env, **speculative(page_size=16, **common)),
        Server(logs / "adapters-plain.log", disable_overlap_schedule=True, **common),
    )
    try:
        yield started[0].wait(), started[1].wait()
    finally:
        for server in started:
            server.close()


def bodies(name: str, adapted: Any, count: int = 4) -> list[dict[str, Any]]:
    """Requests, of which those with `adapted(n)` ask for the adapter."""
    return [
        body | ({"lora_path": "other"} if adapted(n) else {})
        for n, body in enumerate(cases.bodies(matrix()[name], count))
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", ["greedy", "all penalties", "seed, top_p"])
def test_adapted_and_plain_requests_give_the_same_and_draft(servers: tuple[Server, Server], name: str) -> None:
    texts = []
    for adapted in (lambda n: False, lambda n: True, lambda n: n % 2 == 1):
        ours, plain = (server.together(bodies(name, adapted)) for server in servers)
        assert tokens(ours) == tokens(plain)
        assert sum(answer["meta_info"]["spec_accept_length"] for answer in ours) / len(ours) > 1.3
        texts.append(tokens(ours))
    without, every, some = texts
    assert all(a != b for a, b in zip(without, every)), "the adapter does something"
    assert some == [every[n] if n % 2 else without[n] for n in range(4)]
    assert servers[0].flush_is_clean()


def test_sglang_lets_adapters_in_as_with_its_own_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang.srt.arg_groups.lora_hook")
    from sglang.srt.arg_groups import lora_hook as module
    from sglang.srt.plugins import load_plugins

    load_plugins()
    values = {
        "speculative_adaptive": False,
        "moe_runner_backend": "auto",
        "speculative_moe_runner_backend": "auto",
    }
    monkeypatch.setattr(module, "resolving_view", lambda args: args)
    ours = SimpleNamespace(speculative_algorithm="DFLASH_RS", **values)
    module.check_lora_speculative_compatibility(ours)
    ours.speculative_adaptive = True
    with pytest.raises(ValueError, match="speculative-adaptive"):
        module.check_lora_speculative_compatibility(ours)
    with pytest.raises(ValueError, match="LoRA is only compatible"):
        module.check_lora_speculative_compatibility(SimpleNamespace(speculative_algorithm="OTHER", **values))

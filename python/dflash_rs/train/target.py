"""Training a small target: a language model on Python source, of the Qwen3 architecture or a hybrid (`hybrid`).

The recipe: Muon + AdamW, constant learning rate with a linear fall over the last third, output projections scaled by
``1/sqrt(2 L)`` at the start. Optionally the run begins with fewer layers and inserts identity layers part-way (their output
projections are zero, so the function is unchanged at that moment): the early steps then cost a fraction. A trained model of the
same vocabulary may teach: its law is then most of the label of every token, which says more than the token.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from . import corpus, hybrid
from .common import (
    Group,
    Optimizers,
    Progress,
    batches,
    finite,
    pick_device,
    resumed,
    save_checkpoint,
    smooth,
    trapezoid,
)
from .settings import HYBRID, TargetTraining

_EVAL_WINDOWS = 64


def build(settings: TargetTraining, num_layers: int):
    """A freshly initialised model with `num_layers` layers."""
    if settings.shape == HYBRID:
        return hybrid.build(settings)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=corpus.END_OF_TEXT_ID,
        pad_token_id=corpus.END_OF_TEXT_ID,
        attn_implementation="eager",  # 15 % faster than sdpa for windows of 256 tokens on a CPU
    )
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(config)
    scale = 1 / math.sqrt(2 * settings.num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def grow(model, settings: TargetTraining):
    """The same function with more layers: after each old layer, copies of it whose output projections are zero."""
    old = model.model.layers
    factor = settings.num_layers // len(old)
    new = build(settings, settings.num_layers)
    with torch.no_grad():
        new.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
        new.model.norm.load_state_dict(model.model.norm.state_dict())
        for i, layer in enumerate(new.model.layers):
            layer.load_state_dict(old[i // factor].state_dict())
            if i % factor:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return new


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of ``int64 [b, S]`` tokens."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_loss(
    model, tokens: torch.Tensor, settings: TargetTraining, teacher=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step lowers, and the part of it that `loss_of` is: cross-entropy with the tokens and a teacher's law, and experts' imbalance."""
    routes = settings.shape == HYBRID
    output = model.model(input_ids=tokens, use_cache=False, **({"output_router_logits": True} if routes else {}))
    logits = model.lm_head(output.last_hidden_state[:, :-1]).float().flatten(0, 1)
    own = F.cross_entropy(logits, tokens[:, 1:].flatten())
    loss = own
    if teacher is not None:
        with torch.no_grad():
            hidden = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            law = teacher.get_output_embeddings()(hidden).flatten(0, 1).softmax(-1, dtype=torch.float32)
        loss = torch.lerp(own, F.cross_entropy(logits, law), settings.teacher_share)
    if routes and settings.balance:
        loss = loss + settings.balance * hybrid.imbalance(output.router_logits, settings.experts_per_token)
    return loss, own.detach()


@torch.no_grad()
def held_out_loss(model, tokens: np.ndarray, seq_len: int, limit: int | None = None) -> float:
    """Mean cross-entropy in nats over consecutive windows of held-out tokens, the same ones every time."""
    count = tokens.size // seq_len
    picks = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    device = next(model.parameters()).device
    losses = []
    for i in range(0, len(picks), 16):
        rows = np.stack([tokens[j * seq_len : (j + 1) * seq_len] for j in picks[i : i + 16]])
        losses.append((float(loss_of(model, torch.from_numpy(rows.astype(np.int64)).to(device))), len(rows)))
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def _optimizers(model, settings: TargetTraining) -> Optimizers:
    # Neither are routers and gates, whose few rows say one thing each.
    gates = ("mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b")
    return Optimizers(model, settings.lr, settings.weight_decay, matrices_outside=("embed_tokens", "lm_head", *gates))


def _beginning(settings: TargetTraining):
    """The model that a run begins with."""
    from ..models.checkpoint import load_causal_lm, readable

    model = build(settings, settings.layers_at(0))
    if settings.init_from:
        with readable(settings.init_from, "init_from"):
            model.load_state_dict(load_causal_lm(settings.init_from)[0].state_dict())
    if settings.start_from:
        hybrid.start_from(model, load_causal_lm(settings.start_from, torch.float32)[0])
    return model


def _teacher(settings: TargetTraining, where: torch.device, autocast: bool):
    """The frozen model whose law is part of the labels, if there is one."""
    if not settings.teacher:
        return None
    from ..models.checkpoint import load_causal_lm

    model = load_causal_lm(settings.teacher, torch.bfloat16 if autocast else torch.float32)[0]
    if (got := model.get_output_embeddings().weight.shape[0]) != settings.vocab_size:
        raise ValueError(f"teacher: {settings.teacher} has {got} tokens, expected vocab_size={settings.vocab_size}")
    model.set_attn_implementation("eager")
    return model.to(where).eval().requires_grad_(False)


def _resumed(settings: TargetTraining, path: Path, where: torch.device):
    """Model, optimisers, steps done and history of the run whose checkpoint is at `path`, or of one that begins."""
    state = resumed(path, settings)
    if state is None:
        model = _beginning(settings).to(where)
        return model, _optimizers(model, settings), 0, []
    model = build(settings, state["num_layers"])
    model.load_state_dict(state["model"])
    model.to(where)
    optimizers = _optimizers(model, settings)
    optimizers.load_state_dict(state["optimizers"])
    return model, optimizers, state["step"], state["history"]


def _state(settings: TargetTraining, model, optimizers: Optimizers, step: int, history: list[dict]) -> dict:
    return {
        "settings": asdict(settings),
        "step": step,
        "history": history,
        "num_layers": len(model.model.layers),
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
    }


def train(
    settings: TargetTraining,
    data: Path,
    out: Path,
    device: str = "auto",
    save_every: int = 200,
    autocast: bool | None = None,
) -> dict:
    """Trains to the end of the budget, resuming from ``out/checkpoint.pt`` when it is there; returns the report.

    `data` is a folder written by `corpus.prepare`. Writes bf16 safetensors, tokenizer, ``training.json`` (settings and report).
    `autocast` runs the matrix products in bf16; the default does so on a GPU only.
    """
    settings.check()
    where = pick_device(device)
    autocast = where.type == "cuda" if autocast is None else autocast
    group = Group.join(where)
    tokens = np.load(data / "train.npy")
    held_out = np.load(data / "held_out.npy")
    torch.manual_seed(settings.seed)

    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    model, optimizers, step, history = _resumed(settings, path, where)
    teacher = _teacher(settings, where, autocast)
    progress = Progress(settings.steps, "steps")
    source = batches(tokens, settings.seq_len, settings.batch_size, settings.seed, step)
    running, begun = None, step
    while step < settings.steps:
        if len(model.model.layers) != settings.layers_at(step):
            model = grow(model.cpu(), settings).to(where)
            optimizers = _optimizers(model, settings)
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast):
            loss, own = training_loss(model, group.share(next(source)).to(where), settings, teacher)
        loss.backward()
        group.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(trapezoid(step, settings.steps, settings.warmup_steps, settings.decay))
        step += 1
        running = smooth(running, finite(own, step, path), step - begun)
        if group.leads and (step % save_every == 0 or step == settings.steps):
            loss_there = held_out_loss(model, held_out, settings.seq_len, _EVAL_WINDOWS)
            history.append({"step": step, "train_loss": running, "held_out_loss": loss_there})
            save_checkpoint(path, _state(settings, model, optimizers, step, history))
        last = f"  held out {history[-1]['held_out_loss']:.3f}" if history else ""
        if group.leads:
            progress.show(step, f"loss {running:.3f}{last}", force=step % save_every == 0)

    report = {
        "held_out_loss": held_out_loss(model, held_out, settings.seq_len),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": settings.steps * settings.seq_len * settings.batch_size,
        "history": history,
    }
    if group.leads:
        export(model, data / "tokenizer", out, {"settings": asdict(settings), "report": report})
    return report


def export(model, tokenizer_folder: Path, out: Path, notes: dict) -> None:
    """Writes the model as bf16 safetensors with its tokenizer and the notes of its training."""
    from transformers import GenerationConfig

    from ..models.checkpoint import load_tokenizer

    model = model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=corpus.END_OF_TEXT_ID, pad_token_id=corpus.END_OF_TEXT_ID)
    model.save_pretrained(out)
    load_tokenizer(tokenizer_folder).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")

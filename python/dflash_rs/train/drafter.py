"""Training a DFlash drafter for a frozen target (DFlash, arXiv 2602.06036, section 4.2 and appendix A.1).

    sequence --> target (frozen) --> tapped hidden states --> drafter's context keys and values
                                 \\-> its next-token law  --> what slot k of a block should predict
    random anchors --> blocks [anchor, MASK x (B-1)], all of a sequence in one pass, strict context mask

Two choices differ from the paper and are stated in the model card:
- *soft labels*: slot k of a block at anchor a is compared with the target's own law of the token at a+k given the sequence
  before it, which is what the sampled token is an unbiased estimate of; `soft_labels=0` gives the paper's cross-entropy;
- matrices are trained with Muon.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from . import responses
from .common import Group, Optimizers, Progress, cosine, load_checkpoint, pick_device, save_checkpoint, smooth
from .settings import DrafterTraining


def draft_config(target_config, settings: DrafterTraining):
    """The drafter's shape: the target's own widths, `num_layers` full-attention layers."""
    from ..models.dflash import DraftConfig

    rope = dict(getattr(target_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    return DraftConfig(
        hidden_size=target_config.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=target_config.num_attention_heads,
        num_key_value_heads=target_config.num_key_value_heads,
        head_dim=target_config.head_dim,
        intermediate_size=target_config.intermediate_size,
        vocab_size=target_config.vocab_size,
        target_layer_ids=settings.tap_ids,
        mask_token_id=settings.mask_token_id,
        num_target_layers=target_config.num_hidden_layers,
        block_size=settings.block_size,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=target_config.max_position_embeddings,
    )


@torch.no_grad()
def warm_start(draft, target, settings: DrafterTraining) -> None:
    """Starts the drafter from the target's last layers and norm, with `fc` the mean of the taps.

    A cold drafter under a tied head predicts MASK itself and spends its first thousand steps unlearning that.
    """
    layers = target.model.layers
    for i, layer in enumerate(draft.layers):
        source = layers[len(layers) - len(draft.layers) + i].state_dict()
        missing, unexpected = layer.load_state_dict(source, strict=False)
        if missing or unexpected:
            raise ValueError(f"warm start: the target's layers do not match a drafter layer ({missing or unexpected})")
    draft.norm.weight.copy_(target.model.norm.weight)
    width = draft.config.hidden_size
    taps = len(draft.config.target_layer_ids)
    draft.fc.weight.copy_(
        torch.eye(width).repeat(1, taps) / taps + 0.02 / math.sqrt(width) * torch.randn(width, width * taps)
    )
    draft.hidden_norm.weight.copy_(layers[-1].input_layernorm.weight)


class Teacher:
    """The frozen target: tapped features and next-token log-probabilities of whole sequences."""

    def __init__(self, target, taps: tuple[int, ...], mask_token_id: int):
        self.target = target.eval().requires_grad_(False)
        self.taps, self.mask = taps, mask_token_id
        self._seen: dict[int, torch.Tensor] = {}
        for k in taps:
            target.model.layers[k].register_forward_hook(self._keep(k))

    def _keep(self, k: int):
        def hook(module, args, output):
            self._seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens ``int64 [b, S]`` -> features ``[b, S, K*H]`` and hidden states before the head ``[b, S, H]``."""
        last = self.target.model(input_ids=tokens, use_cache=False).last_hidden_state
        features = torch.cat([self._seen[k] for k in self.taps], dim=-1)
        self._seen.clear()
        return features, last

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the target's head, the mask token excluded: it is an input, never a prediction."""
        logits = self.target.lm_head(hidden).float()
        logits[..., self.mask] = -math.inf
        return logits


def block_loss(
    draft, teacher: Teacher, tokens: torch.Tensor, anchors: torch.Tensor, block: int, settings: DrafterTraining
):
    """Weighted loss of all blocks of a batch and the mean accepted length they would have had on the true text.

    tokens ``int64 [b, S]``, anchors ``int64 [b, A]`` with ``anchor + block <= S``. Weights ``exp(-(k-1)/gamma)``, normalised.
    """
    from ..models.dflash.training import training_hidden

    features, last = teacher(tokens)
    hidden = training_hidden(draft, features, tokens, anchors, block)[:, :, 1:]
    logits = teacher.logits(hidden)
    where = anchors[..., None] + torch.arange(1, block, device=tokens.device)
    flat = where.flatten(1)
    truth = tokens.gather(1, flat).view_as(where)
    logs = F.log_softmax(logits, dim=-1)
    hard = -logs.gather(-1, truth[..., None])[..., 0]
    loss = (1 - settings.soft_labels) * hard if settings.soft_labels < 1 else 0.0
    if settings.soft_labels > 0:
        with torch.no_grad():
            before = last.gather(1, (flat - 1)[..., None].expand(-1, -1, last.shape[-1]))
            law = teacher.logits(before).softmax(-1).view_as(logits)
        # 0 * -inf at the mask column is nan: the law is zero there, so the term is dropped.
        loss = loss - settings.soft_labels * (law * logs.masked_fill(logs == -math.inf, 0.0)).sum(-1)
    weights = torch.exp(-torch.arange(block - 1, device=tokens.device) / settings.gamma)
    with torch.no_grad():
        right = logits.argmax(-1) == truth
        accepted = right.int().cumprod(-1).sum(-1).float().mean()
    return (loss * weights).sum(-1).mean() / weights.sum(), 1 + float(accepted)


def _sequences(own: np.ndarray, corpus: np.ndarray, settings: DrafterTraining, start: int):
    """Endless global batches ``int64 [batch_size, S]``: `own_text` from the target's responses, the rest true text."""
    length = own.shape[1]
    epochs: dict[int, np.ndarray] = {}
    used = 0
    per_batch = round(settings.batch_size * settings.own_text)
    step = 0
    while True:
        rng = np.random.default_rng((settings.seed, 7, step))
        rows = []
        for _ in range(per_batch):
            epoch, index = divmod(used, len(own))
            if epoch not in epochs:
                epochs = {epoch: np.random.default_rng((settings.seed, 11, epoch)).permutation(len(own))}
            rows.append(own[epochs[epoch][index]])
            used += 1
        for begin in rng.integers(0, corpus.size - length, settings.batch_size - per_batch):
            rows.append(corpus[begin : begin + length])
        if step >= start:
            batch = torch.from_numpy(np.stack(rows).astype(np.int64))
            block = int(rng.choice(settings.block_sizes))
            last = length - block
            anchors = np.stack([np.sort(rng.permutation(last - 1)[: settings.anchors]) + 1 for _ in rows])
            yield batch, torch.from_numpy(anchors), block
        step += 1


def train(
    settings: DrafterTraining,
    target_path: Path,
    own_path: Path,
    data: Path,
    out: Path,
    device: str = "auto",
    save_every: int = 250,
    autocast: bool | None = None,
) -> dict:
    """Trains to the end, resuming from ``out/checkpoint.pt``; writes the drafter as a DFlash checkpoint; returns the report."""
    from ..models.checkpoint import load_causal_lm, readable
    from ..models.dflash import DFlashDraft
    from ..models.loader import load_draft

    where = pick_device(device)
    group = Group.join(where)
    autocast = where.type == "cuda" if autocast is None else autocast
    target = load_causal_lm(target_path, torch.float32)[0].to(where)
    settings.check(target.config.num_hidden_layers, target.config.vocab_size)
    own = responses.load(own_path)
    corpus_tokens = np.load(data / "train.npy")

    torch.manual_seed(settings.seed)
    draft = DFlashDraft(draft_config(target.config, settings))
    warm_start(draft, target.cpu(), settings)
    target.to(where)
    if settings.init_from:
        with readable(settings.init_from, "init_from"):
            draft.load_state_dict(load_draft(settings.init_from).state_dict())
    draft.to(where).bind_target(target.get_input_embeddings(), target.get_output_embeddings())
    teacher = Teacher(target, settings.tap_ids, settings.mask_token_id)
    optimizers = Optimizers(draft, settings.lr, settings.weight_decay, matrices_outside=())

    path = out / "checkpoint.pt"
    state = load_checkpoint(path)
    step, history = 0, []
    if state is not None:
        if state["settings"] != asdict(settings):
            raise ValueError(f"out: {path} was made with other settings; choose another folder or the same settings")
        step, history = state["step"], state["history"]
        draft.load_state_dict(state["draft"])
        optimizers.load_state_dict(state["optimizers"])

    progress = Progress(settings.steps, "steps")
    warmup = max(1, int(settings.steps * settings.warmup))
    source = _sequences(own, corpus_tokens, settings, step)
    mean_loss, mean_tau, begun = None, None, step
    while step < settings.steps:
        tokens, anchors, block = next(source)
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast):
            loss, tau = block_loss(
                draft, teacher, group.share(tokens).to(where), group.share(anchors).to(where), block, settings
            )
        loss.backward()
        group.average_gradients(draft)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizers.step(cosine(step, settings.steps, warmup))
        step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {step}; the last good checkpoint is {path}")
        mean_loss = smooth(mean_loss, value, step - begun)
        mean_tau = smooth(mean_tau, tau, step - begun)
        if group.leads and (step % save_every == 0 or step == settings.steps):
            history.append({"step": step, "loss": mean_loss, "random_anchor_tau": mean_tau})
            save_checkpoint(
                path,
                {
                    "settings": asdict(settings),
                    "step": step,
                    "history": history,
                    "draft": draft.state_dict(),
                    "optimizers": optimizers.state_dict(),
                },
            )
        if group.leads:
            text = f"loss {mean_loss:.3f}  random-anchor tau {mean_tau:.2f}"
            progress.show(step, text, force=step % save_every == 0)

    report = {"steps": settings.steps, "sequences": settings.steps * settings.batch_size, "history": history}
    if group.leads:
        export(draft, out, {"settings": asdict(settings), "report": report})
    return report


def export(draft, out: Path, notes: dict) -> None:
    """Writes the drafter as a DFlash checkpoint in bf16, with the notes of its training."""
    from ..models.loader import save_draft

    save_draft(draft, out, dtype=torch.bfloat16)
    (out / "training.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")

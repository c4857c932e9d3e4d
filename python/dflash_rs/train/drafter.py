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

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import responses
from .common import Group, Limit, Optimizers, Progress, cosine, finite, pick_device, resumed, save_checkpoint, smooth
from .documents import Documents, Rows, Text, rows_of
from .features import StoredFeatures
from .losses import slots_loss
from .settings import DrafterTraining, MtpTraining
from .vocabulary import Columns, Narrowed
from .warm_start import base_layers, warm_start

# Of a DFlash 2: kernels of channels, and rows of tokens. They are learnt number by number.
_NOT_MATRICES = ("base_kernel", "codebook")
# Rows per category that a report on held-out texts looks at.
_HELD_OUT_ROWS = 6


def draft_config(target_config, settings: DrafterTraining):
    """The drafter's shape: the target's own widths, `num_layers` full-attention layers, MLPs as wide as what a token of the target goes
    through unless `intermediate_size` says otherwise. A DFlash 2's with a `selector_rank`."""
    from ..models.dflash import DraftConfig
    from ..models.dflash2 import DFlash2Config

    kind: type[DraftConfig] = DraftConfig
    own: dict[str, Any] = {}
    if settings.selector_rank:
        kind, own = DFlash2Config, {name: getattr(settings, name) for name in DFlash2Config.own_fields}
        if target_config.hidden_size % settings.conv_group_size:
            raise ValueError(
                f"conv_group_size: got {settings.conv_group_size}, expected a divisor of the target's hidden_size {target_config.hidden_size}"
            )
    rope = dict(getattr(target_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    # A drafter rotates whole heads, by one position.
    for name in ("partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        rope.pop(name, None)
    return kind(
        **own,
        hidden_size=target_config.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=target_config.num_attention_heads,
        num_key_value_heads=target_config.num_key_value_heads,
        head_dim=target_config.head_dim,
        intermediate_size=settings.intermediate_size or _units_per_token(target_config),
        vocab_size=target_config.vocab_size,
        target_layer_ids=settings.tap_ids,
        mask_token_id=settings.mask_token_id,
        num_target_layers=target_config.num_hidden_layers,
        block_size=settings.block_size,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=target_config.max_position_embeddings,
    )


def _units_per_token(config) -> int:
    """Hidden MLP units that a token of the target goes through."""
    if getattr(config, "intermediate_size", None):
        return config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    each, experts = (getattr(config, name, None) or 0 for name in ("moe_intermediate_size", "num_experts_per_tok"))
    if not shared + each * experts:
        raise ValueError("intermediate_size: got 0, expected a number: the target's configuration does not tell")
    return shared + each * experts


class Teacher:
    """The frozen target: tapped features and next-token log-probabilities of whole sequences."""

    def __init__(self, target, taps: tuple[int, ...], mask_token_id: int | None):
        self.target = target.eval().requires_grad_(False)
        self.taps, self.mask = taps, mask_token_id
        self.stored: StoredFeatures | None = None
        # What logits are made of, where it is a part of the vocabulary.
        self.columns: Columns | None = None
        self._seen: dict[int, torch.Tensor] = {}
        for k in taps:
            base_layers(target)[k].register_forward_hook(self._keep(k))

    def _keep(self, k: int):
        def hook(module, args, output):
            self._seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, position: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens ``int64 [b, S]`` -> features ``[b, S, K*H]`` (of no width without taps) and hidden states before the head ``[b, S, H]``.

        With `position` ``[b, S]``, a row holds several documents, each of which begins at position 0 and sees itself only.
        """
        last = self.target.base_model(input_ids=tokens, position_ids=position, use_cache=False).last_hidden_state
        features = torch.cat([self._seen[k] for k in self.taps], dim=-1) if self.taps else last[..., :0]
        self._seen.clear()
        return features, last

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and hidden states of a batch: those stored where all of it is, else computed."""
        if self.stored is not None and bool((batch.place >= 0)[batch.document >= 0].all()):
            return self.stored.read(batch.place)
        return self(batch.tokens, batch.position)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the target's head makes of hidden states, in its own dtype: logits of the vocabulary, or of `columns`."""
        if self.columns is not None:
            return self.columns.scores(hidden)
        head = self.target.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the target's head, the mask token excluded: it is an input, never a prediction."""
        return self.without_mask(self.scores(hidden).float(), -math.inf)

    def without_mask(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        """Overwrites what `scores` say of the mask token, if there is one."""
        if self.mask is not None and self.columns is None:
            scores[..., self.mask] = value
        return scores

    def law(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's own probabilities, float32, the mask token excluded."""
        scores = self.without_mask(self.scores(hidden), -math.inf)
        return scores.softmax(-1, dtype=torch.float32)

    def keeps_documents_apart(self, device: torch.device) -> bool:
        """Whether two documents in a row leave each other alone: those of a target with recurrent state do not."""
        size = 24
        tokens = torch.randint(0, self.target.config.get_text_config().vocab_size, (1, 2 * size), device=device)
        position = torch.arange(size, device=device).repeat(2)[None]
        _, together = self(tokens, position)
        _, alone = self(tokens[:, size:])
        difference = (together[:, size:].float() - alone.float()).norm() / alone.float().norm()
        return bool(difference < 2e-2)


class Batch(NamedTuple):
    """What one step trains on: the arrays of `documents.Rows`, anchors int64 [b, A], and the block size."""

    tokens: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    own: torch.Tensor
    place: torch.Tensor
    anchors: torch.Tensor
    block: int

    @classmethod
    def whole(cls, tokens: torch.Tensor, anchors: torch.Tensor, block: int) -> Batch:
        """Of rows that are one document each, all of it the target's own."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        own, elsewhere = torch.ones_like(tokens, dtype=torch.bool), torch.full_like(tokens, -1)
        return cls(tokens, torch.zeros_like(tokens), position, own, elsewhere, anchors, block)

    def on(self, group: Group, device: torch.device) -> Batch:
        """This process's share, on its device."""
        tokens, document, position, own, place, anchors = (group.share(part).to(device) for part in self[:-1])
        return Batch(tokens, document, position, own, place, anchors, self.block)


def block_loss(draft, teacher: Teacher, batch: Batch, settings: DrafterTraining):
    """Weighted loss of all blocks of a batch and the mean accepted length they would have had on the true text; see `losses.slots_loss`."""
    from ..models.dflash.training import training_hidden

    tokens, anchors, block = batch.tokens, batch.anchors, batch.block
    features, last = teacher.of(batch)
    hidden = training_hidden(draft, features, tokens, anchors, block, batch.document, batch.position)[:, :, 1:]
    return slots_loss(hidden, last, teacher, batch, settings, getattr(draft, "candidate_selector", None))


def _batches(
    own: Documents, corpus: np.ndarray | None, settings: DrafterTraining | MtpTraining, whole_rows: bool, start: int
) -> Iterator[Batch]:
    """Endless global batches: `own_text` of the rows from the target's responses, the rest true text out of the corpus (if there is one)."""
    length = settings.seq_len
    source = rows_of(own, length, settings.seed, whole_rows)
    per_batch = settings.batch_size if corpus is None else round(settings.batch_size * settings.own_text)
    for step in itertools.count():
        rng = np.random.default_rng((settings.seed, 7, step))
        chosen = [next(source) for _ in range(per_batch)]
        if corpus is not None:
            for begin in rng.integers(0, corpus.size - length, settings.batch_size - per_batch):
                chosen.append([Text(corpus[begin : begin + length], np.ones(length, dtype=bool))])
        if step >= start:
            yield _batch(chosen, length, int(rng.choice(settings.block_sizes)), settings.anchors, rng)


def _batch(chosen: list, length: int, block: int, anchors: int, rng: np.random.Generator) -> Batch:
    rows = Rows.of(chosen, length)
    arrays = (rows.tokens, rows.document, rows.position, rows.own, rows.place, rows.anchors(anchors, rng))
    tokens, document, position, own, place, chosen_anchors = (torch.from_numpy(array) for array in arrays)
    return Batch(tokens, document, position, own, place, chosen_anchors, block)


@torch.no_grad()
def held_out_report(
    draft, teacher: Teacher, kept: Documents, settings, whole_rows: bool, where, autocast: bool, loss_of=block_loss
):
    """Loss and tau at random anchors of texts that nothing is trained on, by category. Tau in the loop is lower: `train report`."""
    report = {}
    for category in sorted(set(kept.categories)):
        own = kept.only([i for i, c in enumerate(kept.categories) if c == category])
        source = rows_of(own, settings.seq_len, settings.seed, whole_rows)
        wanted = (
            min(_HELD_OUT_ROWS, len(own))
            if whole_rows
            else min(_HELD_OUT_ROWS, 1 + int(own.lengths().sum()) // settings.seq_len)
        )
        losses, taus = [], []
        for r in range(wanted):
            batch = _batch(
                [next(source)],
                settings.seq_len,
                settings.block_size,
                settings.anchors,
                np.random.default_rng((settings.seed, r)),
            )
            with torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast):
                # Nothing of these texts is stored, and their places are not those of the texts to train on.
                batch = batch._replace(place=torch.full_like(batch.place, -1))
                loss, tau = loss_of(draft, teacher, batch.on(Group(), where), settings)
            losses.append(float(loss))
            taus += [] if math.isnan(tau) else [tau]
        report[category or "all"] = {
            "texts": len(own), "loss": float(np.mean(losses)), "random_anchor_tau": float(np.mean(taus)) if taus else None
        }  # fmt: skip
    return report


def train(
    settings: DrafterTraining,
    target_path: str | Path,
    own_path: Path,
    data: Path | None,
    out: Path,
    device: str = "auto",
    save_every: int = 250,
    autocast: bool | None = None,
    store: Path | None = None,
    shard_target: bool = False,
    minutes: float | None = None,
) -> dict:
    """Trains to the end, resuming from ``out/checkpoint.pt``; writes the drafter as a DFlash checkpoint; returns the report.

    With `minutes`, it stops after the step that ends behind them, at least one step further, and writes checkpoint and drafter as they are
    then; called again, it goes on. `steps` of the report are those done. With `store`, a folder, what the target makes of the responses is computed once and kept there: see `features.StoredFeatures`.
    With `shard_target`, every process of ``torchrun`` holds its part of the target's layers: see `shard`; the numbers are the same.
    """
    places = (target_path, own_path, data, out)
    return run(settings, _begin, block_loss, *places, device, save_every, autocast, store, shard_target, minutes)


def shard(target, group: Group) -> None:
    """Spreads the weights of a target's layers over the processes of a group (FSDP2): each gathers a layer's when it comes to it, and gives
    them back behind it. Embedding, last norm and head stay whole, since the drafter and its loss read them. Every process has to run every pass
    of the target from now on. Raises ValueError without other processes to share with."""
    if group.size == 1:
        raise ValueError(
            "shard_target: got one process, expected several: torchrun --nproc-per-node N -m dflash_rs.train ..."
        )
    from torch.distributed.fsdp import fully_shard

    target.requires_grad_(False)
    for layer in base_layers(target):
        fully_shard(layer)


def _begin(target, settings: DrafterTraining, sample: torch.Tensor):
    """A drafter to begin with."""
    from ..models.dflash import DFlashDraft
    from ..models.dflash2 import DFlash2Draft

    kind = DFlash2Draft if settings.selector_rank else DFlashDraft
    draft = kind(draft_config(target.config.get_text_config(), settings))
    warm_start(draft, target, sample)
    return draft


def run(
    settings: DrafterTraining | MtpTraining,
    begin: Callable[[Any, Any, torch.Tensor], Any],
    loss_of: Callable[..., tuple[torch.Tensor, float]],
    target_path: str | Path,
    own_path: Path,
    data: Path | None,
    out: Path,
    device: str,
    save_every: int,
    autocast: bool | None,
    store: Path | None = None,
    shard_target: bool = False,
    minutes: float | None = None,
) -> dict:
    """The training of any drafter: `begin(target, settings, tokens)` makes it, `loss_of` is a `block_loss`. Otherwise see `train`."""
    limit = Limit(minutes)
    where = pick_device(device)
    group = Group.join(where)
    autocast = where.type == "cuda" if autocast is None else autocast
    target, own, kept = _what_it_learns_from(settings, target_path, own_path, autocast)
    corpus_tokens = None if data is None else np.load(data / "train.npy")

    torch.manual_seed(settings.seed)
    draft = begin(target, settings, next(_batches(own, corpus_tokens, settings, True, 0)).tokens[:4])
    target.to(where)
    if shard_target:
        shard(target, group)
    _bind(draft, target, settings, where)
    narrowed = _narrow(draft, target, own, settings, where, group)
    teacher = Teacher(target, settings.tap_ids, settings.mask_token_id)
    whole_rows = not teacher.keeps_documents_apart(where)
    if whole_rows and group.leads:
        print("documents in one row would disturb each other in this target: every row holds one", file=sys.stderr)
    if store is not None:
        if data is not None:
            raise ValueError(
                "store_features: got a corpus, too; what is stored is of responses, a corpus has new windows in every step"
            )
        about = {"target": str(target_path), "taps": list(settings.tap_ids)}
        teacher.stored = StoredFeatures.capture(store, own, teacher, settings.seq_len, whole_rows, about, group, where)

    # Before the first step: what a run makes is not to be lost for want of a place.
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    optimizers, begun, history = _resumed(draft, settings, path)
    progress = Progress(settings.steps, "steps")
    warmup = max(1, int(settings.steps * settings.warmup))
    source = _batches(own, corpus_tokens, settings, whole_rows, begun)
    mean_loss, mean_tau = None, None
    step, stops = begun, False
    while step < settings.steps and not stops:
        step += 1
        batch = next(source).on(group, where)
        teacher.columns = None if narrowed is None else narrowed.at(step)
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast):
            loss, tau = loss_of(draft, teacher, batch, settings)
        loss.backward()
        group.average_gradients(draft)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizers.step(cosine(step - 1, settings.steps, warmup))
        mean_loss = smooth(mean_loss, finite(loss, step, path), step - begun)
        mean_tau = mean_tau if math.isnan(tau) else smooth(mean_tau, tau, step - begun)
        stops = limit.over(group)
        saves = step % save_every == 0 or step == settings.steps or stops
        if saves and (group.leads or shard_target):
            teacher.columns = None if narrowed is None else narrowed.proposed()
            held_out = held_out_report(draft, teacher, kept, settings, whole_rows, where, autocast, loss_of)
        if saves and group.leads:
            history.append({"step": step, "loss": mean_loss, "random_anchor_tau": mean_tau, "held_out": held_out})
            save_checkpoint(path, _state(draft, settings, optimizers, step, history))
        if group.leads:
            text = f"loss {mean_loss:.3f}  random-anchor tau {mean_tau or math.nan:.2f}"
            progress.show(step, text, force=saves)

    report = {"steps": step, "sequences": step * settings.batch_size, "history": history}
    if group.leads:
        export(draft, out, {"settings": asdict(settings), "report": report})
    return report


def _what_it_learns_from(
    settings: DrafterTraining | MtpTraining, target_path: str | Path, own_path: Path, autocast: bool
):
    """The target, the responses that are learnt from and those kept apart, held against each other and the settings."""
    from ..models.checkpoint import load_causal_lm

    target = load_causal_lm(target_path, torch.bfloat16 if autocast else torch.float32)[0]
    config = target.config.get_text_config()
    settings.check(config.num_hidden_layers, config.vocab_size)
    own, kept = responses.load(own_path).split()
    if len(own) and int(own.tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"responses: {own_path} holds token {int(own.tokens.max())}, expected 0..{config.vocab_size - 1}, those of the target"
        )
    return target, own, kept


def _bind(draft, target, settings: DrafterTraining | MtpTraining, where: torch.device) -> None:
    """Gives the drafter the weights to go on from, and the target's embedding and head."""
    from ..models.checkpoint import readable
    from ..models.loader import load_draft

    if settings.init_from:
        other = load_draft(settings.init_from)
        with readable(settings.init_from, "init_from"):
            _go_on_from(draft, other)
    draft.to(where).bind_target(target.get_input_embeddings(), target.get_output_embeddings())


def _go_on_from(draft, other) -> None:
    """Takes another drafter's weights over; a DFlash 2 those of a DFlash, too, and what is its own stays as it begins."""
    if not issubclass(type(draft), type(other)):
        kind = draft.config.architecture
        raise ValueError(
            f"init_from: got a {other.config.architecture}, expected a {kind}, which is what is trained here"
        )
    draft.load_state_dict(draft.state_dict() | other.state_dict())


def _narrow(
    draft, target, own: Documents, settings: DrafterTraining | MtpTraining, where: torch.device, group: Group
) -> Narrowed | None:
    """Tells the drafter which tokens it will propose, if they are not all."""
    draft.vocabulary = None
    if not settings.draft_vocab:
        return None
    narrowed = Narrowed(target, own, settings, where)
    draft.vocabulary = narrowed.tokens
    if group.leads:
        print(
            f"the drafter proposes {len(narrowed.tokens):,} tokens, {100 * narrowed.share:.2f} % of what the target wrote",
            file=sys.stderr,
        )
    return narrowed


def _resumed(draft, settings: DrafterTraining | MtpTraining, path: Path) -> tuple[Optimizers, int, list[dict]]:
    """Optimisers, steps done and history of the run whose checkpoint is at `path`, or of one that begins."""
    optimizers = Optimizers(draft, settings.lr, settings.weight_decay, matrices_outside=_NOT_MATRICES)
    state = resumed(path, settings)
    if state is None:
        return optimizers, 0, []
    draft.load_state_dict(state["draft"])
    optimizers.load_state_dict(state["optimizers"])
    return optimizers, state["step"], state["history"]


def _state(
    draft, settings: DrafterTraining | MtpTraining, optimizers: Optimizers, step: int, history: list[dict]
) -> dict:
    return {
        "settings": asdict(settings),
        "step": step,
        "history": history,
        "draft": draft.state_dict(),
        "optimizers": optimizers.state_dict(),
    }


def export(draft, out: Path, notes: dict) -> None:
    """Writes the drafter as a checkpoint in bf16, with the notes of its training."""
    from ..models.loader import save_draft

    save_draft(draft, out, dtype=torch.bfloat16)
    (out / "training.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")

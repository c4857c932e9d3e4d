"""What blocks are trained by: every slot is held against what its target would have said there.

    hidden of n slots --> the target's head --> logits --> against the target's own law (or the token)      every drafter
                                                  |-> likeliest K --> selector --> against the same, of these K     DFlash 2

A selector learns what the logits of a slot cannot know: which token came before. Its loss leaves the logits alone, so what lies under it stays a
drafter that predicts every slot by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .settings import DrafterTraining, MtpTraining

if TYPE_CHECKING:
    from ..models.dflash2 import Selector
    from .drafter import Batch, Teacher

# Rows whose logits exist at a time: a few hundred rows of a large vocabulary are a few hundred megabytes.
_ROWS_AT_A_TIME = 256


class Labelled(NamedTuple):
    """What n slots should predict: the target's hidden states there [n, H], the tokens that came [n], and what a slot weighs [n]."""

    before: torch.Tensor
    truth: torch.Tensor
    weight: torch.Tensor


class Likeliest(NamedTuple):
    """The K likeliest predictions of n slots (int64, named as `Labelled.truth` is), their logits, and what of the label is theirs: [n, K]."""

    picked: torch.Tensor
    logits: torch.Tensor
    label: torch.Tensor


def head_loss(
    teacher: Teacher, hidden: torch.Tensor, labelled: Labelled, soft: float, k: int = 1
) -> tuple[torch.Tensor, Likeliest]:
    """Sum of the slots' weighted losses, differentiable in `hidden` [n, H], and each slot's k likeliest predictions.

    Logits of all slots never exist at once, forward or backward: the head is frozen, so the gradient of every group of rows is taken while
    its logits are there. `soft` is the weight of the target's own law as label, the rest is on the token.
    """
    loss = torch.zeros((), device=hidden.device)
    gradient, likeliest = torch.zeros_like(hidden), []
    for begin in range(0, len(hidden), _ROWS_AT_A_TIME):
        span = slice(begin, begin + _ROWS_AT_A_TIME)
        before, truth, weight = (part[span] for part in labelled)
        leaf = hidden[span].detach().requires_grad_(hidden.requires_grad)
        with torch.set_grad_enabled(hidden.requires_grad):
            scores = teacher.scores(leaf)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            # As few passes over rows of a whole vocabulary as there can be: on a CPU they take longer than the products.
            logits = teacher.without_mask(scores.float(), -math.inf)
            largest = logits.max(-1)
            probabilities = logits.softmax(-1)
            total = largest.values - probabilities.gather(1, largest.indices[:, None])[:, 0].log()
            proposed = logits if teacher.columns is None else logits[:, : teacher.columns.proposed]
            # The first of equals, which topk does not promise.
            picked = proposed.argmax(-1, keepdim=True) if k == 1 else proposed.topk(k).indices
            its_logits = logits.gather(1, picked)
            teacher.without_mask(logits, 0.0)
            if soft > 0:
                label = teacher.law(before)
                if soft < 1:
                    label.mul_(soft).scatter_add_(1, truth[:, None], torch.full_like(total, 1 - soft)[:, None])
                its_label = label.gather(1, picked)
                probabilities.sub_(label)
                expected = label.mul_(logits).sum(-1)
            else:
                its_label = (picked == truth[:, None]).float()
                expected = logits.gather(1, truth[:, None])[:, 0]
                probabilities.scatter_add_(
                    1, truth[:, None], -torch.ones_like(truth, dtype=probabilities.dtype)[:, None]
                )
            likeliest.append(Likeliest(picked, its_logits, its_label))
            loss += ((total - expected) * weight).sum()
        if hidden.requires_grad:
            slope = probabilities.mul_(weight[:, None]).to(scores.dtype)
            (gradient[span],) = torch.autograd.grad(scores, leaf, slope)
    whole = Likeliest(*(torch.cat(parts) for parts in zip(*likeliest, strict=True))) if likeliest else _nothing(hidden)
    return _WithGradient.apply(hidden, loss, gradient), whole


def _nothing(hidden: torch.Tensor) -> Likeliest:
    empty = torch.empty(0, 1, device=hidden.device)
    return Likeliest(empty.long(), empty, empty)


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx, hidden, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None


def selector_loss(
    selector: Selector,
    hidden: torch.Tensor,
    last: torch.Tensor,
    likeliest: Likeliest,
    tokens: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the slots' weighted losses of a DFlash 2's selector, and which candidate of each slot it takes, int64 [n].

    hidden [n, H]: rows of the slots; last int64 [n]: the true tokens before them, which a chain that got as far has drafted; tokens int64 [n, K]: the
    candidates `likeliest` by their ids in the vocabulary. What of the label is on none of a slot's candidates teaches nothing.
    """
    scores = selector.scores(selector.hidden_projection(hidden), last, tokens, likeliest.logits)
    loss = -(likeliest.label * scores.log_softmax(-1)).sum(-1)
    return (loss * weight).sum(), scores.argmax(-1)


def slots_loss(
    hidden: torch.Tensor,
    last: torch.Tensor,
    teacher: Teacher,
    batch: Batch,
    settings: DrafterTraining | MtpTraining,
    selector: Selector | None = None,
) -> tuple[torch.Tensor, float]:
    """The loss of a batch's blocks and the mean accepted length they would have had on the true text, for whoever predicts blocks.

    hidden [b, A, block - 1, H] of the slots behind the anchors; `last` [b, S, H] what the target's head reads. Slot k weighs
    ``exp(-(k-1)/gamma)``, and nothing where the document is over or the token is not the target's own; normalised.
    """
    tokens, anchors, block = batch.tokens, batch.anchors, batch.block
    length = tokens.shape[1]
    where = anchors[..., None] + torch.arange(1, block, device=tokens.device)  # [b, A, B-1]
    flat = where.clamp(max=length - 1).flatten(1)

    def at(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, flat).view_as(where)

    document = batch.document.gather(1, anchors)[..., None]
    counts = (where < length) & (at(batch.document) == document) & (document >= 0) & at(batch.own)
    # A slot behind one that does not count is never reached.
    counts = counts.int().cumprod(-1).bool()
    whole = counts.all(-1)
    truth = at(tokens)
    if teacher.columns is not None:
        # Nor is one behind a token that is not proposed: the draft ends there whatever is learnt.
        truth = teacher.columns.of(truth)
        counts = (counts & (truth >= 0)).int().cumprod(-1).bool()
    weights = torch.exp(-torch.arange(block - 1, device=tokens.device) / settings.gamma) * counts
    before = last.gather(1, (flat - 1)[..., None].expand(-1, -1, last.shape[-1]))
    chosen = counts.flatten()
    labelled = Labelled(before.flatten(0, 1)[chosen], truth.flatten()[chosen], weights.flatten()[chosen])
    rows = hidden.flatten(0, 2)[chosen]
    loss, likeliest = head_loss(
        teacher, rows, labelled, settings.soft_labels, 1 if selector is None else selector.top_k
    )
    taken = likeliest.picked[:, 0]
    if selector is not None:
        # Of no row at all, too: where processes share the work, all of them have a gradient for every weight or none has.
        ids = likeliest.picked if teacher.columns is None else teacher.columns.tokens[likeliest.picked]
        behind = tokens.gather(1, flat - 1).flatten()[chosen]
        more, index = selector_loss(selector, rows, behind, likeliest, ids, labelled.weight)
        loss, taken = loss + more, likeliest.picked.gather(1, index[:, None])[:, 0]
    with torch.no_grad():
        hits = torch.zeros_like(chosen).masked_scatter(chosen, taken == labelled.truth).view_as(where)
        accepted = hits.int().cumprod(-1).sum(-1)[whole].float()
    return loss / weights.sum().clamp(min=1e-9), 1 + float(accepted.mean()) if len(accepted) else math.nan

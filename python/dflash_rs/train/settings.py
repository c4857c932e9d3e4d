"""Everything that determines a training, in plain numbers: known without torch, so that ``--help`` can tell the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

PLAIN, HYBRID = "qwen3", "qwen3_5_moe"
SHAPES = (PLAIN, HYBRID)
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TargetTraining:
    """Everything that determines a run; written beside the weights. Lengths in tokens, `tokens` is the whole budget.

    Experts and `linear_` sizes are those of the shape `qwen3_5_moe`, whose layers have no plain MLP of `intermediate_size`. `teacher` is a model
    of the same vocabulary whose law is `teacher_share` of the label, the token the rest. `init_from` goes on from a model of this very form,
    `start_from` takes over what fits of one of the shape `qwen3`.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 10
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    start_layers: int = 0
    grow_at: float = 0.5
    tokens: int = 20_000_000
    seq_len: int = 256
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay: float = 0.35
    seed: int = 0
    max_position_embeddings: int = 1024
    init_from: str = ""
    shape: str = "qwen3"
    num_experts: int = 4
    experts_per_token: int = 2
    expert_size: int = 64
    shared_expert_size: int = 128
    balance: float = 0.01
    linear_key_heads: int = 2
    linear_value_heads: int = 4
    linear_head_dim: int = 32
    start_from: str = ""
    teacher: str = ""
    teacher_share: float = 0.75

    @property
    def steps(self) -> int:
        return self.tokens // (self.seq_len * self.batch_size)

    def layers_at(self, step: int) -> int:
        growing = self.start_layers and step < int(self.steps * self.grow_at)
        return self.start_layers if growing else self.num_layers

    def check(self) -> None:
        """Raises ValueError naming the first setting that cannot work."""
        if self.steps < 1:
            raise ValueError(
                f"tokens: got {self.tokens}, expected at least one batch ({self.seq_len * self.batch_size})"
            )
        if self.start_layers and self.num_layers % self.start_layers:
            raise ValueError(
                f"start_layers: got {self.start_layers}, expected a divisor of num_layers={self.num_layers}"
            )
        if not 0 < self.grow_at < 1:
            raise ValueError(f"grow_at: got {self.grow_at}, expected a share in (0, 1)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of num_heads={self.num_heads}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape: got {self.shape!r}, expected {' or '.join(SHAPES)}")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share: got {self.teacher_share}, expected a share in [0, 1]")
        if self.init_from and self.start_from:
            raise ValueError(
                f"start_from: got {self.start_from!r} beside init_from={self.init_from!r}, expected one of them"
            )
        self._check_hybrid() if self.shape == HYBRID else self._check_plain()

    def _check_plain(self) -> None:
        if self.start_from:
            raise ValueError(
                f"start_from: got {self.start_from!r} with shape={self.shape!r}, expected init_from, or shape={HYBRID!r}"
            )

    def _check_hybrid(self) -> None:
        if self.start_layers:
            raise ValueError(
                f"start_layers: got {self.start_layers}, expected 0 with shape={HYBRID!r}: its layers are not all of a kind"
            )
        if self.num_layers < 4:
            raise ValueError(
                f"num_layers: got {self.num_layers}, expected at least 4 with shape={HYBRID!r}: every fourth attends"
            )
        for name in ("expert_size", "shared_expert_size", "linear_key_heads", "linear_value_heads", "linear_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token: got {self.experts_per_token}, expected 1..{self.num_experts}, the number of experts"
            )
        if self.linear_value_heads % self.linear_key_heads:
            raise ValueError(
                f"linear_value_heads: got {self.linear_value_heads}, expected a multiple of linear_key_heads={self.linear_key_heads}"
            )
        if self.balance < 0:
            raise ValueError(f"balance: got {self.balance}, expected a weight of at least 0")


@dataclass(frozen=True)
class ResponseSettings:
    """How many sequences, how long (tokens, prompt included), and how they are sampled. `turns` are answers of a chat whose user is the
    target, too; `openings` names a file of beginnings of user's messages."""

    sequences: int = 20_000
    seq_len: int = 256
    min_prompt: int = 16
    max_prompt: int = 64
    temperatures: str = "0.4,0.6,0.8,1.0"
    batch_size: int = 128
    turns: int = 1
    openings: str = ""
    seed: int = 1

    def check(self) -> None:
        if not 1 <= self.min_prompt <= self.max_prompt < self.seq_len:
            raise ValueError(
                f"min_prompt, max_prompt: got {self.min_prompt}, {self.max_prompt}, "
                f"expected 1 <= min_prompt <= max_prompt < seq_len={self.seq_len}"
            )
        for name in ("sequences", "batch_size", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not all(t > 0 for t in self.temperature_list):
            raise ValueError(f"temperatures: got {self.temperatures!r}, expected values above 0")

    @property
    def temperature_list(self) -> list[float]:
        return _numbers("temperatures", self.temperatures, float)


def _numbers(name: str, text: str, kind: type[_Number]) -> list[_Number]:
    """The numbers of a setting that is a list with commas."""
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name}: got {text!r}, expected {what} with commas between them") from None


def _check_steps(settings: DrafterTraining | MtpTraining) -> None:
    """What the trainings of all drafters ask of their settings."""
    for name in ("steps", "batch_size", "anchors"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected at least 1")
    if settings.seq_len <= settings.block_size:
        raise ValueError(f"seq_len: got {settings.seq_len}, expected more than block_size {settings.block_size}")
    for name in ("gamma", "lr"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected a finite number above 0")
    for name in ("own_text", "soft_labels"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected a share in [0, 1]")
    if not 0 <= settings.warmup <= 1:
        raise ValueError(f"warmup: got {settings.warmup}, expected a share in [0, 1]")


@dataclass(frozen=True)
class DrafterTraining:
    """Everything that determines a run. `taps` are target layers whose outputs feed the drafter; lengths in tokens. Of `draft_vocab`, the number
    of tokens that it will propose (0 for all), see `vocabulary.py`. With a `selector_rank`, it is a DFlash 2, whose shape the settings behind it
    tell, too: see `models.dflash2.DFlash2Config`."""

    taps: str = "1,3,5,7,8"
    num_layers: int = 2
    block_size: int = 8
    train_block_sizes: str = "8"
    mask_token_id: int = 1
    steps: int = 4000
    batch_size: int = 8
    anchors: int = 64
    own_text: float = 0.75
    soft_labels: float = 1.0
    seq_len: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.04
    gamma: float = 4.0
    seed: int = 2
    init_from: str = ""
    intermediate_size: int = 0
    draft_vocab: int = 0
    sampled_vocab: int = 2048
    selector_rank: int = 0
    selector_top_k: int = 16
    conv_kernel_size: int = 2
    conv_group_size: int = 64

    @property
    def tap_ids(self) -> tuple[int, ...]:
        return tuple(_numbers("taps", self.taps, int))

    @property
    def block_sizes(self) -> list[int]:
        return _numbers("train_block_sizes", self.train_block_sizes, int)

    def check(self, num_target_layers: int, vocab_size: int) -> None:
        """Raises ValueError naming the first setting that cannot work with this target."""
        # The last layer's output is handed out normalised by some model code and raw by other: it is no safe tap.
        bad = [t for t in self.tap_ids if not 0 <= t < num_target_layers - 1]
        if bad:
            raise ValueError(f"taps: got {bad[0]}, expected layers 0..{num_target_layers - 2}, below the target's last")
        if self.block_size < 2:
            raise ValueError(f"block_size: got {self.block_size}, expected at least 2")
        if not all(2 <= size <= self.block_size for size in self.block_sizes):
            raise ValueError(
                f"train_block_sizes: got {self.train_block_sizes}, expected 2..{self.block_size} each, the last is block_size"
            )
        if len(set(self.tap_ids)) < len(self.tap_ids):
            raise ValueError(f"taps: got {self.taps}, expected every layer once")
        if not 1 <= self.num_layers <= num_target_layers:
            raise ValueError(f"num_layers: got {self.num_layers}, expected 1..{num_target_layers}, as the target has")
        _check_steps(self)
        if self.intermediate_size < 0:
            raise ValueError(f"intermediate_size: got {self.intermediate_size}, expected at least 0")
        if not 0 <= self.mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id: got {self.mask_token_id}, expected 0..{vocab_size - 1}")
        self._check_selector(vocab_size)

    def _check_selector(self, vocab_size: int) -> None:
        if self.selector_rank < 0:
            raise ValueError(f"selector_rank: got {self.selector_rank}, expected 0 for a DFlash, or at least 1")
        if not self.selector_rank:
            return
        proposed = self.draft_vocab or vocab_size - 1
        if not 2 <= self.selector_top_k <= proposed:
            raise ValueError(
                f"selector_top_k: got {self.selector_top_k}, expected 2..{proposed}, the tokens that are proposed"
            )
        for name in ("conv_kernel_size", "conv_group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class MtpTraining:
    """Everything that determines the training of an MTP head; lengths in tokens. It is unrolled `block_size - 1` times."""

    block_size: int = 8
    steps: int = 4000
    batch_size: int = 8
    anchors: int = 64
    own_text: float = 0.75
    soft_labels: float = 1.0
    seq_len: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.04
    gamma: float = 4.0
    seed: int = 2
    init_from: str = ""
    draft_vocab: int = 0
    sampled_vocab: int = 2048

    # What a drafter's training asks of its settings and a head has none of: taps below the target's last state, and a token that masks.
    tap_ids: ClassVar[tuple[int, ...]] = ()
    mask_token_id: ClassVar[None] = None

    @property
    def block_sizes(self) -> list[int]:
        return [self.block_size]

    def check(self, num_target_layers: int, vocab_size: int) -> None:
        """Raises ValueError naming the first setting that cannot work."""
        if self.block_size < 2:
            raise ValueError(f"block_size: got {self.block_size}, expected at least 2")
        _check_steps(self)

"""SGLang's DFLASH worker at another block length, for one step.

Its step reads the block length from an attribute, and works in buffers that were made for it. So a narrower step is the same code
with those attributes exchanged: each width has a set of its own, and between steps the worker is as SGLang made it. Room for a whole
block stays reserved whatever the width.

Attention backends and CUDA graphs are made for one number of tokens per request, too. Each width has its own of both, for the target and
for the drafter, made as SGLang's EAGLE worker makes them for its own adaptive steps.

A step of width 1 is a plain one, see ``plain``: its block is the anchor alone, so there is nothing to draft.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from dflash_rs.sglang import compat

# Made anew by the worker's step when they are None or their capacity is 0.
_ROOM = {
    "_draft_block_ids_buf": None,
    "_draft_block_positions_buf": None,
    "_draft_block_tokens_buf": None,
    "_draft_verify_out_cache_loc_buf": None,
    "_draft_block_end_buf": None,
    "_draft_seq_lens_cpu_buf": None,
    "_accept_bonus_buffer_cap": 0,
    "_accept_bonus_buffer_slot": 0,
    "_accept_len_buf": None,
    "_commit_lens_bufs": (),
    "_bonus_id_bufs": (),
    "_out_tokens_bufs": (),
    "_new_seq_lens_bufs": (),
}
# Everything a block length is written into.
SHAPED = ("block_size", "_block_pos_offsets", "_draft_block_spec_info", "_draft_sampler", *_ROOM)
# The same of a model runner.
PASSES = ("attn_backend", "decode_cuda_graph_runner")


class Shapes:
    """One set of attributes for each width, of the worker and of the two model runners."""

    def __init__(self, worker: Any, widths: Sequence[int], drafted_only: Collection[int] = ()):
        """`drafted_only`: those of the widths that the target never runs."""
        self.worker, self.whole, self.drafted_only = worker, int(worker.block_size), drafted_only
        # A DFlash 2's convolutions run within blocks, and have the length written down for themselves.
        self._convolved = worker.draft_model if compat.installed().selects(worker) else None
        self.sets = {width: self._narrow(width) for width in widths if width != self.whole}
        self.passes: dict[int, list[tuple[Any, dict[str, Any]]]] = {width: [] for width in self.sets}

    def _narrow(self, width: int) -> dict[str, Any]:
        return {
            "block_size": width,
            "_block_pos_offsets": self.worker._block_pos_offsets[:width],
            "_draft_block_spec_info": compat.installed().block_spec(width, self.worker.device),
            "_draft_sampler": None,
            **_ROOM,
        }

    def make_passes(self) -> None:
        """Attention backends for every width, and CUDA graphs where SGLang has captured some for whole blocks. Called once SGLang has."""
        target, draft = self.worker.model_runner, self.worker.draft_model_runner
        # The widest first: what it has room for the others share.
        for width in sorted(self.sets, reverse=True):
            with self.of(width), compat.installed().sized_for(width):
                made = []
                if width not in self.drafted_only:
                    made.append((target, compat.installed().own_pass(target, width)))
                if width > 1:
                    with compat.installed().for_drafter(self.worker):
                        made.append((draft, compat.installed().own_pass(draft, width, self.worker)))
            self.passes[width] = made

    @contextlib.contextmanager
    def of(self, width: int) -> Iterator[None]:
        """The worker has this width within the context."""
        if width == self.whole:
            yield
            return
        own = vars(self.worker)
        before = {name: own[name] for name in SHAPED}
        runners = (self.worker.model_runner, self.worker.draft_model_runner)
        passes = [(runner, {name: getattr(runner, name) for name in PASSES}) for runner in runners]
        own.update(self.sets[width])
        try:
            _give(self.passes[width])
            with self._convolving(width):
                yield
        finally:
            # What the step has made anew is kept for the next one of this width.
            self.sets[width] = {name: own[name] for name in SHAPED}
            own.update(before)
            _give(passes)

    @contextlib.contextmanager
    def _convolving(self, width: int) -> Iterator[None]:
        if self._convolved is None or width == 1:
            yield
            return
        before = int(self._convolved.block_size)
        self._convolved.set_block_size(width)
        try:
            yield
        finally:
            self._convolved.set_block_size(before)


def _give(passes: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    for runner, values in passes:
        for name, value in values.items():
            setattr(runner, name, value)

"""The worker: SGLang's DFLASH worker drafts, runs the target and injects KV; what is kept of a block is decided here.

A step, in SGLang's order; ours are the lines marked *::

    room for the block          planning.DraftInput.prepare_for_decode   *
    how wide this step is       widths.Widths, shapes.Shapes             *
    draft, verify               DFlashWorkerV2.forward_batch_generation
    what a sampler is drafted   coupled.Couplings, by the target's numbers   *  (with CUDA graphs: folded, from what they leave)
    grammar mask                the same, behind SGLang's barrier
    the target's own tokens     _accept_block -> sampling.TargetSampler  *
    walk the drafts             _accept_block -> kernels.Walk            *  (on a CPU: dflash_rs.verify.walk)
    trees in place of the chain _tree_step -> trees.Step                 *  from the drafter's candidates to the path that is kept
    publish, log-probabilities  DFlashWorkerV2
    inject draft KV             deferred.Deferred -> kernels.ContextKv   *  (on a CPU: DFlashWorkerV2)
    count                       on_verify_complete_cpu -> widths, metrics  *

Between forward_batch_generation and _accept_block, SGLang's code sees sampling parameters with nothing left to adjust: it would
apply them in another order, and without penalties.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from dflash_rs import InvalidArgument, cuda, verify
from dflash_rs.sglang import ALGORITHM, algorithm, compat, config, drafter, plain, planning, states
from dflash_rs.sglang.coupled import Couplings, Drawn, Seeded
from dflash_rs.sglang.deferred import Deferred
from dflash_rs.sglang.folded import Chosen, Lattices, Logits
from dflash_rs.sglang.kernels import ContextKv, Draws, PathKv, Walk
from dflash_rs.sglang.limits import Limits
from dflash_rs.sglang.metrics import Acceptance, Exporter
from dflash_rs.sglang.sampling import TargetSampler, bare, put
from dflash_rs.sglang.shapes import PASSES, SHAPED, Shapes
from dflash_rs.sglang.trees import Recorded, Step, is_plain
from dflash_rs.sglang.widths import Widths, over

logger = logging.getLogger(__name__)


class DflashRsWorker(compat.installed().worker_class()):  # type: ignore[misc]  # SGLang's, known when it runs
    """``DFLASH_RS``: the tokens of SGLang without speculation, several per pass of the target."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **kwargs: Any):
        algorithm.require_registered()
        self.options = config.load()
        compat.check(self.options.allow_untested_sglang)
        super().__init__(
            server_args=server_args, gpu_id=gpu_id, nccl_port=nccl_port, target_worker=target_worker, **kwargs
        )
        self._check_drafter()
        runner = self.model_runner
        context = int(runner.model_config.context_len)
        if 2 * int(self.block_size) > context:
            named, less = ("tree_nodes", 1) if self.options.tree_nodes else ("--speculative-num-draft-tokens", 0)
            raise InvalidArgument(
                f"{named}: got {self.block_size - less}, expected at most {context // 2 - less}: a request reserves room for two "
                f"{'trees with their anchors' if less else 'blocks'} within the context of {context} tokens"
            )
        # With trees SGLang's own block has room for all nodes; the drafter's is shorter.
        self._block, self._nodes = int(self.block_size), 0
        if self.options.tree_nodes:
            args = compat.installed().resolved(server_args)
            self._block, self._nodes = int(args.speculative_dflash_block_size), int(self.block_size)
            self.draft_model.set_block_size(self._block)
        self._tree: Step | None = None
        self._tree_pass: dict[str, Any] = {}
        self._moves: PathKv | None = None
        self._has_kernels = False
        compat.installed().follow_all_drafts(self)
        self._targets: TargetSampler | None = None
        self._couplings: Couplings | None = None
        # The target's random numbers of the running step, where drafts are to share them.
        self._coupled: Seeded | Drawn | None = None
        # Where the drafter's graphs leave logits.
        self._draft_logits: torch.Tensor | None = None
        # The requests of the running call, their rows of the request pool and their sampling parameters.
        self._reqs: list[Any] = []
        self._slots: torch.Tensor | None = None
        self._info: Any = None
        self._scored = False
        # Most drafts of each of them, None where none is limited.
        self._limits = Limits(self._block, self.options.max_drafts, self.options.max_draft_context)
        self._most: list[int] | None = None
        self._on_host = torch.device(self.device).type == "cpu"
        self._walk_kernel: Walk | None = None
        # Accepted and gained by each request of a plain step.
        self._plain_lengths = (torch.empty(0, dtype=torch.int32),) * 2
        self._context_kv: ContextKv | None = None
        self._deferred = Deferred(super()._append_target_hidden_to_draft_kv_by_loc, steps=0)
        # Until the attention backends are there, which may not serve other widths than the block.
        self._widths = Widths([self.block_size])
        self._shapes = Shapes(self, [self.block_size])
        exporter = None
        if self.options.metrics and compat.installed().counts() and compat.installed().metrics_enabled(server_args):
            labels = {
                "model_name": compat.installed().served_model_name(server_args)
            } | compat.installed().data_parallel_rank(self)
            exporter = Exporter(self._block, labels, widths=self.options.widths_of(self._block))
        self.acceptance = Acceptance(
            self._block, self.options.alarm_tau, self.options.alarm_passes, exporter, self._adapter_name
        )
        if self._target_tp_rank == 0:
            logger.info("%s: block %d, %s, sglang %s", ALGORITHM, self._block, self.options, compat.version())
            logger.debug("%s: vocabulary %d", ALGORITHM, runner.model_config.vocab_size)

    def _adapter_name(self, adapter: str) -> str:
        """Of the target's adapter that SGLang calls by this id."""
        known = getattr(getattr(self.model_runner, "lora_manager", None), "lora_refs", {})
        return getattr(known.get(adapter), "lora_name", None) or adapter

    def _check_drafter(self) -> None:
        remarks = drafter.check(
            compat.installed().draft_model_path(self.server_args),
            self.draft_model_runner.model_config.hf_config,
            self.model_runner.model_config.hf_config,
            self.draft_model,
        )
        for remark in remarks:
            logger.warning("%s: %s", ALGORITHM, remark)

    def init_attention_backends(self) -> None:
        """SGLang's, and with them what is known of which widths a step can have."""
        super().init_attention_backends()
        states.check(*compat.installed().state_types(self), self.model_runner.dtype)
        if self.server_args.disaggregation_mode == "prefill":
            # No step runs here, and SGLang has made no room for one where the target keeps states.
            self._nodes = 0
            if self._target_tp_rank == 0:
                logger.info("%s: prompts are prefilled here and decoded elsewhere", ALGORITHM)
            return
        if self._nodes:
            self._require_trees()
        elif self.options.adaptive is False:
            return
        widths = self.options.widths_of(self._block)
        if self._nodes and self.options.adaptive is None and not self._on_host:
            widths = (self._nodes,)
        asked = self.options.adaptive is not None or self.options.widths is not None
        # Trees need the block's own shape, and `_require_trees` has asked for it.
        reason = None if self._nodes else compat.installed().only_whole_blocks(self, SHAPED, asked)
        if reason is None:
            group = compat.installed().tensor_parallel_group()
            several = group.world_size > 1
            self._widths = Widths(
                widths,
                cycle=self.options.adaptive == "cycle",
                agree=over(group) if several else None,
                leads=group.is_first_rank,
                ahead=not self._on_host,
                tree_depth=self._block - 1 if self._nodes else None,
            )
            # Where trees alone are verified, the block is drafted and the target never runs it.
            self._shapes = Shapes(self, sorted({*widths, self._block}), drafted_only={self._block} - set(widths))
            if not compat.installed().shares_pages(self):
                write = super()._append_target_hidden_to_draft_kv_by_loc
                self._deferred = Deferred(write, self.acceptance.exporter)
        if self._target_tp_rank == 0:
            chosen = f"one of {', '.join(map(str, widths))} tokens" if reason is None else f"whole blocks: {reason}"
            level = logging.WARNING if reason is not None and asked else logging.INFO
            logger.log(level, "%s: each step verifies %s", ALGORITHM, chosen)

    def init_cuda_graphs(self) -> None:
        """SGLang's, and what the other widths need beside them."""
        super().init_cuda_graphs()
        self._shapes.make_passes()
        if self._nodes:
            with compat.installed().masks_captured(), compat.installed().sized_for(self._nodes):
                self._tree_pass = compat.installed().own_pass(self.model_runner, self._nodes)

    def _require_trees(self) -> None:
        """Raises InvalidArgument, naming everything for which this server cannot verify trees."""
        found = compat.installed().no_trees(self)
        if (reason := compat.installed().only_whole_blocks(self, SHAPED, True)) is not None:
            found.append(reason)
        if found:
            raise InvalidArgument(
                f"tree_nodes: got {self.options.tree_nodes} in DFLASH_RS_CONFIG, expected 0 here: {'; '.join(found)}"
            )
        # The builder of trees and the mover of paths are ours everywhere, whatever `kernels` says of the rest.
        self._has_kernels = cuda.available(torch.device(self.device))
        if self._has_kernels:
            cuda.load(torch.device(self.device))

    def _put_tree_pass(self, entries: int) -> None:
        for name in PASSES:
            setattr(self.model_runner, name, self._tree_pass[name])
        room = compat.installed().mask_room(self.model_runner.attn_backend)
        if room is not None and entries > room:
            # Near the end of the context a graph's own mask has no room for what the host takes for the length.
            self.model_runner.decode_cuda_graph_runner = None

    @property
    def _path_kv(self) -> PathKv:
        """Made on first use, as `targets`."""
        if self._moves is None:
            runner = self.model_runner
            self._moves = PathKv(runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token)
        return self._moves

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's, and the kernels once there are pages for them to write to."""
        super().alloc_memory_pool(*args, **kwargs)
        if not self.options.kernels:
            return
        device = torch.device(self.device)
        if cuda.available(device):
            cuda.load(device)
            self._walk_kernel = Walk(device)
        positions = int(self.model_runner.model_config.context_len) + int(self.block_size)
        pool = self.draft_model_runner.token_to_kv_pool
        self._context_kv, reason = ContextKv.build(self.draft_model, pool, positions, device)
        if self._context_kv is not None:
            # SGLang's step asks for both before it calls `_append_target_hidden_fused`.
            self._use_fused_kv_materialize, self._fused_kv_helper = True, self._context_kv
        if self._target_tp_rank == 0 and (self._context_kv is not None or not self._on_host):
            logger.info("%s: kernels for draft KV: %s", ALGORITHM, reason)

    def _append_target_hidden_to_draft_kv_by_loc(
        self, *, target_hidden: torch.Tensor, cache_loc: torch.Tensor, positions: torch.Tensor, **block: Any
    ) -> None:
        if not self._deferred.keep(target_hidden, cache_loc, positions):
            super()._append_target_hidden_to_draft_kv_by_loc(
                target_hidden=target_hidden, cache_loc=cache_loc, positions=positions, **block
            )

    def _append_target_hidden_fused(
        self,
        ctx_hidden: torch.Tensor,
        ctx_positions: torch.Tensor,
        ctx_cache_loc: torch.Tensor,
        ctx_cache_loc_2d: torch.Tensor | None = None,
        commit_lens: torch.Tensor | None = None,
    ) -> None:
        if self._context_kv is not None:
            try:
                self._context_kv(ctx_hidden, ctx_positions, ctx_cache_loc, ctx_cache_loc_2d, commit_lens)
            except Exception as error:
                # SGLang catches it, warns of a path of its own, and goes on without the kernel for good.
                self.acceptance.kernel_failed("kv_inject", error)
                raise
        else:
            super()._append_target_hidden_fused(ctx_hidden, ctx_positions, ctx_cache_loc, ctx_cache_loc_2d, commit_lens)

    def _draws(self, sampler: Any) -> Draws | None:
        """What draws where no request is seeded; None leaves all draws to SGLang's sampler."""
        device = torch.device(self.device)
        if not self.options.kernels or not cuda.available(device):
            return None
        joint = compat.installed().joint_filters(sampler)
        if self._target_tp_rank == 0:
            who = "this package's kernel" if joint is not None else "SGLang's sampler, whose law is not known here"
            logger.info("%s: draws without a seed are made by %s", ALGORITHM, who)
        return None if joint is None else Draws(device, joint)

    @property
    def targets(self) -> TargetSampler:
        """Made on first use: the request pool exists only after SGLang has sized its memory."""
        if self._targets is None:
            runner = self.model_runner
            rows = int(runner.req_to_token_pool.req_to_token.shape[0])
            vocab = int(runner.model_config.vocab_size)
            self._targets = TargetSampler(runner.sampler, rows, vocab, self.device, self._draws(runner.sampler))
        return self._targets

    def _coupling(self, tree: bool) -> Seeded | Drawn | None:
        """The target's random numbers of the step that begins, where its drafts are to share them; `tree`: whether it drafts one."""
        if not self.options.coupled or self._info.is_all_greedy or not compat.installed().drafts_in_place(self):
            return None
        if self._couplings is None:
            runner = self.model_runner
            known = compat.installed().joint_filters(runner.sampler) is not None
            vocab = int(runner.model_config.vocab_size) if known else None
            self._couplings = Couplings(vocab, self.targets.draws, runner.dtype)
        return self._couplings.of(self._info, self._reqs, self._has_all_logits() and not tree)

    def _has_all_logits(self) -> bool:
        """Whether each draft is chosen by logits of its own, of which this rank has the whole vocabulary's."""
        return compat.installed().tensor_parallel_group().world_size == 1 and not compat.installed().selects(self)

    @contextlib.contextmanager
    def _drafting(self, how: Seeded | Drawn | None) -> Iterator[None]:
        """Within the context drafts share these random numbers."""
        if how is None:
            yield
            return
        self._coupled = how
        try:
            with self._choosing():
                yield
        finally:
            self._coupled = None

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """Within the context drafts are not the likeliest ones that the sampler in the drafter's graph has."""
        sampler: Any = vars(self)["_draft_sampler"]
        self._draft_sampler = None
        if isinstance(sampler, Logits | Lattices):
            self._draft_sampler = Chosen(sampler, lambda: self._chosen(sampler))
        try:
            yield
        finally:
            self._draft_sampler = sampler

    def _chosen(self, sampler: Logits | Lattices) -> torch.Tensor:
        with compat.installed().for_drafter(self):
            return sampler.choose(self, len(self._reqs))

    def _maybe_build_draft_sampler(self) -> Any:
        # What SGLang folds into the drafter's graphs. Of blocks as long as trees have nodes none is ever drafted.
        sampler, seams = super()._maybe_build_draft_sampler(), compat.installed()
        if sampler is None or int(self.block_size) == self._nodes or not self._may_choose():
            return sampler
        if seams.selects(self):
            return Lattices(sampler, self, self.draft_model.lm_head)
        kept = Logits(sampler, self._draft_logits)
        self._draft_logits = kept.room
        return kept

    def _may_choose(self) -> bool:
        """Whether there can be steps whose drafts are not the likeliest ones."""
        if not compat.installed().drafts_in_place(self):
            return False
        if self._nodes or not self.options.coupled:
            return bool(self._nodes)
        seeded = compat.installed().resolved(self.server_args).enable_deterministic_inference
        return bool(seeded) or (self._has_all_logits() and self.targets.draws is not None)

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One step. Arguments and result are those of SGLang's worker."""
        if batch.forward_mode.is_idle() or batch.sampling_info is None:
            self._widths.interrupted()
            self._deferred.begin(plain=False, owners=())
            return super().forward_batch_generation(batch, *args, **kwargs)
        given, reqs = batch.sampling_info, list(batch.reqs)
        prefill = batch.forward_mode.is_extend() or batch.is_extend_in_batch
        slots = batch.req_pool_indices.to(torch.int64)
        self._reqs, self._slots, self._info, self._scored = reqs, slots, given, bool(batch.return_logprob)
        if prefill:
            self._widths.interrupted()
            self._most, width = None, int(self.block_size)
        else:
            self._admit(batch.spec_info, reqs, slots)
            self._most = self._limits.of(reqs)
            width = self._widths.next(len(reqs), self._most, reqs, self._limits.whole(reqs))
        self._deferred.begin(plain=width == 1, owners=[req.rid for req in reqs])
        batch.sampling_info = self.targets.enter(reqs, slots, given) if prefill else bare(given)
        try:
            if width == self._nodes and not prefill:
                result = self._tree_step(batch, *args, **kwargs)
            else:
                with self._shapes.of(width):
                    if width == 1:
                        result = plain.step(self, batch, *args, **kwargs)
                    else:
                        with self._drafting(None if prefill else self._coupling(tree=False)):
                            result = super().forward_batch_generation(batch, *args, **kwargs)
        finally:
            batch.sampling_info = given
            self._reqs, self._slots, self._info = [], None, None
        if prefill:
            first = result.next_token_ids.to(torch.int64)[:, None]
            self.targets.committed(reqs, slots, first, torch.ones(len(reqs), dtype=torch.int32, device=first.device))
        return result

    def _admit(self, told: Any, reqs: list[Any], slots: torch.Tensor) -> None:
        """Those of `reqs` that have arrived with their KV, which no prefill of this server has announced; `told` is the step's draft input."""
        if not told.arrived:
            return
        those = {id(req) for req in told.arrived}
        told.arrived = ()
        self._widths.interrupted()
        # Who was retracted before this step arrives again later.
        if here := [i for i, req in enumerate(reqs) if id(req) in those]:
            self.targets.begin([reqs[i] for i in here], slots[put(here, slots.device)])

    def _tree_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A step that drafts a block and verifies trees of what the drafter holds likely."""
        target: Any = self.target_worker
        recorded = Recorded(target)
        # The shape of the block, left at the end, puts the target's pass back that the trees' own comes in place of.
        with self._shapes.of(self._block):
            numbers = self._coupling(tree=True)
            assert not isinstance(numbers, Drawn)
            step = Step(self, recorded, self._nodes - 1, self._put_tree_pass, self._path_kv, self._has_kernels, numbers)
            self._tree, self._target_worker = step, recorded
            try:
                with compat.installed().verifying(step), self._choosing():
                    return super().forward_batch_generation(batch, *args, **kwargs)
            finally:
                self._tree, self._target_worker = None, target
                step.forget()

    def _greedy_sample_from_vocab_parallel_head(self, *, hidden_states: Any, lm_head: Any, **kwargs: Any) -> Any:
        # The drafts of a block, from the drafter's last hidden states, where no graph has run.
        if self._tree is None and (self._coupled is None or not is_plain(lm_head)):
            return super()._greedy_sample_from_vocab_parallel_head(
                hidden_states=hidden_states, lm_head=lm_head, **kwargs
            )
        return self.drafts_of(hidden_states, lm_head)

    def drafts_of(self, hidden: torch.Tensor, lm_head: Any) -> torch.Tensor:
        """Drafts i64 ``[R * (B - 1)]`` of a step of trees or coupled drafts; `hidden` ``[R * (B - 1), H]`` are the drafter's last hidden states."""
        group = compat.installed().drafter_group()
        if self._tree is not None:
            return self._tree.draft(hidden, lm_head, group)
        assert self._coupled is not None
        positions = self._draft_block_positions_buf[: hidden.shape[0] // (int(self.block_size) - 1), :-1]
        return self._coupled.draft(hidden, lm_head, group, positions)

    def _propose_selector_block(
        self, *, draft_logits_output: Any, bs: int, lm_head: Any, anchor_token_ids: Any, sampling_info: Any
    ) -> Any:
        # The same of a DFlash 2.
        if self._tree is None and self._coupled is None:
            return super()._propose_selector_block(
                draft_logits_output=draft_logits_output,
                bs=bs,
                lm_head=lm_head,
                anchor_token_ids=anchor_token_ids,
                sampling_info=sampling_info,
            )
        hidden = draft_logits_output.hidden_states
        return self.drafts_along(*compat.installed().lattice(self, hidden, anchor_token_ids, lm_head))

    def drafts_along(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same of a DFlash 2's lattice, see ``Seams.lattice``; i64 ``[R, B - 1]``."""
        rows = len(tokens)
        if self._tree is not None:
            return self._tree.draft_along(self._draft_block_ids_buf[:rows, 0], tokens, scores)
        assert isinstance(self._coupled, Seeded)
        sums = self._coupled.along(tokens, scores, self._draft_block_positions_buf[:rows, :-1])
        return compat.installed().best_path(self, tokens, sums)

    def _can_skip_verify_logits(self, batch: Any, sampling_info: Any) -> bool:
        # The sampling info that SGLang passes is the bare one.
        return self.targets.untouched(self._info, self._reqs) and super()._can_skip_verify_logits(batch, sampling_info)

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        # SGLang's worker warns here that it cannot sample on this device. This one can.
        compat.installed().past_the_checks(self, batch)

    def _accept_block(
        self,
        *,
        candidates: torch.Tensor,
        next_token_logits: torch.Tensor | None,
        sampling_info: Any,
        draft_input: Any,
        prefix_lens: torch.Tensor,
        bs: int,
        target_predict: torch.Tensor | None = None,
    ) -> tuple:
        tree = None if self._tree is None else self._tree.tree
        nodes = candidates if tree is None else tree.tokens
        drawn = target_predict is None and not self._info.is_all_greedy
        if target_predict is None:
            assert next_token_logits is not None
            target_predict = self.targets.targets(
                next_token_logits,
                self._info,
                self._reqs,
                self._slots,
                nodes,
                prefix_lens.to(torch.int64),
                self._scored,
                tree,
            )
        # SGLang's own method sees to the tokens that were not drawn.
        ours = (self._on_host or self._walk_kernel is not None) and not compat.installed().simulates_acceptance()
        if drawn or ours or tree is not None:
            target_predict = compat.installed().same_on_all_ranks(self, target_predict, drawn)
        if self._tree is not None:
            return self._accept_tree(target_predict.view_as(nodes), prefix_lens)
        candidates = self._within_limits(candidates, target_predict)
        # Drafts of a sampling drafter are followed like any other: they do not depend on the target's draws.
        self._selector_sample = None
        if ours:
            accepted = self._walk(candidates, target_predict.view_as(candidates), prefix_lens)
        else:
            accepted = super()._accept_block(
                candidates=candidates,
                next_token_logits=next_token_logits,
                sampling_info=sampling_info,
                draft_input=draft_input,
                prefix_lens=prefix_lens,
                bs=bs,
                target_predict=target_predict,
            )
        _, commit_lens, _, out_tokens, _ = accepted
        self.targets.committed(self._reqs, self._slots, out_tokens, commit_lens)
        return accepted

    def _accept_tree(self, sampled: torch.Tensor, prefix_lens: torch.Tensor) -> tuple:
        """What `_accept_block` returns, for trees with the target's tokens `sampled` i64 ``[R, M]``."""
        assert self._tree is not None
        most = None if self._most is None else put(self._most, sampled.device)
        accepted, bonus, gained = self._tree.keep(sampled, most, self._scored)
        commit_lens = accepted + 1
        self.targets.committed(self._reqs, self._slots, gained, commit_lens)
        return accepted, commit_lens, bonus, gained, prefix_lens + commit_lens.to(prefix_lens.dtype)

    def _within_limits(self, candidates: torch.Tensor, target_predict: torch.Tensor) -> torch.Tensor:
        """Blocks i64 ``[R, B]`` in which what a request may not accept is another token than the target's, which `target_predict` ``[R, B]`` has
        one place earlier."""
        if self._most is None or candidates.shape[1] == 1:
            return candidates
        place = torch.arange(candidates.shape[1], device=candidates.device)
        said = target_predict.view_as(candidates).roll(1, dims=1)
        other = (said == 0).to(candidates.dtype)
        return torch.where(place[None] > put(self._most, candidates.device)[:, None], other, candidates)

    def _walk(self, block: torch.Tensor, sampled: torch.Tensor, prefix_lens: torch.Tensor) -> tuple:
        if block.shape[1] == 1:
            # A plain step: nothing to walk along. Nobody writes to what is the same in all of them.
            none, one = self._plain_lengths
            if len(none) < len(block):
                none = torch.zeros(len(block), dtype=torch.int32, device=block.device)
                one = torch.ones_like(none)
                self._plain_lengths = none, one
            return none[: len(block)], one[: len(block)], sampled.view(-1), sampled, prefix_lens + 1
        if self._walk_kernel is not None:
            return self._walk_kernel(block, sampled, prefix_lens)
        drafts = block[:, 1:].contiguous()
        accepted, bonus = map(torch.from_numpy, verify.walk(drafts.numpy(), sampled.contiguous().numpy()))
        # The tokens gained stand at the front; what is behind the bonus token is never read.
        commit_lens = accepted + 1
        return accepted, commit_lens, bonus, sampled.clone(), prefix_lens + commit_lens.to(prefix_lens.dtype)

    def _make_next_draft_input_prefill(self, *, bonus_tokens: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        return planning.draft_input(bonus_tokens, seq_lens)

    def _make_next_draft_input_decode(self, *, bonus_tokens: torch.Tensor, new_seq_lens: torch.Tensor) -> Any:
        return planning.draft_input(bonus_tokens, new_seq_lens)

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """SGLang has learned a step's accept lengths on the host."""
        self.acceptance.observe(num_correct_drafts_per_req, *self._widths.verified(num_correct_drafts_per_req))

"""Stands in for the drafter's CUDA graphs: its passes run as ever, and behind them what SGLang captures behind them into graphs.

``SGLANG_HOST_GRAPHS`` says of how many requests the largest graph is; larger batches run without, as on a GPU. What is left of other batches stands in the
memory that a graph writes to until it is run again.
"""

import os

RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
WORKER = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"


def on():
    """Whether there are such graphs."""
    return bool(os.environ.get("SGLANG_HOST_GRAPHS"))


class Graphs:
    """Made as SGLang makes its own, for one number of tokens per request."""

    def __init__(self, runner, *, attn_backend=None, speculative_num_steps=None, speculative_num_draft_tokens=None):
        self.hooks = list(runner.capture_tail_hooks)

    def can_run_graph(self, forward_batch):
        """The eager runner runs them all."""
        return False

    def behind(self, runner, forward_batch, done):
        """What is captured behind a pass."""
        if self.hooks and forward_batch.batch_size <= int(os.environ["SGLANG_HOST_GRAPHS"]):
            for hook in self.hooks:
                hook(runner, done.logits_output, forward_batch, forward_batch.input_ids.numel())
            done.can_run_graph = True


def _capture(original, worker):
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.speculative.draft_worker_common import make_draft_sampler_capture_hook

    original(worker)
    get_exec().graph.cuda_graph_config.decode.bs = [int(os.environ["SGLANG_HOST_GRAPHS"])]
    runner, sampler = worker.draft_model_runner, worker._maybe_build_draft_sampler()
    worker._draft_sampler = sampler
    runner.capture_tail_hooks.append(make_draft_sampler_capture_hook(sampler))
    runner.decode_cuda_graph_runner = Graphs(runner)


def _forward(original, runner, forward_batch, *args, **kwargs):
    done = original(runner, forward_batch, *args, **kwargs)
    if isinstance(runner.decode_cuda_graph_runner, Graphs):
        runner.decode_cuda_graph_runner.behind(runner, forward_batch, done)
    return done


def hooks():
    """Around what makes the worker's graphs and what runs a model."""
    return {f"{WORKER}.init_cuda_graphs": _capture, f"{RUNNER}.forward": _forward}

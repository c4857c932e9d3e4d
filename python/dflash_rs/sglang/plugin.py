"""The entry point: SGLang calls ``register`` in every one of its processes.

SGLang logs what a plugin raises and goes on without it. So this file does as little as possible, and the worker checks when it is
built that all of it took place (``algorithm.require_registered``).
"""

from __future__ import annotations

from dflash_rs.sglang import ALGORITHM


def register() -> None:
    """Makes ``--speculative-algorithm DFLASH_RS`` known to SGLang."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from dflash_rs.sglang import compat, probe, requests
    from dflash_rs.sglang.algorithm import DflashRsAlgorithm

    compat.hook(requests.ours, requests.refusal)
    probe.register()

    @SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=DflashRsAlgorithm)
    def worker(server_args):
        from dflash_rs.sglang.worker import DflashRsWorker

        return DflashRsWorker

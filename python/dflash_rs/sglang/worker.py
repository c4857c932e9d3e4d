"""The worker."""

from __future__ import annotations

from dflash_rs.sglang import algorithm, compat


class DflashRsWorker(compat.worker_class()):
    """SGLang's DFLASH worker with dflash_rs at its seams."""

    def __init__(self, server_args, gpu_id, nccl_port, target_worker, **kwargs):
        algorithm.require_registered()
        super().__init__(server_args, gpu_id, nccl_port, target_worker, **kwargs)

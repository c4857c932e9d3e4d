"""A prefill server and a decode server of real SGLang on this host, and a router that sends every request to both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from servers import Server, free_port

# Seconds after which SGLang gives up on the other server.
PATIENCE = "120"


class Pair:
    """Two servers; use as a context manager. Answers are the decode server's.

    SGLang's mooncake backend carries keys and values from one to the other, over a transport of the host platform (sglang_host.transfer); `transfer`
    is what it carries. `kind` is what runs the servers.
    """

    def __init__(
        self,
        log: Path,
        env: dict[str, str] | None = None,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        transfer: str = "whole",
        kind: type[Server] = Server,
        **options: Any,
    ):
        env = {
            "SGLANG_HOST_TRANSFER": transfer,
            "SGLANG_HOST_IP": "127.0.0.1",
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": PATIENCE,
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": PATIENCE,
        } | (env or {})
        self.bootstrap, self.rooms = free_port(), random.Random()
        # Where SGLang keeps a cache on the host, with what a host without a GPU can copy.
        options = {
            "disaggregation_transfer_backend": "mooncake",
            "hicache_io_backend": "direct",
            "hicache_mem_layout": "layer_first",
            **options,
        }
        both = {
            "prefill": {"disaggregation_bootstrap_port": self.bootstrap} | (prefill or {}),
            "decode": decode or {},
        }
        self.prefill, self.decode = (
            kind(log.with_suffix(f".{mode}.log"), env=env, disaggregation_mode=mode, **options | own)
            for mode, own in both.items()
        )

    def __enter__(self) -> Pair:
        try:
            self.prefill.wait(), self.decode.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends both servers."""
        self.prefill.close(), self.decode.close()

    def send(self, body: dict[str, Any]) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """/generate of both servers: their answers, the prefill server's first."""
        room = {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap,
            "bootstrap_room": self.rooms.randrange(1, 1 << 62),
        }
        with ThreadPoolExecutor(2) as pool:
            sent = [pool.submit(server.post, "/generate", body | room) for server in (self.prefill, self.decode)]
            first, second = (future.result() for future in sent)
        return first, second

    def together(self, requests: Sequence[dict[str, Any]], at_once: int = 8) -> list[dict[str, Any]]:
        """Several /generate bodies, at most `at_once` in flight; answers in order."""

        def one(body: dict[str, Any]) -> dict[str, Any]:
            first, (status, answer) = self.send(body)
            if first[0] != 200 or status != 200:
                raise RuntimeError(f"{first}; {status}: {answer}")
            return answer

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, requests))

    def flush_is_clean(self) -> bool:
        """Whether no page is lost on either side."""
        return self.prefill.flush_is_clean() and self.decode.flush_is_clean()

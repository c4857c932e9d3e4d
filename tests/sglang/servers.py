"""Real SGLang servers on the host, one process each, and the requests sent to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dflash_rs.config import assets

TARGET, DRAFT = str(assets() / "target"), str(assets() / "draft")
START_SECONDS = 900


def environment(**extra: str) -> dict[str, str]:
    """Environment of a server process: the host platform, one thread, nothing fetched, nothing compiled."""
    return os.environ | {
        "SGLANG_PLATFORM": "host",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def arguments(**options: Any) -> list[str]:
    """Command-line flags of a server: `page_size=16` becomes `--page-size 16`, True a bare flag, None nothing."""
    common = {
        "model_path": TARGET,
        "device": "cpu",
        "attention_backend": "host",
        "dtype": "float32",
        "sampling_backend": "pytorch",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.3,
        "max_total_tokens": 8192,
        "max_running_requests": 8,
        "random_seed": 0,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # or every server that waits for its turn takes a core from the others
        "host": "127.0.0.1",
    }
    flags = []
    for name, value in (common | options).items():
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.append(str(value))
    return flags


def speculative(algorithm: str = "DFLASH_RS", **options: Any) -> dict[str, Any]:
    """Flags for drafting with the bundled pair."""
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": DRAFT,
        "speculative_draft_attention_backend": "host",
        **options,
    }


def widths(adaptive: bool | str, *among: int) -> dict[str, str]:
    """Environment of a server: whether steps vary in width, and among which."""
    return {"DFLASH_RS_CONFIG": json.dumps({"adaptive": adaptive} | ({"widths": among} if among else {}))}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server; use as a context manager."""

    def __init__(self, log: Path, env: dict[str, str] | None = None, **options: Any):
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "sglang.launch_server", *arguments(port=self.port, **options)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(**(env or {})), start_new_session=True
            )

    def wait(self) -> Server:
        """Waits until it serves; says why if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                self.get("/model_info", timeout=2)
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise RuntimeError(f"not up after {START_SECONDS} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of the log, long lines cut."""
        return "\n".join(line[:400] for line in self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """Ends the server and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Server:
        try:
            return self.wait()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, path: str, body: Any = None, timeout: float = 120) -> Any:
        """An open response."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout)

    def get(self, path: str, timeout: float = 120) -> str:
        """The text of a GET."""
        with self.open(path, timeout=timeout) as response:
            return response.read().decode()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST; the text of an answer that is not JSON."""
        try:
            with self.open(path, body) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def generate(self, prompt: str, params: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """/generate; raises for anything but 200."""
        status, answer = self.post("/generate", {"text": prompt, "sampling_params": params, **fields})
        if status != 200:
            raise RuntimeError(f"{status}: {answer}")
        return answer

    def together(self, requests: Sequence[dict[str, Any]], at_once: int = 8) -> list[dict[str, Any]]:
        """Several /generate bodies, at most `at_once` in flight; answers in order."""

        def one(body: dict[str, Any]) -> dict[str, Any]:
            status, answer = self.post("/generate", body)
            if status != 200:
                raise RuntimeError(f"{status}: {answer}")
            return answer

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, requests))

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer."""
        with self.open(path, body | {"stream": True}) as response:
            for line in response:
                text = line.decode().strip()
                if text.startswith("data: ") and text != "data: [DONE]":
                    yield json.loads(text[len("data: ") :])

    def flush_is_clean(self) -> bool:
        """Whether the KV pool is whole once nothing runs: a leak ends SGLang's scheduler."""
        for _ in range(50):
            status, _ = self.post("/flush_cache", {})
            if status == 200:
                return self.process.poll() is None
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def side_by_side(started: Mapping[Any, Server]) -> Iterator[None]:
    """Within the context all of these servers, which were started, answer; they end together."""
    try:
        for server in started.values():
            server.wait()
        yield
    finally:
        for server in started.values():
            server.close()

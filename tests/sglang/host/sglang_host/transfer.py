"""What SGLang's mooncake backend wants of the package of that name, over TCP between processes of this machine.

The package needs libraries of InfiniBand to be imported at all. SGLang's backend itself, which agrees with the other server on rooms, pages and
buffers and sends them, is left as it is; this only carries bytes from one address to another.

``SGLANG_HOST_TRANSFER`` turns it on: ``whole``, or for tests of the tests ``without_kv`` or ``without_draft_kv``, which says that all has been sent and
leaves out keys and values, or the drafter's.
"""

import ctypes
import os
import struct
import sys
import threading
from multiprocessing.connection import Client, Listener
from types import ModuleType

import torch

HERE = "127.0.0.1"
# Address and length of one stretch of memory.
STRETCH = struct.Struct("<QQ")


def on() -> bool:
    """Whether the package is to be stood in for."""
    return bool(os.environ.get("SGLANG_HOST_TRANSFER"))


def provide() -> None:
    """Has ``from mooncake.engine import TransferEngine`` find the class below."""
    package, module = ModuleType("mooncake"), ModuleType("mooncake.engine")
    package.engine, module.TransferEngine = module, TransferEngine
    sys.modules |= {"mooncake": package, "mooncake.engine": module}
    # Before it sends, SGLang has its transfer threads wait for what a stream of CUDA has begun. Here everything is done when it returns.
    torch.cuda.Event, torch.cuda.current_stream = Done, lambda: None
    # Room for retracted requests is taken from what this much leaves of the host's memory, which other servers share here.
    from sglang.srt.mem_cache.pool_host import base

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def send(original, manager, session, blocks):
    """Stands around what sends a room's keys and values: leaves out what is to be lost."""
    how, args = os.environ["SGLANG_HOST_TRANSFER"], manager.kv_args
    first = {"without_kv": 0, "without_draft_kv": len(args.kv_data_ptrs) - args.num_draft_entries}[how]
    lost = list(zip(args.kv_data_ptrs, args.kv_data_lens))[first:]
    kept = [block for block in blocks if not any(begin <= block[0] < begin + size for begin, size in lost)]
    return original(manager, session, kept)


def hooks():
    """What stands around functions of SGLang's, by name."""
    if os.environ["SGLANG_HOST_TRANSFER"] == "whole":
        return {}
    return {"sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._transfer_data": send}


class Done:
    """An event that has happened."""

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


class TransferEngine:
    """Writes into memory that another process has registered; 0 is success, as in mooncake."""

    def __init__(self):
        self._regions: dict[int, int] = {}
        self._peers: dict[str, tuple[Client, threading.Lock]] = {}
        self._lock = threading.Lock()

    def initialize(self, host, handshake, protocol, device):
        self._listener = Listener((HERE, 0))
        threading.Thread(target=self._listen, daemon=True).start()
        return 0

    def get_rpc_port(self):
        return self._listener.address[1]

    def batch_register_memory(self, addresses, lengths):
        self._regions.update(zip(addresses, lengths))
        return 0

    def batch_unregister_memory(self, addresses):
        for address in addresses:
            del self._regions[address]
        return 0

    def batch_transfer_sync_write(self, session, sources, targets, lengths):
        stretches = list(zip(sources, targets, lengths))
        head = b"".join(STRETCH.pack(target, length) for _, target, length in stretches)
        connection, lock = self._peer(session)
        with lock:
            connection.send_bytes(head)
            connection.send_bytes(b"".join(ctypes.string_at(source, length) for source, _, length in stretches))
            return connection.recv()

    def send_probe(self, session):
        return 0

    def _peer(self, session):
        with self._lock:
            if session not in self._peers:
                port = int(session.rpartition(":")[2])
                self._peers[session] = Client((HERE, port)), threading.Lock()
            return self._peers[session]

    def _listen(self):
        while True:
            threading.Thread(target=self._receive, args=(self._listener.accept(),), daemon=True).start()

    def _receive(self, connection):
        while True:
            try:
                head, data = connection.recv_bytes(), connection.recv_bytes()
            except EOFError:  # the other server has ended
                return
            stretches = list(STRETCH.iter_unpack(head))
            known = all(self._registered(*stretch) for stretch in stretches)
            begin = 0
            for address, length in stretches if known else ():
                ctypes.memmove(address, data[begin : begin + length], length)
                begin += length
            connection.send(0 if known else -1)

    def _registered(self, address, length):
        return any(begin <= address and address + length <= begin + size for begin, size in self._regions.items())

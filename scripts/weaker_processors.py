"""Runs tests as on processors with fewer instructions than this one has: torch, oneDNN and our host kernels are told to leave them alone.

    python scripts/weaker_processors.py tests/python/test_models_host.py ...

The arguments go to pytest, once for every instruction set below the widest this processor has; what the widest one does, the
ordinary run shows. Sets that this processor lacks, or that are its widest, are named as skipped. Exit code 1 when a run failed.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Our name of a set, and the variables that keep torch and oneDNN within it.
SETS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def main(arguments: list[str]) -> int:
    """Exit code of the whole."""
    from dflash_rs import _core

    available = _core.cpu_isas()
    failed = []
    for name, variables in SETS.items():
        if name not in available:
            print(f"--- {name}: skipped, this processor lacks it", flush=True)
            continue
        # oneDNN knows more than our kernels do: of the widest set, too, it may have to be kept from AMX.
        print(f"--- {name}: {' '.join(f'{key}={value}' for key, value in variables.items())}", flush=True)
        environment = os.environ | variables | {"DFLASH_CPU_ISA": name}
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        if subprocess.run(words, env=environment, check=False).returncode:
            failed.append(name)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

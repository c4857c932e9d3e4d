"""Runs what depends on the processor's instructions as lesser processors would: our kernels, torch's and oneDNN's held to their sets.

The widest set that this processor has is what all other tests run with. Sets it lacks are named and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dflash_rs import _core

# Our set, torch's and oneDNN's.
SETS = (
    ("portable", "default", "SSE41"),
    ("avx2", "avx2", "AVX2"),
    ("avx512", "avx512", "AVX512_CORE"),
    ("avx512_bf16", "avx512", "AVX512_CORE_BF16"),
)
TESTS = (
    "tests/python/test_processors.py::test_without_a_name_it_is_the_widest_of_this_processor",
    "tests/python/test_processors.py::test_a_product_is_that_of_the_modules_and_of_its_row",
    "tests/python/test_experts.py",
    "tests/python/test_models_host.py",
    "tests/python/test_models_attention.py",
    "tests/python/test_models_target.py",
    "tests/python/test_pointwise.py::test_which_functions_hang_on_places_is_known",
    "tests/python/test_pointwise.py::test_within_padded_a_row_has_the_same_bits_in_any_company",
    "tests/python/test_pointwise.py::test_rows_of_two_vectors_each_have_the_same_bits_in_any_company_without",
)
# Minutes for a processor without fused multiply-add, which the portable set on x86-64 is.
ENGINE = (
    "tests/python/test_llm.py::test_what_pays_does_not_change_the_text[dear-greedy]",
    "tests/python/test_llm.py::test_in_half_precision_the_text_is_the_same_up_to_rounding[bfloat16-greedy-4]",
)


def main() -> int:
    """0 when every set passed, else 1."""
    there, failed = _core.cpu_isas(), []
    for ours, torchs, dnns in SETS:
        if ours not in there:
            print(f"processors: SKIPPED {ours}: this processor has {', '.join(there)}", flush=True)
            continue
        if ours == there[-1]:
            print(f"processors: {ours} is what the other tests run with", flush=True)
            continue
        switches = {"DFLASH_CPU_ISA": ours, "ATEN_CPU_CAPABILITY": torchs, "ONEDNN_MAX_CPU_ISA": dnns}
        print("processors:", " ".join(f"{name}={value}" for name, value in switches.items()), flush=True)
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        words += ENGINE if ours != "portable" else ()
        if subprocess.run(words, env=os.environ | switches, cwd=Path(__file__).parents[1], check=False).returncode != 0:
            failed.append(ours)
    if failed:
        print(f"processors: failed with {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`dflash-rs doctor`: what works on this machine, what is missing, and the command that gets it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from . import extras

# ABSENT is MISSING for what the main job does not need.
OK, ABSENT, MISSING, BROKEN = "ok", "absent", "missing", "broken"
REINSTALL = extras.install(options="--force-reinstall")


@dataclass(frozen=True)
class Check:
    """One finding. `needed` marks what the main job (generating with the bundled pair) cannot do without."""

    name: str
    status: str
    detail: str
    fix: str = ""
    needed: bool = False


def examine() -> list[Check]:
    """Every check, in reading order; none of them raises."""
    steps: Sequence[tuple[str, bool, Callable[[], Check]]] = (
        ("python", True, _python),
        ("dflash-rs", True, _package),
        ("core", True, _core),
        ("cpu", False, _cpu),
        *[(name, True, lambda name=name: _module(name, "torch", True)) for name in _RUN_TIME],
        ("gpu", False, _gpu),
        ("kernels", False, _kernels),
        ("cuda driver", False, _cuda_driver),
        ("bundled pair", False, _assets),
        ("generation", True, _generation),
        *[(name, False, lambda name=name, extra=extra: _extra(name, extra)) for name, extra in _EXTRAS.items()],
        ("sglang", False, _sglang),
        ("reference loop", False, _reference),
    )
    checks = []
    for name, needed, step in steps:
        try:
            checks.append(step())
        except Exception as error:  # a doctor that dies of the illness helps nobody
            checks.append(Check(name, BROKEN, f"{type(error).__name__}: {error}", needed=needed))
    return checks


def examine_part(part: str) -> list[Check]:
    """Checks of a part that brings its own, by the name of its entry point in the group ``dflash_rs.doctor``."""
    found = [entry for entry in metadata.entry_points(group="dflash_rs.doctor") if entry.name == part]
    if not found:
        detail = f"this installation of dflash-rs knows no checks for {part}"
        return [Check(part, MISSING, detail, REINSTALL, needed=True)]
    return found[0].load()()


def works(checks: Sequence[Check]) -> bool:
    """Whether everything the main job needs is there."""
    return all(check.status == OK for check in checks if check.needed)


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """{"works": bool, "checks": [...]}."""
    return {"works": works(checks), "checks": [asdict(check) for check in checks]}


def to_text(
    checks: Sequence[Check], paint: Callable[[str, str], str], job: tuple[str, str] = ("The bundled pair", "generate")
) -> str:
    """One line per check; what to type stands under what is missing. `job`: who is to do what."""
    width = max(len(check.name) for check in checks)
    style = {OK: "draft", ABSENT: "prompt", MISSING: "own", BROKEN: "bad"}
    lines = []
    for check in checks:
        mark = paint(style[check.status], f"{check.status:<8}")
        lines.append(f"{mark} {check.name:<{width}}  {check.detail}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.fix}")
    lines.append("")
    who, what = job
    lines.append(f"{who} {what}s here." if works(checks) else f"{who} does not {what} here yet.")
    return "\n".join(lines)


# Packages for some of what can be asked for, by the extra that brings each: what it is for.
_EXTRAS = {
    "llguidance": ("structured", "only needed for structured outputs"),
    "gguf": ("gguf", "only needed for GGUF files and `models get`"),
    "matplotlib": ("bench", "only needed for plots"),
}
_RUN_TIME = ("torch", "transformers", "safetensors", "tokenizers")


def _version(package: str) -> str | None:
    from dflash_rs.bench.report import version

    return version(package)


def _python() -> Check:
    return Check("python", OK, f"{platform.python_version()} ({sys.executable}), {platform.platform()}", needed=True)


def _package() -> Check:
    import dflash_rs

    return Check("dflash-rs", OK, f"{dflash_rs.__version__} in {Path(dflash_rs.__file__).parent}", needed=True)


def _core() -> Check:
    if importlib.util.find_spec("dflash_rs._core") is None:
        return Check("core", MISSING, "the compiled Rust extension is not installed", REINSTALL, needed=True)
    core = importlib.import_module("dflash_rs._core")
    return Check("core", OK, f"Rust extension {getattr(core, '__version__', '')}".rstrip(), needed=True)


def _cpu() -> Check:
    from dflash_rs.bench.report import cpu_model, usable_cpus

    detail = f"{cpu_model()}, {usable_cpus()} cores"
    if importlib.util.find_spec("dflash_rs._core") is not None:
        from dflash_rs import _core

        try:
            used, widest = _core.cpu_isa(), _core.cpu_isas()[-1]
        except ValueError as error:
            return Check("cpu", BROKEN, f"{detail}, {error}", "unset DFLASH_CPU_ISA")
        detail += f", kernels for {used}" + ("" if used == widest else f" (DFLASH_CPU_ISA; the processor has {widest})")
    if importlib.util.find_spec("torch") is not None:
        import torch

        detail += f", torch's for {torch.backends.cpu.get_cpu_capability().lower()}"
    threads = os.environ.get("OMP_NUM_THREADS")
    detail += f", OMP_NUM_THREADS={threads}" if threads else ""
    return Check("cpu", OK, detail)


def _extra(name: str, of: tuple[str, str]) -> Check:
    extra, purpose = of
    if importlib.util.find_spec(name) is None:
        return Check(name, ABSENT, f"not installed; {purpose}", extras.install(extra))
    return _module(name, extra, False)


def _module(name: str, extra: str, needed: bool) -> Check:
    version = _version(name)
    if version is None or importlib.util.find_spec(name) is None:
        return Check(name, MISSING if needed else ABSENT, "not installed", extras.install(extra), needed)
    module = importlib.import_module(name)
    detail = version
    if name == "torch":
        detail += f", {module.get_num_threads()} threads, " + (
            f"CUDA {module.version.cuda} build" if module.version.cuda else "CPU build"
        )
    return Check(name, OK, detail, needed=needed)


def _gpu() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", ABSENT, "cannot be seen without torch", extras.install("torch"))
    import torch

    if not torch.cuda.is_available():
        why = "none found" if torch.version.cuda else "this torch is a CPU build"
        return Check("gpu", ABSENT, f"{why}; the CPU is used")
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    return Check(
        "gpu",
        OK,
        f"{torch.cuda.get_device_name(0)}, sm_{major}{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
    )


def _kernels() -> Check:
    # A fact about the build, not about the machine.
    built = _cuda_info()
    if not built["architectures"]:
        return Check(
            "kernels", OK, "host (Rust); this build contains no CUDA kernels: no nvcc was found when it was built"
        )
    detail = f"host (Rust) and CUDA: {' '.join(built['architectures'])}, {built['fatbin_bytes'] / 1e6:.2f} MB, nvcc {built['nvcc']}"
    return Check("kernels", OK, detail)


def _cuda_driver() -> Check:
    found = _cuda_info()
    if found["driver_error"] is not None:
        # Which driver is needed depends on the nvcc, so a build without kernels needs none.
        detail = found["driver_error"] if found["architectures"] else "none needed: this build contains no CUDA kernels"
        return Check("cuda driver", ABSENT, detail)
    if not found["devices"]:
        return Check("cuda driver", ABSENT, f"CUDA {found['driver']}, no GPU")
    parts, unfit = [], False
    for device in found["devices"]:
        major, minor = device["capability"]
        unfit |= not device["supported"]
        parts.append(f"{device['name']} (sm_{major}{minor}{'' if device['supported'] else ', no kernels for it'})")
    detail = f"CUDA {found['driver']}, {', '.join(parts)}"
    if unfit:
        options = "--force-reinstall" + ("" if extras.clone() else " --no-binary dflash-rs")
        fix = f"DFLASH_CUDA=1 {extras.install(options=options)} (docs/guide.md, CUDA kernels)"
        return Check("cuda driver", ABSENT, detail, fix)
    return Check("cuda driver", OK, detail)


def _cuda_info() -> dict[str, Any]:
    from dflash_rs import _core

    return _core.cuda_info()


def _sglang() -> Check:
    version = _version("sglang")
    if version is None:
        from dflash_rs.sglang import compat

        fix = f"{compat.INSTALL} (docs/sglang.md, Install)"
        return Check("sglang", ABSENT, "not installed; only needed for serving", fix)
    return Check("sglang", OK, f"{version}; dflash-rs doctor --sglang looks closer")


def _reference() -> Check:
    from dflash_rs.bench.reference import INSTALL

    version = _version("dflash")
    if version is None:
        return Check("reference loop", ABSENT, "only needed for bench --suite reference", INSTALL)
    return Check("reference loop", OK, f"dflash {version}")


ASSETS = (
    "target/config.json",
    "target/model.safetensors",
    "target/tokenizer.json",
    "draft/config.json",
    "draft/model.safetensors",
    "prompts.json",
    "MODEL_CARD.md",
)


def _assets() -> Check:
    root = resources.files("dflash_rs") / "assets"
    lost = [name for name in ASSETS if not (root / name).is_file()]
    if lost:
        detail = f"{', '.join(lost)} not found in {root}"
        return Check("bundled pair", MISSING, detail, REINSTALL)
    size = sum(len((root / name).read_bytes()) for name in ASSETS)
    return Check("bundled pair", OK, f"{size / 1e6:.1f} MB in {root}")


def _generation() -> Check:
    missing = [name for name in _RUN_TIME if importlib.util.find_spec(name) is None]
    if missing:
        return Check("generation", MISSING, f"needs {', '.join(missing)}", extras.install("torch"), needed=True)
    from dflash_rs import LLM, SamplingParams

    llm = LLM()
    try:
        params = SamplingParams(max_tokens=24)
        fast = llm.generate("def main():", params)[0]
        plain = llm.generate("def main():", params, draft=False)[0]
    finally:
        llm.close()
    if list(fast.token_ids) != list(plain.token_ids):
        return Check(
            "generation", BROKEN, "the text changes with drafting", "dflash-rs bench --suite demo", needed=True
        )
    detail = f"{len(fast.token_ids)} tokens, tau {fast.metrics['tau']:.2f}, same text without drafting"
    return Check("generation", OK, detail, needed=True)

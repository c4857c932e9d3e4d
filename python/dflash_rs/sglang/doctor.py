"""`dflash-rs doctor --sglang`: would SGLang serve with DFLASH_RS here? Found through the entry point group ``dflash_rs.doctor``."""

from __future__ import annotations

from dflash_rs.doctor import BROKEN, MISSING, OK, Check
from dflash_rs.sglang import ALGORITHM, compat, config


def examine() -> list[Check]:
    """Every check, in reading order; none of them raises, and each later one needs the earlier ones: without SGLang there is one."""
    checks = []
    if compat.version() is None:
        return [_version("sglang")]
    for name, step in (
        ("sglang", _version),
        ("seams", _seams),
        ("plugin", _plugin),
        ("answers", _answers),
        ("options", _options),
        ("device", _device),
    ):
        try:
            checks.append(step(name))
        except Exception as error:
            checks.append(Check(name, BROKEN, f"{type(error).__name__}: {error}", needed=True))
    return checks


def _version(name: str) -> Check:
    have, wanted = compat.version(), compat.INSTALL
    if have is None:
        return Check(name, MISSING, "not installed", wanted, needed=True)
    if have not in compat.TESTED:
        return Check(name, BROKEN, f"{have}, tested with {', '.join(compat.TESTED)}", wanted, needed=True)
    return Check(name, OK, f"{have}, a version the tests ran on", needed=True)


def _seams(name: str) -> Check:
    if found := compat.problems():
        return Check(name, BROKEN, "; ".join(found), compat.INSTALL, needed=True)
    return Check(name, OK, f"all {len(compat.seams.METHODS)} methods that are overridden look as expected", needed=True)


def _plugin(name: str) -> Check:
    from sglang.srt.plugins import load_plugins

    from dflash_rs.sglang import algorithm

    load_plugins()
    algorithm.require_registered()
    return Check(name, OK, f"{ALGORITHM} is registered, requests are checked", needed=True)


def _answers(name: str) -> Check:
    from dflash_rs.sglang import algorithm

    if missing := algorithm.missing_answers():
        return Check(
            name, BROKEN, f"SGLang asks an algorithm for {', '.join(missing)}; {ALGORITHM} has none", needed=True
        )
    return Check(name, OK, "every question of SGLang's algorithms is answered", needed=True)


def _options(name: str) -> Check:
    return Check(name, OK, f"{config.VARIABLE}: {config.load()}", needed=True)


def _device(name: str) -> Check:
    import torch
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree():
        ask = getattr(current_platform, "supports_speculative_algorithm", None)
        fits = ask is None or ask("DFLASH")
        return Check(name, OK if fits else BROKEN, f"platform {type(current_platform).__name__}", needed=True)
    if not torch.cuda.is_available():
        detail = "no GPU that torch can use; SGLang's own CPU platform does not speculate with drafters"
        return Check(name, MISSING, detail, "a machine with a CUDA GPU", needed=True)
    return Check(name, OK, torch.cuda.get_device_name(0), needed=True)

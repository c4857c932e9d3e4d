"""The structures of cuda/params.h as ctypes and NumPy see them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "cuda" / "params.h"


def header_structures() -> dict[str, type[ctypes.Structure]]:
    """The structures of cuda/params.h, for reading what was passed."""
    text = re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8")).split("#ifdef __cplusplus")[0]
    plain = {
        "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
        "float": ctypes.c_float,
    }  # fmt: skip
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(?:struct )?(\w+)\s*(.*)", declaration, re.DOTALL).groups()
            for one in names.split(","):
                field, count = re.fullmatch(r"\s*\**\s*(\w+)(?:\[(\d+)\])?", one).groups()
                base = ctypes.c_uint64 if "*" in one else plain.get(kind) or found[kind]
                fields.append((field, base * int(count) if count else base))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found

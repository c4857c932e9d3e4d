"""A tokenizer that transformers knows, looked through before it is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import CheckpointError
from .folder import is_hub_name, target_folder
from .reading import read_json, read_object, readable, short

_TOKENIZER_JSON = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def load_tokenizer(path: str | Path):
    """The tokenizer of a folder or hub name. Raises CheckpointError where there is none, or only its own code could run it."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    folder = target_folder(path, "tokenizer", weights=False)
    with readable(path, "tokenizer"):
        for name in _TOKENIZER_JSON:
            if (folder / name).exists():
                (read_json if name == "vocab.json" else read_object)(folder / name, "part of a tokenizer")
        file = folder / "tokenizer_config.json"
        about = read_object(file, "a tokenizer's settings") if file.exists() else {}
        own = about.get("auto_map")
        own = own.get("AutoTokenizer") if isinstance(own, dict) else own
        kind = about.get("tokenizer_class")
        if not isinstance(kind, str | None):
            raise CheckpointError(f"tokenizer {path}: {file.name}: tokenizer_class: got {short(kind)}, expected a name")
        spellings = () if kind is None else (kind, kind.removesuffix("Fast"), kind + "Fast")
        if own is not None and all(tokenizer_class_from_name(spelling) is None for spelling in spellings):
            raise CheckpointError(
                f"tokenizer {path}: {file.name}: auto_map: got {short(own)}, expected a tokenizer_class that transformers knows: "
                f"{kind or 'this one'} needs the checkpoint's own code, which is not run"
            )
        for key in ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files"):
            given = about.get(key)
            for other in given if isinstance(given, list) else [given]:
                # Many configurations remember where their author's file lay; only where there is one now would it be read.
                if isinstance(other, str) and re.search(r"[/\\]", other) and (folder / other).exists():
                    raise CheckpointError(
                        f"tokenizer {path}: {file.name}: {key}: got {short(other)}, expected a file in the folder"
                    )
        # By the hub's name, where that is what was given: transformers knows some repositories whose settings are wrong.
        tokenizer = AutoTokenizer.from_pretrained(path if is_hub_name(path) else folder, trust_remote_code=False)
        if not tokenizer("a").input_ids:
            raise CheckpointError(
                f"tokenizer {path}: it turns 'a' into no token, expected a tokenizer.json in the folder"
            )
        return tokenizer

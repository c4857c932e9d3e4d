"""Python source files as a training corpus: collecting, splitting by file, tokenising.

Promises:
- *held-out files are kept apart by name*, before anything is trained, by a hash of the path inside its root: the split does
  not depend on the order of files, on other files, or on a seed;
- a corpus is described by its manifest (path, bytes, SHA-256 of every file), so that a model card can say exactly what a model saw;
- tokens are stored flat as ``uint16``, one end-of-text token before every file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
END_OF_TEXT_ID = 0
MASK_ID = 1

# The pre-tokeniser of Qwen2: contractions, letters, single digits, punctuation runs, newlines, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tables rather than code: they teach nothing about programs and crowd out what does.
_TABLE_FOLDERS = ("encodings", "pydoc_data", "site-packages", "__pycache__", "__phello__")
_MAX_FILE_BYTES = 300_000
_MAX_MEAN_LINE = 90
_MAX_NON_ASCII = 0.02


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: its path inside its root, its text, and whether it is kept for evaluation."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str, percent: float) -> bool:
    """Whether the file called `name` (path inside its root, forward slashes) belongs to the evaluation split."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < percent / 100 * 2**32


def looks_like_program(text: str) -> bool:
    """Whether a file is worth training on: parses, is mostly ASCII, and is not a table or generated data."""
    if not text or len(text) > _MAX_FILE_BYTES:
        return False
    lines = text.count("\n") + 1
    if len(text) / lines > _MAX_MEAN_LINE:
        return False
    if sum(c > "\x7f" for c in text) > _MAX_NON_ASCII * len(text):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def collect(roots: list[Path], held_out_percent: float = 2.0) -> list[SourceFile]:
    """Reads every ``*.py`` file under `roots` that looks like a program, in the order of its name; duplicates once."""
    if not 0 < held_out_percent < 50:
        raise ValueError(f"held_out_percent: got {held_out_percent}, expected a value in (0, 50)")
    files: list[SourceFile] = []
    seen: set[bytes] = set()
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"data root: got {root}, expected an existing directory")
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if any(part in _TABLE_FOLDERS for part in relative.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            text = text.replace("\r\n", "\n").expandtabs(8)
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or not looks_like_program(text):
                continue
            seen.add(digest)
            name = relative.as_posix()
            files.append(SourceFile(name, text, is_held_out(name, held_out_percent)))
    if not any(f.held_out for f in files) or all(f.held_out for f in files):
        raise ValueError(f"data roots: got {len(files)} usable files in {roots}, too few to hold some out")
    return files


def standard_library() -> Path:
    """The directory of the standard library of the running CPython, its test suite included (PSF licence)."""
    return Path(sysconfig.get_paths()["stdlib"])


def train_tokenizer(files: list[SourceFile], vocab_size: int):
    """Trains a byte-level BPE on the training files. Ids 0 and 1 are end of text and mask; returns a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in files if not f.held_out), trainer)
    return tokenizer


def encode(tokenizer, files: list[SourceFile]) -> np.ndarray:
    """Tokenises files into one flat ``uint16`` array, an end-of-text token before each file."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= 2**16:
        raise ValueError(f"tokenizer: got id {largest}, expected ids below {2**16}")
    parts = []
    for encoding in tokenizer.encode_batch([f.text for f in files], add_special_tokens=False):
        parts.append(np.asarray([END_OF_TEXT_ID, *encoding.ids], dtype=np.uint16))
    return np.concatenate(parts)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Writes the tokenizer in the form that `transformers.AutoTokenizer` loads."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def same_tokenizer(path: str | Path, vocab_size: int):
    """The tokenizer of a target that this package has trained, to be used again. Raises ValueError for any other."""
    from ..models.checkpoint import load_tokenizer

    found = load_tokenizer(path)
    tokenizer = getattr(found, "backend_tokenizer", None)
    ids = None if tokenizer is None else [tokenizer.token_to_id(token) for token in (END_OF_TEXT, MASK)]
    if ids != [END_OF_TEXT_ID, MASK_ID]:
        raise ValueError(
            f"tokenizer: {path} has ids {ids} for {END_OF_TEXT} and {MASK}, expected {END_OF_TEXT_ID} and {MASK_ID}, as `train target` has them"
        )
    if len(found) > vocab_size:
        raise ValueError(f"tokenizer: {path} has {len(found)} entries, expected at most vocab_size={vocab_size}")
    return tokenizer


def prepare(
    out: Path, roots: list[Path], vocab_size: int, held_out_percent: float, given: str | Path | None = None
) -> None:
    """Collects, trains the tokenizer, encodes both splits and writes the manifest into `out` (skipped when it is there).

    `given`: a folder or model whose tokenizer is taken instead. Raises ValueError where a corpus is there with another.

    Writes ``train.npy``, ``held_out.npy`` (flat ``uint16``), ``tokenizer/``, ``manifest.json`` and ``held_out.json``
    (name and text of every held-out file). The manifest comes last: a folder without it is not a corpus.
    """
    tokenizer = None if given is None else same_tokenizer(given, vocab_size)
    if (out / "manifest.json").exists():
        if tokenizer is not None and same_tokenizer(out / "tokenizer", vocab_size).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"corpus: {out} was made with another tokenizer than that of {given}; choose another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    files = collect(roots, held_out_percent)
    if tokenizer is None:
        tokenizer = train_tokenizer(files, vocab_size)
    save_tokenizer(tokenizer, out / "tokenizer")
    counts = {}
    for split, held_out in (("train", False), ("held_out", True)):
        chosen = [f for f in files if f.held_out == held_out]
        tokens = encode(tokenizer, chosen)
        np.save(out / f"{split}.npy", tokens)
        counts[split] = {
            "files": len(chosen),
            "tokens": int(tokens.size),
            "characters": sum(len(f.text) for f in chosen),
        }
    (out / "held_out.json").write_text(
        json.dumps([{"name": f.name, "text": f.text} for f in files if f.held_out]), encoding="utf-8"
    )
    manifest = {
        "splits": counts,
        "held_out_percent": held_out_percent,
        "files": [
            {
                "name": f.name,
                "bytes": len(f.text.encode()),
                "sha256": hashlib.sha256(f.text.encode()).hexdigest(),
                "held_out": f.held_out,
            }
            for f in files
        ],
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

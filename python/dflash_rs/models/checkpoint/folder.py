"""Where a checkpoint is: a folder, a public model by name, a GGUF file, or a repository of the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ... import known_models
from ...errors import CheckpointError, InvalidArgument
from .reading import CONFIG, read_object, readable, short
from .tensors import INDICES, SINGLES, from_index, tensor_files

_HUB_SMALL = ("*.json", "*.txt", "*.model", "*.tiktoken")


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` is no folder here and reads as a name at the hub: `name` or `owner/name`."""
    if known_models.find(path) is not None:
        return False
    text = path.as_posix() if isinstance(path, Path) else path
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def target_folder(path: str | Path, what: str = "target", weights: bool = True) -> Path:
    """The folder of a target: `path` itself, or a copy of the hub's repository of this name. Raises CheckpointError."""
    if not isinstance(path, str | Path):
        raise InvalidArgument(f"model: got {short(path)}, expected a folder or a hub name")
    with readable(path, what):
        folder = Path(path)
        if str(path) and folder.is_dir():
            return folder
        if known := known_models.find(path):
            return known_models.folder_of(known)
        if folder.suffix == ".gguf" and folder.is_file():
            return known_models.converted(folder, lambda text: print(text, file=sys.stderr))
        if str(path) and folder.exists():
            raise CheckpointError(f"{what} {path}: got a file, expected a folder with {CONFIG} and weights")
        if not is_hub_name(path):
            raise CheckpointError(f"{what} {path}: there is no such folder")
        name = folder.as_posix()
        folder = _fetched(name, what, list(_HUB_SMALL))
        if not weights:
            return folder
        explicit = read_object(folder / CONFIG, "a model's configuration").get("transformers_weights")
        for single in SINGLES[:1] if explicit is not None else SINGLES:
            # One kind of weights only: many repositories have them in several forms.
            files = tensor_files(folder, explicit) if explicit is not None else _hub_files(folder, single)
            wanted = sorted({file.name for file in files})
            folder = _fetched(name, what, [*_HUB_SMALL, *wanted])
            if all((folder / file).is_file() for file in wanted):
                break
        return folder


def _fetched(name: str, what: str, files: list[str]) -> Path:
    """A copy of some files of a repository of the hub. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what} {name}: there is no such folder here, and no such repository at the Hugging Face hub, or none that may be read without a token"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{what} {name}: there is no such folder here, and the Hugging Face hub cannot be reached, expected a folder, or a repository that was "
            f"fetched before (hf download {name})"
        ) from error


def _hub_files(folder: Path, single: str) -> dict[Path, list[str]]:
    index = folder / INDICES[SINGLES.index(single)]
    return from_index(index) if index.is_file() else {folder / single: []}

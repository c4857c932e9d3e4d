"""A piece of a drafter's training that ends in time and can be gone on with: ENVIRONMENT/bin/python train.py --work DIR --out DIR --minutes N

    1. the target, out of the package beside this file (`dflash-rs models get`)
    2. its texts, `dflash-rs train responses`: whole shards
    3. the drafter, `dflash-rs train drafter`: to a step with a checkpoint
    4. what has come of it, into the folder OUT: always, also after a mistake

Call it again with the same --work until it says "finished". OUT gets parts (`parts.py join OUT FOLDER` unpacks them) of a folder with the drafter as it
is, its ``training.json``, the texts and what was said (``log.txt``), and ``state.json`` beside them. Features stay in --work, and so does
``checkpoint.pt`` without --with-checkpoint. On a fresh machine, --from FOLDER begins with such a folder: the texts are there, and the training
goes on from its checkpoint; without one it can only begin anew (`--drafter "--init-from FOLDER/drafter"` begins from those weights).

Options of the two commands are passed on, each in one word: --responses "--sequences 6400 --seq-len 512", --drafter "--steps 4000".

Exit code 0: the piece ended as it should, finished or not; 1: a command failed, its words are in the log; 2: it ran past its time and was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import parts  # noqa: E402

# Of every piece this much is for what comes after the commands, and an interrupted one has as long to write its checkpoint.
SPARE_SECONDS = 20
RESPONSES = (
    "--own-prompts --sequences 6400 --batch-size 256 --at-once 256 --seq-len 512 --max-prompt 128 --dtype bfloat16"
)
DRAFTER = "--taps 1,8,14,21,27 --mask-token-id 16 --seq-len 512 --batch-size 16 --steps 4000 --draft-vocab 8192"
KEPT = ("model.safetensors", "config.json", "draft_vocab.json", "training.json")


class Late(Exception):
    """A command ran past the piece's time."""


class Failed(Exception):
    """A command ended with a mistake."""


class Piece:
    """What is left of the time, and the log."""

    def __init__(self, work: Path, minutes: float):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.log = work, work / "log.txt"
        self._end = time.monotonic() + 60 * minutes - SPARE_SECONDS

    @property
    def minutes(self) -> float:
        """Left for the next command."""
        return max(0.0, (self._end - time.monotonic()) / 60)

    def say(self, line: str) -> None:
        """Shows a line and notes it."""
        print(line, flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def run(self, *words: object) -> str:
        """What a command of this package says, which also goes to the log. Interrupted once the time is over, which it survives."""
        command = [sys.executable, "-m", "dflash_rs", *map(str, words)]
        self.say("+ dflash-rs " + shlex.join(command[3:]))
        environment = os.environ | {"DFLASH_RS_HOME": str(self.work / "models"), "HF_HUB_OFFLINE": "1"}
        begin = self.log.stat().st_size
        with open(self.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.work)
            try:
                code = process.wait(timeout=60 * self.minutes + SPARE_SECONDS / 2)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=SPARE_SECONDS / 4)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise Late(f"interrupted: {shlex.join(command[3:6])}") from None
        said = self.log.read_bytes()[begin:].decode("utf-8", errors="replace")
        if code:
            tail = "\n".join(said.splitlines()[-15:])
            raise Failed(f"dflash-rs {shlex.join(command[3:5])} ended with exit code {code}:\n{tail}")
        return said


def shards(work: Path) -> int:
    """Shards of texts that are written."""
    return len(list((work / "responses").glob("shard-*.npz")))


def trained(drafter: Path) -> tuple[int, int]:
    """Steps done and wanted; none before the first."""
    path = drafter / "training.json"
    if not path.is_file():
        return 0, 0
    notes = json.loads(path.read_text(encoding="utf-8"))
    return notes["report"]["steps"], notes["settings"]["steps"]


def go_on(piece: Piece, args: argparse.Namespace) -> bool:
    """The stages as far as the time goes; whether all of it is done."""
    work = piece.work
    if args.package is not None and not (work / "models").is_dir():
        piece.run("models", "get", args.target, "--from", args.package.resolve())
    before = shards(work)
    if not (work / "responses.done").is_file():
        words = ["train", "responses", "--target", args.target, "--out", "responses", "--device", args.device]
        said = piece.run(*words, "--minutes", f"{piece.minutes:.3f}", *shlex.split(args.responses))
        piece.say(f"{shards(work)} shards of texts, {shards(work) - before} of them in this piece")
        if "shards are missing" in said:
            return False
        (work / "responses.done").touch()
    words = [
        "train",
        "drafter",
        "--target",
        args.target,
        "--responses",
        "responses",
        "--out",
        "drafter",
        "--device",
        args.device,
    ]
    if args.store_features:
        words += ["--store-features", "features"]
    piece.run(*words, "--minutes", f"{piece.minutes:.3f}", *shlex.split(args.drafter))
    done, wanted = trained(work / "drafter")
    piece.say(f"{done} of {wanted} steps")
    return done == wanted


def carry_out(piece: Piece, out: Path, finished: bool, checkpoint: bool, part_mib: float) -> None:
    """Writes what has come of it so far."""
    work, out = piece.work, out.resolve()
    names = [*KEPT, *(["checkpoint.pt"] if checkpoint else [])]
    found = [(work / "drafter" / name, f"drafter/{name}") for name in names]
    found += [
        (path, f"responses/{path.name}") for path in sorted((work / "responses").glob("*")) if path.suffix != ".tmp"
    ]
    found += [(work / name, name) for name in ("responses.done", "log.txt")]
    done, wanted = trained(work / "drafter")
    cut = parts.split([pair for pair in found if pair[0].is_file()], out, "state", int(part_mib * parts.MIB))
    state = {"finished": finished, "shards": shards(work), "steps": done, "steps_wanted": wanted, "parts": len(cut)}
    (out / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    shutil.copy(piece.log, out / "log.txt")
    print(f"{'finished' if finished else 'not finished'}: {json.dumps(state)}: {out}")


def begin_from(folder: Path, work: Path) -> None:
    """Takes over what an earlier machine's parts were unpacked to, into a work folder that is new."""
    if (work / "responses").exists() or (work / "drafter").exists():
        raise Failed(f"--from: {work} holds work already, expected an empty --work")
    if not (folder / "responses").is_dir():
        raise Failed(f"--from: got {folder}, which has no folder `responses`, expected what `parts.py join` unpacked")
    shutil.copytree(folder, work, dirs_exist_ok=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--work", type=Path, required=True, metavar="DIR", help="texts, features, checkpoints; the same for every piece"
    )
    add("--out", type=Path, default=os.environ.get("OUT"), metavar="DIR", help="what is carried away; default: $OUT")
    add("--minutes", type=float, default=9.0, metavar="N", help="of this piece, all of it; default: %(default)s")
    add("--target", default="smollm2", metavar="MODEL", help="folder or name of a known model; default: %(default)s")
    add("--package", type=Path, metavar="WHEEL", help="of a known model; default: the one beside this file")
    add("--from", type=Path, dest="begin", metavar="FOLDER", help="begin with this, out of an earlier machine's parts")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    add("--responses", default=RESPONSES, metavar="OPTIONS", help="default: %(default)s")
    add("--drafter", default=DRAFTER, metavar="OPTIONS", help="default: %(default)s")
    add("--store-features", action="store_true", help="keep in --work what the target makes of the texts")
    add(
        "--with-checkpoint",
        action="store_true",
        help="carry checkpoint.pt away as well: float32, four times the drafter and more",
    )
    add("--part-mib", type=float, default=15.0, metavar="MIB", help="largest part of OUT; default: %(default)s")
    args = parser.parse_args()
    if args.out is None:
        parser.error("--out: got none, expected a folder (or $OUT)")
    if not args.minutes > SPARE_SECONDS / 60:
        parser.error(f"--minutes: got {args.minutes:g}, expected more than {SPARE_SECONDS / 60:.2f}")
    if args.package is None:
        args.package = next(iter(sorted((HERE / "models").glob("*.whl"))), None) if args.target == "smollm2" else None
    piece = Piece(args.work.resolve(), args.minutes)
    finished, code = False, 0
    try:
        if args.begin is not None:
            begin_from(args.begin, piece.work)
        finished = go_on(piece, args)
    except Failed as error:
        piece.say(str(error))
        code = 1
    except Late as error:
        piece.say(str(error))
        code = 2
    carry_out(piece, Path(args.out), finished, args.with_checkpoint, args.part_mib)
    return code


if __name__ == "__main__":
    sys.exit(main())

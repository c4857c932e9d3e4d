"""Runs commands side by side, each a lane of its own, and prints what they say one lane after the other.

    python scripts/lanes.py 'make lint' 'make sglang-test'

The first lane is printed as it goes, the others when the lanes before them are done. Exit code 1 when any lane failed; every lane runs
to its end, so that one failure does not hide another. Ctrl-C ends all of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time


def main(commands: list[str]) -> int:
    """Exit code of the whole."""
    if not commands:
        print(__doc__, file=sys.stderr)
        return 2
    began = time.monotonic()
    logs = [None, *(tempfile.TemporaryFile() for _ in commands[1:])]
    lanes = [
        subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=log, stderr=None if log is None else subprocess.STDOUT
        )
        for command, log in zip(commands, logs)
    ]
    failed = []
    try:
        for command, log, lane in zip(commands, logs, lanes):
            code = lane.wait()
            if log is not None:
                print(f"--- {command}", flush=True)
                log.seek(0)
                shutil.copyfileobj(log, sys.stdout.buffer)
            print(f"--- {command}: exit code {code}, {time.monotonic() - began:.0f} s after the start", flush=True)
            if code:
                failed.append(command)
    except KeyboardInterrupt:
        for lane in lanes:
            lane.wait()
        return 130
    for command in failed:
        print(f"failed: {command}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

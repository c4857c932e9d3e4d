"""`dflash-rs doctor`: says what works here, what is missing and how to get it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dflash_rs.cli import console
from dflash_rs.cli.arguments import EXIT_CODES, FORMATTER, add_debug
from dflash_rs.cli.display import Painter


def add(commands: Any) -> None:
    """Adds the command."""
    doctor = commands.add_parser(
        "doctor",
        help="say what works here, what is missing and how to get it",
        description="Look at this machine and installation; exit code 0 when the bundled pair generates, with --sglang when "
        "SGLang can serve with DFLASH_RS.",
        formatter_class=FORMATTER,
        epilog="examples:\n  dflash-rs doctor\n  dflash-rs doctor --json\n  dflash-rs doctor --sglang\n\n" + EXIT_CODES,
    )
    doctor.add_argument(
        "--sglang", action="store_true", help="look at the SGLang worker instead of the embedded engine"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_debug(doctor)
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`dflash-rs doctor`."""
    from dflash_rs import doctor

    checks = doctor.examine_part("sglang") if args.sglang else doctor.examine()
    job = ("SGLang", "serve") if args.sglang else ("The bundled pair", "generate")
    if args.json:
        console.emit(json.dumps(doctor.to_json(checks), indent=2) + "\n")
    else:
        console.emit(doctor.to_text(checks, Painter.choose("auto", sys.stdout), job) + "\n")
    return console.OK if doctor.works(checks) else console.FAILED

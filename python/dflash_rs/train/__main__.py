"""``python -m dflash_rs.train``: the same as ``dflash-rs train``."""

import argparse
import sys

from .cli import add_parsers

parser = argparse.ArgumentParser(prog="dflash-rs train")
add_parsers(parser.add_subparsers(required=True))
args = parser.parse_args()
sys.exit(args.run(args))

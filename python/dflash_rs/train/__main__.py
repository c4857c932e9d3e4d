"""``python -m dflash_rs.train``: the same as ``dflash-rs train``."""

import sys

from ..cli import main

sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m dflash_rs`: the same as `dflash-rs`."""

import sys

from dflash_rs.cli import main

sys.exit(main())

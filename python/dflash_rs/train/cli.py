"""``dflash-rs train``: the arguments of the two trainings."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path


def _add_settings(parser: argparse.ArgumentParser, cls) -> None:
    """One option per field of a settings dataclass, with the field's default."""
    for f in dataclasses.fields(cls):
        kind = type(f.default)
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=kind, default=f.default, metavar=kind.__name__, help="default: %(default)s"
        )


def _settings(args: argparse.Namespace, cls):
    return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


def add_parsers(subparsers) -> None:
    """Adds ``target`` to the subcommands of ``dflash-rs train``; each sets ``run(args) -> exit code``."""
    from .target import TargetTraining

    target = subparsers.add_parser("target", help="train a small target model on Python source")
    target.add_argument("--data", type=Path, action="append", default=[], metavar="DIR", help="source tree; default: the standard library of this Python")
    target.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="where the prepared corpus is kept")
    target.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints and the finished model")
    target.add_argument("--held-out-percent", type=float, default=2.0)
    target.add_argument("--device", default="auto")
    target.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice")
    target.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    _add_settings(target, TargetTraining)
    target.set_defaults(run=_train_target)


def _train_target(args: argparse.Namespace) -> int:
    import torch

    from . import corpus
    from .target import TargetTraining, train

    if args.threads:
        torch.set_num_threads(args.threads)
    roots = args.data or [corpus.standard_library()]
    corpus.prepare(args.corpus, roots, args.vocab_size, args.held_out_percent)
    report = train(_settings(args, TargetTraining), args.corpus, args.out, args.device, args.save_every)
    print(f"held-out loss {report['held_out_loss']:.3f} nats, {report['parameters']:,} parameters, {args.out}")
    return 0

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
            f"--{f.name.replace('_', '-')}",
            type=kind,
            default=f.default,
            metavar=kind.__name__,
            help="default: %(default)s",
        )


def _settings(args: argparse.Namespace, cls):
    return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


def _add_run(parser: argparse.ArgumentParser, save_every: int) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints and the finished model")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice")
    parser.add_argument("--save-every", type=int, default=save_every, metavar="STEPS")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="matrix products in bfloat16; default: on a GPU. With avx512_bf16 the products are 2 to 2.8 times faster",
    )


def _corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="the prepared corpus")


def add_parsers(subparsers) -> None:
    """Adds target, responses, drafter, prompts to ``dflash-rs train``; each sets ``run(args) -> exit code``."""
    from .drafter import DrafterTraining
    from .responses import ResponseSettings
    from .target import TargetTraining

    target = subparsers.add_parser("target", help="train a small target model on Python source")
    _corpus(target)
    target.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="source tree to prepare the corpus from, may be repeated; default: the standard library of this Python",
    )
    target.add_argument("--held-out-percent", type=float, default=2.0, help="share of files kept for evaluation")
    _add_run(target, save_every=200)
    _add_settings(target, TargetTraining)
    target.set_defaults(run=_train_target)

    own = subparsers.add_parser("responses", help="let the target write the sequences its drafter is trained on")
    own.add_argument("--target", type=Path, required=True, metavar="DIR")
    _corpus(own)
    own.add_argument("--out", type=Path, required=True, metavar="DIR", help="shards of sequences; resumable")
    own.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice")
    own.add_argument("--part", default="0/1", metavar="K/N", help="the K-th of N processes that share the work")
    _add_settings(own, ResponseSettings)
    own.set_defaults(run=_responses)

    drafter = subparsers.add_parser("drafter", help="train a DFlash drafter for a target")
    drafter.add_argument("--target", type=Path, required=True, metavar="DIR")
    drafter.add_argument("--responses", type=Path, required=True, metavar="DIR", help="written by `train responses`")
    _corpus(drafter)
    _add_run(drafter, save_every=250)
    _add_settings(drafter, DrafterTraining)
    drafter.set_defaults(run=_train_drafter)

    prompts = subparsers.add_parser("prompts", help="cut held-out prompts for demonstrations and benchmarks")
    _corpus(prompts)
    prompts.add_argument("--out", type=Path, required=True, metavar="FILE")
    prompts.add_argument("--count", type=int, default=48)
    prompts.set_defaults(run=_prompts)

    report = subparsers.add_parser(
        "report", help="held-out loop tau of a pair: greedy and sampled, beside an n-gram look-up"
    )
    report.add_argument("--target", type=Path, required=True, metavar="DIR")
    report.add_argument("--draft", type=Path, required=True, metavar="DIR")
    report.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="written by `train prompts`")
    report.add_argument("--max-tokens", type=int, default=128)
    report.set_defaults(run=_report)


def _threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def _train_target(args: argparse.Namespace) -> int:
    from . import corpus
    from .target import TargetTraining, train

    _threads(args)
    settings = _settings(args, TargetTraining)
    corpus.prepare(args.corpus, args.data or [corpus.standard_library()], settings.vocab_size, args.held_out_percent)
    report = train(settings, args.corpus, args.out, args.device, args.save_every, args.bf16)
    print(f"held-out loss {report['held_out_loss']:.3f} nats, {report['parameters']:,} parameters: {args.out}")
    return 0


def _responses(args: argparse.Namespace) -> int:
    from .responses import ResponseSettings, generate

    _threads(args)
    part = args.part.split("/")
    if len(part) != 2 or not all(p.isdigit() for p in part):
        raise ValueError(f"part: got {args.part!r}, expected K/N, for example 0/2")
    generate(args.target, args.corpus, args.out, _settings(args, ResponseSettings), (int(part[0]), int(part[1])))
    return 0


def _train_drafter(args: argparse.Namespace) -> int:
    from .drafter import DrafterTraining, train

    _threads(args)
    settings = _settings(args, DrafterTraining)
    train(settings, args.target, args.responses, args.corpus, args.out, args.device, args.save_every, args.bf16)
    print(f"drafter after {settings.steps} steps: {args.out}; measure it with `dflash-rs train report`")
    return 0


def _prompts(args: argparse.Namespace) -> int:
    import json

    from .prompts import held_out_prompts

    args.out.write_text(json.dumps(held_out_prompts(args.corpus, args.count), indent=1) + "\n", encoding="utf-8")
    return 0


def _report(args: argparse.Namespace) -> int:
    import json

    from .report import loop_report

    print(json.dumps(loop_report(args.target, args.draft, args.prompts, args.max_tokens), indent=1))
    return 0

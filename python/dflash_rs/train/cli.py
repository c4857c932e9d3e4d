"""``dflash-rs train``: the arguments of the two trainings. Needs no torch until one of them runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

from ..arguments import thread_count
from ..errors import DflashError, InvalidArgument
from .settings import DrafterTraining, MtpTraining, ResponseSettings, TargetTraining

_HELP = {
    "anchors": "random blocks per sequence",
    "balance": "weight of the loss that keeps experts equally busy",
    "batch_size": "sequences per step, or per shard",
    "block_size": "tokens of a block, the anchor counted",
    "conv_group_size": "with --selector-rank: channels that share the part of a convolution that depends on its input",
    "conv_kernel_size": "with --selector-rank: tokens of a block that its convolutions see, the last its own",
    "decay": "share of the steps over which the learning rate falls",
    "draft_vocab": "tokens it will propose, the most frequent of the responses; 0: all",
    "expert_size": "units of an expert",
    "experts_per_token": "experts that a token goes through, beside the shared one",
    "gamma": "slot k of a block weighs exp(-(k-1)/gamma)",
    "grow_at": "share of the budget after which the model gets all its layers",
    "head_dim": "elements of a head; even",
    "hidden_size": "width of the residual stream",
    "init_from": "folder of a model to go on from",
    "intermediate_size": "width of the MLP; of a drafter, 0: as many units as a token of the target goes through",
    "linear_head_dim": "elements of a head of a gated delta layer",
    "linear_key_heads": "query and key heads of a gated delta layer",
    "linear_value_heads": "value heads of a gated delta layer",
    "lr": "peak learning rate",
    "openings": "JSON lines with category and opening: how user's messages begin that the target writes",
    "turns": "answers of a chat, where the target writes its prompts",
    "mask_token_id": "token that stands for what is to be predicted",
    "max_position_embeddings": "positions the model declares",
    "max_prompt": "longest prompt out of a corpus, longest user's message, tokens",
    "min_prompt": "shortest prompt out of a corpus, tokens",
    "num_experts": "experts of a layer, beside the shared one",
    "num_heads": "query heads",
    "num_kv_heads": "key heads",
    "num_layers": "layers",
    "own_text": "with --corpus: share of the target's own text in a batch, the rest is true text",
    "sampled_vocab": "with --draft-vocab: random tokens that stand for the rest in a step's loss",
    "selector_rank": "width of the codebooks by which a DFlash 2 lets a draft depend on the one before it; 0: a DFlash, without",
    "selector_top_k": "with --selector-rank: candidates of every place that the selector chooses among",
    "seed": "of everything random",
    "seq_len": "tokens of a sequence",
    "sequences": "sequences to write",
    "shape": "qwen3, or qwen3_5_moe: gated delta layers but for every fourth, and experts",
    "shared_expert_size": "units of the expert that every token goes through",
    "soft_labels": "weight of the target's law as label; 0 trains on the tokens alone",
    "start_from": "with --shape qwen3_5_moe: a model of the shape qwen3 to take over what fits",
    "start_layers": "layers to begin with, to be grown; 0 begins with all",
    "steps": "training steps",
    "taps": "target layers whose outputs the drafter reads",
    "teacher": "a model of the same vocabulary whose law is part of the label",
    "teacher_share": "its part; the rest is on the token",
    "temperatures": "sampling temperatures, in turn",
    "tokens": "training tokens in all",
    "train_block_sizes": "block sizes to draw from",
    "vocab_size": "entries of the tokenizer that is trained",
    "warmup": "share of the steps over which the learning rate rises",
    "warmup_steps": "steps over which the learning rate rises",
    "weight_decay": "of the matrices",
}
_METAVAR = {int: "N", float: "X", str: "TEXT"}


def _add_settings(parser: argparse.ArgumentParser, cls) -> None:
    """One option per field of a settings dataclass, with the field's default."""
    for f in dataclasses.fields(cls):
        kind = type(f.default)
        default = "none" if f.default == "" else "%(default)s"
        parser.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=kind,
            default=f.default,
            metavar=_METAVAR[kind],
            help=f"{_HELP[f.name]}; default: {default}",
        )


def _settings(args: argparse.Namespace, cls):
    return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


def _add_run(parser: argparse.ArgumentParser, save_every: int) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints and the finished model")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 keeps torch's choice")
    parser.add_argument(
        "--save-every", type=int, default=save_every, metavar="STEPS", help="between checkpoints; default: %(default)s"
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="matrix products in bfloat16; default: on a GPU. With avx512_bf16 the products are 2 to 2.8 times faster",
    )


def _corpus(parser: argparse.ArgumentParser, required: bool = True, purpose: str = "the prepared corpus") -> None:
    parser.add_argument("--corpus", type=Path, required=required, metavar="DIR", help=purpose)


def _target(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--target", required=True, metavar="MODEL", help=f"{purpose}: folder, hub name or name of a known model"
    )


def _add(subparsers, name: str, purpose: str, *examples: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join(("examples:", *examples)) + "\n\nWhat it does and what to look at: docs/training.md.",
    )


def _shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-target",
        action="store_true",
        help="under torchrun, each process holds its part of the target's layers and gathers the others' as it comes to them: for targets that "
        "fill a GPU; the same numbers, slower",
    )


def _store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-features",
        type=Path,
        metavar="DIR",
        help="compute what the target makes of the responses once and keep it in this folder; default: in every step anew",
    )


def _minutes(parser: argparse.ArgumentParser, stops: str) -> None:
    parser.add_argument(
        "--minutes", type=float, metavar="N", help=f"{stops}; started again, it goes on; default: to the end"
    )


def add_parsers(subparsers) -> None:
    """Adds target, responses, drafter, mtp, prompts and report to ``dflash-rs train``; each sets ``run(args) -> exit code``."""
    for add in (_add_target, _add_responses, _add_drafter, _add_mtp, _add_prompts, _add_report):
        add(subparsers)


def _add_target(subparsers) -> None:
    target = _add(
        subparsers,
        "target",
        "train a small target model on Python source",
        "dflash-rs train target --corpus runs/corpus --out runs/target",
        "dflash-rs train target --data ~/src/project --corpus runs/corpus --out runs/target --tokens 4000000 --bf16",
        "dflash-rs train target --shape qwen3_5_moe --num-layers 8 --tokenizer bundled --teacher bundled --start-from bundled --corpus runs/corpus "
        "--out runs/hybrid",
    )
    _corpus(target)
    target.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="source tree to prepare the corpus from, may be repeated; default: the standard library of this Python",
    )
    target.add_argument(
        "--held-out-percent",
        type=float,
        default=2.0,
        metavar="X",
        help="share of files kept for evaluation; default: %(default)s",
    )
    target.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="take the tokenizer of this target, which `train target` made; default: a new one",
    )
    _add_run(target, save_every=200)
    _add_settings(target, TargetTraining)
    target.set_defaults(run=_clear(_train_target))


def _add_responses(subparsers) -> None:
    own = _add(
        subparsers,
        "responses",
        "let the target write the texts its drafter is trained on",
        "dflash-rs train responses --target runs/target --corpus runs/corpus --out runs/responses",
        "dflash-rs train responses --target smollm2 --own-prompts --seq-len 512 --max-prompt 96 --out runs/responses",
        "dflash-rs train responses --target Qwen/Qwen3-8B --prompts prompts.jsonl --seq-len 2048 --out runs/responses",
        "dflash-rs train responses --target runs/target --corpus runs/corpus --out runs/responses --part 0/2 --threads 1",
    )
    _target(own, "the model that writes")
    prompts_from = own.add_mutually_exclusive_group(required=True)
    prompts_from.add_argument("--corpus", type=Path, metavar="DIR", help="continue windows of a prepared corpus")
    prompts_from.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="answer these: JSON lines with prompt, turns, messages or text, and category",
    )
    prompts_from.add_argument(
        "--own-prompts", action="store_true", help="answer what the target writes as the user of its chat template"
    )
    own.add_argument("--out", type=Path, required=True, metavar="DIR", help="shards of sequences; resumable")
    own.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 keeps torch's choice")
    own.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)")
    own.add_argument(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="as for LLM; bfloat16 is by far the fastest with AMX; default: auto",
    )
    own.add_argument(
        "--part", default="0/1", metavar="K/N", help="the K-th of N processes that share the work, from 0; default: 0/1"
    )
    own.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="sequences of a shard that are written side by side; the texts are the same; default: all of a shard",
    )
    _minutes(own, "begin no shard that would take longer than these minutes allow, but one")
    _add_settings(own, ResponseSettings)
    own.set_defaults(run=_clear(_responses))


def _add_drafter(subparsers) -> None:
    _add_drafters(
        subparsers,
        "drafter",
        "train a DFlash drafter for a target",
        DrafterTraining,
        _train_drafter,
        "dflash-rs train drafter --target runs/target --responses runs/responses --corpus runs/corpus --out runs/draft",
        "dflash-rs train drafter --target smollm2 --responses runs/responses --seq-len 512 --taps 2,8,15,21,27 --mask-token-id 16 --out runs/draft",
    )


def _add_mtp(subparsers) -> None:
    _add_drafters(
        subparsers,
        "mtp",
        "train a multi-token-prediction head for a target",
        MtpTraining,
        _train_mtp,
        "dflash-rs train mtp --target runs/target --responses runs/responses --corpus runs/corpus --out runs/mtp",
        "dflash-rs train mtp --target smollm2 --responses runs/responses --seq-len 512 --block-size 5 --out runs/mtp",
    )


def _add_drafters(subparsers, name: str, told: str, settings: type, run, *examples: str) -> None:
    """A training of whatever drafts for a target."""
    parser = _add(subparsers, name, told, *examples)
    _target(parser, "the model to draft for")
    parser.add_argument("--responses", type=Path, required=True, metavar="DIR", help="written by `train responses`")
    _corpus(parser, False, "a prepared corpus, for true text beside the target's own; default: none")
    _add_run(parser, save_every=250)
    _store(parser)
    _shard(parser)
    _minutes(
        parser, "stop after the step that ends behind these minutes, with a checkpoint and the drafter as it is then"
    )
    _add_settings(parser, settings)
    parser.set_defaults(run=_clear(run))


def _add_prompts(subparsers) -> None:
    prompts = _add(
        subparsers,
        "prompts",
        "cut held-out prompts for demonstrations and benchmarks",
        "dflash-rs train prompts --corpus runs/corpus --out runs/prompts.json --count 48",
    )
    _corpus(prompts)
    prompts.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    prompts.add_argument("--count", type=int, default=48, metavar="N", help="prompts; default: %(default)s")
    prompts.set_defaults(run=_clear(_prompts))


def _add_report(subparsers) -> None:
    report = _add(
        subparsers,
        "report",
        "held-out loop tau of a pair: greedy and sampled, alone, with look-up beside it, and of a look-up alone; of chats by category",
        "dflash-rs train report --target runs/target --draft runs/draft --prompts runs/prompts.json",
        "dflash-rs train report --target smollm2 --draft runs/draft --prompts questions.jsonl",
    )
    _target(report, "the target")
    report.add_argument("--draft", type=Path, required=True, metavar="DIR", help="its drafter, DFlash or MTP")
    report.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="written by `train prompts`, or JSON lines (FILE.jsonl) with id, category, and prompt or turns; default: those of the package",
    )
    report.add_argument("--max-tokens", type=int, default=128, metavar="N", help="per prompt; default: %(default)s")
    report.set_defaults(run=_clear(_report))


_USERS_MISTAKES = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def _clear(run):
    """Mistakes of the user become InvalidArgument, one line and exit code 2; folders are looked for before anything is loaded."""

    @functools.wraps(run)
    def checked(args: argparse.Namespace) -> int:
        made = {"out", "corpus"} if run is _train_target else {"out", "store_features"}
        for name, value in vars(args).items():
            paths = value if isinstance(value, list) else [value]
            for path in paths if name not in made else ():
                if isinstance(path, Path) and not path.exists():
                    raise InvalidArgument(f"--{name}: got {path}, which does not exist")
            for path in paths if name in made and run is not _prompts else ():
                there = next((p for p in (path, *path.parents) if p.exists()), path) if isinstance(path, Path) else None
                if there is not None and there.exists() and not there.is_dir():
                    option = f"--{name.replace('_', '-')}"
                    raise InvalidArgument(
                        f"{option}: got {path}, expected a folder, or where one can be made; {there} is none"
                    )
        for name, least in (("threads", 0), ("save_every", 1), ("count", 1), ("max_tokens", 1)):
            if (value := getattr(args, name, least)) < least:
                raise InvalidArgument(f"--{name.replace('_', '-')}: got {value}, expected at least {least}")
        if getattr(args, "threads", 0):
            thread_count("--threads", args.threads)
        try:
            return run(args)
        except _USERS_MISTAKES as error:
            if isinstance(error, DflashError):
                raise
            if isinstance(error, OSError) and error.filename is not None:
                raise InvalidArgument(f"{error.filename}: cannot be read or made ({error.strerror})") from error
            raise InvalidArgument(str(error)) from error

    return checked


def _threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def _train_target(args: argparse.Namespace) -> int:
    from . import corpus
    from .target import TargetTraining, train

    _threads(args)
    settings = _settings(args, TargetTraining)
    settings.check()
    data = args.data or [corpus.standard_library()]
    corpus.prepare(args.corpus, data, settings.vocab_size, args.held_out_percent, args.tokenizer)
    report = train(settings, args.corpus, args.out, args.device, args.save_every, args.bf16)
    print(f"held-out loss {report['held_out_loss']:.3f} nats, {report['parameters']:,} parameters: {args.out}")
    return 0


def _responses(args: argparse.Namespace) -> int:
    from .responses import ResponseSettings, from_corpus, from_file, from_target, generate

    _threads(args)
    part = args.part.split("/")
    if len(part) != 2 or not all(p.isdigit() for p in part):
        raise ValueError(f"part: got {args.part!r}, expected K/N with 0 <= K < N, for example 0/2")
    source = from_corpus(args.corpus) if args.corpus else from_file(args.prompts) if args.prompts else from_target()
    settings = _settings(args, ResponseSettings)
    missing = generate(
        args.target,
        source,
        args.out,
        settings,
        (int(part[0]), int(part[1])),
        dtype=args.dtype,
        device=args.device,
        at_once=args.at_once,
        minutes=args.minutes,
    )
    if missing:
        print(f"stopped after {args.minutes:g} minutes, {missing} shards are missing: start again to go on")
    return 0


def _training_of(args: argparse.Namespace) -> tuple:
    """What the trainings of every drafter take behind their settings."""
    places = (args.target, args.responses, args.corpus, args.out)
    return (*places, args.device, args.save_every, args.bf16, args.store_features, args.shard_target, args.minutes)


def _told(args: argparse.Namespace, what: str, done: int, steps: int) -> None:
    if done < steps:
        print(
            f"{what} after {done} of {steps} steps: {args.out}; stopped after {args.minutes:g} minutes, start again to go on"
        )
    else:
        print(f"{what} after {done} steps: {args.out}; measure it with `dflash-rs train report`")


def _train_drafter(args: argparse.Namespace) -> int:
    from .drafter import DrafterTraining, train

    _threads(args)
    settings = _settings(args, DrafterTraining)
    report = train(settings, *_training_of(args))
    _told(args, "drafter", report["steps"], settings.steps)
    return 0


def _train_mtp(args: argparse.Namespace) -> int:
    from .mtp import MtpTraining, train

    _threads(args)
    settings = _settings(args, MtpTraining)
    report = train(settings, *_training_of(args))
    _told(args, "head", report["steps"], settings.steps)
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

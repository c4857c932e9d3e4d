"""Trainings in several processes: which GPU each takes, and a target whose layers are spread over them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from dflash_rs import cli  # noqa: E402
from dflash_rs.config import assets  # noqa: E402
from dflash_rs.train import common, drafter  # noqa: E402
from dflash_rs.train.documents import Documents  # noqa: E402


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_process_alone_takes_the_first_gpu_and_each_of_several_one_of_its_own(gpus, monkeypatch):
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda")
    assert common.pick_device("cuda:1") == torch.device("cuda", 1) and common.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for own in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(own))
        assert common.pick_device("auto") == torch.device("cuda", own)
        assert common.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: got 'cuda:1' for every process of torchrun, expected 'auto'"):
        common.pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device: got process 2 of this machine and 2 GPUs"):
        common.pick_device("auto")


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA GPU here"):
        common.pick_device("cuda")


def test_one_process_has_nobody_to_share_a_target_with():
    with pytest.raises(ValueError, match="shard_target: got one process, expected several"):
        drafter.shard(torch.nn.Linear(2, 2), common.Group())


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Texts of the bundled target's vocabulary, some of them kept apart."""
    folder = tmp_path_factory.mktemp("responses")
    generator = torch.Generator().manual_seed(0)
    texts = []
    for i in range(80):
        tokens = torch.randint(2, 4000, (24,), generator=generator).tolist()
        texts.append((tokens, [j >= 4 for j in range(24)], "ab"[i % 2]))
    Documents.of(texts).save(folder / "shard-00000.npz")
    assert len(Documents.load(folder).split()[1])
    return folder


def command(responses: Path, out: Path) -> list[str]:
    words = ["drafter", "--target", str(assets() / "target"), "--responses", str(responses), "--out", str(out)]
    words += ["--taps", "1,8", "--num-layers", "1", "--train-block-sizes", "4"]
    words += [
        "--device",
        "cpu",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--seq-len",
        "32",
        "--anchors",
        "4",
        "--block-size",
        "4",
    ]
    return [*words, "--save-every", "2"]


def in_two_processes(words: list[str]) -> None:
    """Runs a training as torchrun would; what a process says is shown where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dflash_rs.train", *words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    try:
        said = [one.communicate(timeout=900)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0], "\n".join(said)


@pytest.mark.pair
def test_a_target_spread_over_two_processes_trains_the_very_drafter_of_a_whole_one(responses, tmp_path):
    for name, more in (("whole", []), ("spread", ["--shard-target"])):
        in_two_processes([*command(responses, tmp_path / name), *more])
    whole, spread = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "spread"))
    assert set(whole) == set(spread) and all(torch.equal(whole[name], spread[name]) for name in whole)
    histories = [common.load_checkpoint(tmp_path / name / "checkpoint.pt")["history"] for name in ("whole", "spread")]
    assert histories[0] == histories[1] and histories[0][-1]["step"] == 3
    assert all(set(entry["held_out"]) <= {"a", "b"} and entry["held_out"] for entry in histories[0])
    # Both compute their part of the features, of other rows at once: the same up to rounding.
    in_two_processes(
        [*command(responses, tmp_path / "stored"), "--shard-target", "--store-features", str(tmp_path / "f")]
    )
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    for name, values in whole.items():
        torch.testing.assert_close(stored[name].float(), values.float(), atol=2e-3, rtol=2e-2)
    notes = sorted(path.name for path in (tmp_path / "f").glob("captured-*"))
    assert notes == ["captured-0-of-2.json", "captured-1-of-2.json"]


@pytest.mark.pair
def test_a_target_cannot_be_spread_over_one_process(responses, tmp_path, capsys):
    assert cli.main(["train", *command(responses, tmp_path / "out"), "--shard-target"]) == 2
    assert "shard_target: got one process, expected several" in capsys.readouterr().err


SPREAD = """
import sys, torch
from torch.distributed.tensor import DTensor
from dflash_rs.config import assets
from dflash_rs.models.checkpoint import load_causal_lm
from dflash_rs.train.common import Group
from dflash_rs.train.drafter import base_layers, shard
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
target = load_causal_lm(assets() / "target", torch.float32)[0]
tokens = torch.arange(12)[None]
before = target(input_ids=tokens).logits
shard(target, Group(0, 2))
spread = {name for name, p in target.named_parameters() if isinstance(p, DTensor)}
assert spread == {name for name, _ in target.named_parameters() if ".layers." in name}, spread
assert torch.equal(target(input_ids=tokens).logits, before)
torch.distributed.destroy_process_group()
"""


@pytest.mark.pair
def test_the_layers_are_spread_and_what_the_drafter_reads_stays_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, str(tmp_path / "meet")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

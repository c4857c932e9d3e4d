"""The command with the bundled pair: text, exit codes, damaged checkpoints; from the outside where processes matter."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

from dflash_rs import cli, llm
from dflash_rs.config import StepCosts, assets

pytestmark = pytest.mark.pair

PROMPT = "def parse_header(line):\n"


@pytest.fixture(autouse=True)
def drafting_pays(monkeypatch):
    """What pays hangs on how busy the machine is; for commands run in this process whole blocks always do."""
    costs = StepCosts.lines(1.0, 0.0, 0.1, 0.0)
    monkeypatch.setattr(llm, "LLM", functools.partial(llm.LLM, costs=costs))


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def dflash(*words: str) -> Done:
    """Runs the command in this process: importing torch anew for every case would take most of the suite's time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    return Done(code, out.getvalue(), err.getvalue())


def generated(*words: str) -> dict:
    done = dflash("generate", "--json", PROMPT, "--max-tokens", "48", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--seed", "4", "--top-p", "0.95"]])
def test_the_text_is_the_same_with_and_without_drafting(sampling):
    fast, plain = generated(*sampling), generated("--no-draft", *sampling)
    assert fast["token_ids"] == plain["token_ids"] and fast["text"] == plain["text"]
    assert fast["metrics"]["steps"] < plain["metrics"]["steps"]


def test_a_streamed_completion_is_the_generated_one():
    text = generated()["text"]
    done = dflash("generate", PROMPT, "--max-tokens", "48")
    assert done.returncode == 0, done.stderr
    assert done.stdout == PROMPT + text + "\n"
    assert "tau" in done.stderr


def test_each_prompt_is_answered_as_often_as_asked_with_seeds_that_follow_each_other():
    words = ["generate", PROMPT, "import ", "--temperature", "1", "--max-tokens", "12"]
    answers = [json.loads(line) for line in dflash(*words, "--seed", "5", "--n", "2", "--json").stdout.splitlines()]
    assert [(answer["prompt"], answer["answer"]) for answer in answers] == [
        (PROMPT, 0),
        (PROMPT, 1),
        ("import ", 0),
        ("import ", 1),
    ]
    for seed in (5, 6):
        alone = [json.loads(line) for line in dflash(*words, "--seed", str(seed), "--json").stdout.splitlines()]
        assert [one["text"] for one in alone] == [one["text"] for one in answers[seed - 5 :: 2]]
    shown = dflash(*words, "--seed", "5", "--n", "2", "--quiet").stdout
    assert shown == "\n\n".join(answer["prompt"] + answer["text"] for answer in answers) + "\n\n"


def test_json_carries_log_probabilities_when_asked():
    entries = generated("--logprobs", "2")["logprobs"]
    assert len(entries) == 48
    assert all(one["logprob"] <= 0 and len(one["top"]) == 2 for one in entries)


def test_doctor_finds_that_the_pair_generates():
    # The entry point of the installation, as a user types it.
    command = Path(sys.executable).with_name("dflash-rs")
    done = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=600)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["works"], done.stdout
    found = {check["name"]: check for check in report["checks"]}
    assert "same text without drafting" in found["generation"]["detail"]
    assert all(check["detail"] for check in report["checks"])


def test_bench_says_same_text_and_writes_every_key(tmp_path):
    path = tmp_path / "rows.json"
    words = "bench --suite demo --prompts 3 --max-tokens 24 --repeat 1 --concurrency 1,3 --profile".split()
    done = dflash(*words, "--json", str(path), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert len(data["rows"]) == 8
    assert all(row["identical_to_plain"] and row["identical_to_first_concurrency"] for row in data["rows"])
    assert all(row["tau"] > 1 for row in data["rows"] if row["mode"] == "dflash + lookup")
    assert {row["mode"] for row in data["rows"]} == {"plain", "dflash + lookup"}
    assert all(sum(row["stage_seconds"].values()) > 0 for row in data["rows"])
    assert data["header"]["dtype"] == "float32" and data["header"]["torch"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def _takes_ctrl_c():
    """A shell starts background jobs with Ctrl-C switched off, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_mid_generation_ends_with_code_130_and_no_traceback():
    words = ["generate", PROMPT, "--max-tokens", "1500", "--ignore-eos", "--temperature", "1", "--seed", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dflash_rs", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_takes_ctrl_c,
    )
    # Too small for the whole text: the command cannot end before it is interrupted, however late that is.
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    # The prompt is echoed before the model starts; more than it means that tokens are coming.
    begun = process.stdout.read(len(PROMPT) + 8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert len(begun) == len(PROMPT) + 8
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err


def test_a_reader_that_leaves_ends_the_command_quietly():
    words = ["generate", PROMPT, "--max-tokens", "1500", "--ignore-eos", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dflash_rs", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(1)
    process.stdout.close()
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == 0
    assert process.stderr.read() == ""


@pytest.fixture
def pair(tmp_path) -> Path:
    """A copy of the bundled pair that may be damaged."""
    shutil.copytree(str(resources.files("dflash_rs") / "assets"), tmp_path / "pair")
    return tmp_path / "pair"


def test_a_copy_of_the_pair_named_by_path_gives_the_same_text(pair):
    words = ("--model", str(pair / "target"), "--draft", str(pair / "draft"))
    assert generated(*words)["token_ids"] == generated()["token_ids"]


@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_truncated_checkpoint_is_refused_with_code_2_and_no_traceback(pair, which):
    weights = pair / which / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    done = dflash("generate", PROMPT, "--model", str(pair / "target"), "--draft", str(pair / "draft"))
    assert done.returncode == 2, done.stderr
    assert str(pair / which) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_the_tensor_named(pair, which):
    from safetensors.torch import load_file, save_file

    weights = pair / which / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    done = dflash("generate", PROMPT, "--model", str(pair / "target"), "--draft", str(pair / "draft"))
    assert done.returncode == 2, done.stderr
    assert lost.removeprefix("model.") in done.stderr


def test_a_folder_that_does_not_exist_is_refused_with_code_2(tmp_path):
    done = dflash("generate", PROMPT, "--model", str(tmp_path / "nowhere"), "--no-draft")
    assert done.returncode == 2, done.stderr
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_a_prompt_that_can_never_fit_is_refused():
    done = dflash("generate", PROMPT * 20, "--num-pages", "1", "--page-size", "4")
    assert done.returncode == 2, done.stdout
    assert "error" in done.stderr and "Traceback" not in done.stderr


def test_a_prompt_among_many_that_can_never_fit_is_named_and_none_is_run(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, PROMPT * 300)))
    done = dflash("generate", PROMPT, "--prompt-file", str(prompts), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: prompt 3 ({prompts}: line 2): got " in done.stderr and "tokens, expected 1..1023" in done.stderr
    done = dflash("generate", PROMPT, PROMPT * 20, "--num-pages", "4", "--page-size", "16", "--max-tokens", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: prompt 2: got " in done.stderr and "expected at most the pool's 4: " in done.stderr


def test_sizes_of_the_engine_change_how_long_a_text_may_be_and_nothing_else():
    words = ("generate", "--json", PROMPT, "import os\n", PROMPT, "--max-tokens", "48")
    whole, short = dflash(*words), dflash(*words, "--max-context", "32", "--max-running", "1", "--no-adaptive")
    assert whole.returncode == short.returncode == 0, short.stderr
    for one, other in zip(map(json.loads, whole.stdout.splitlines()), map(json.loads, short.stdout.splitlines())):
        assert one["prompt"] == other["prompt"] and len(one["token_ids"]) == 48
        assert other["metrics"]["prompt_tokens"] + len(other["token_ids"]) == 32
        assert other["token_ids"] == one["token_ids"][: len(other["token_ids"])]
    assert [json.loads(line)["prompt"] for line in whole.stdout.splitlines()] == [PROMPT, "import os\n", PROMPT]


def test_models_may_be_named_as_on_the_hub(tmp_path):
    """From a cache as the hub's library leaves it, without a network."""
    from safetensors.torch import load_file, save_file

    for name, part in (("target", "target"), ("drafter", "draft"), ("integers", "target")):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(assets() / part, repository / "snapshots" / ("0" * 40))
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
    save_file(tensors, file, metadata={"format": "pt"})
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def run(target: str, draft: str) -> subprocess.CompletedProcess:
        words = [
            "generate",
            "import",
            "--max-tokens",
            "4",
            "--json",
            "--model",
            target,
            "--draft",
            draft,
        ]
        return subprocess.run(
            [sys.executable, "-m", "dflash_rs", *words], capture_output=True, text=True, env=environment, check=False
        )

    done = run("someone/target", "someone/drafter")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["metrics"]["output_tokens"] == 4
    done = run("someone/integers", "someone/drafter")
    assert done.returncode == 2, done.stderr
    assert "target someone/integers: model.norm.weight: got I32, expected a floating-point type" in done.stderr
    done = run("/nowhere/at/all", "someone/drafter")
    assert done.returncode == 2 and "--model: got /nowhere/at/all, and there is no such folder or file" in done.stderr
    done = run("someone/absent", "someone/drafter")
    assert (
        "target someone/absent: there is no such folder here, and the Hugging Face hub cannot be reached" in done.stderr
    )
    done = run("someone/target", "someone/nothing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dflash-rs: error: draft someone/nothing: there is no such folder"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_warning_is_one_line_of_the_commands_own_and_loading_draws_nothing(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(assets() / "target", tmp_path / "target")
    tensors = load_file(folder / "model.safetensors") | {"mtp.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["generate", "import", "--max-tokens", "2", "--quiet", "--model", str(folder), "--no-draft"]
    done = subprocess.run([sys.executable, "-m", "dflash_rs", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == (
        f"dflash-rs: warning: target {folder}: a Qwen3ForCausalLM has no place for 1 of its tensors (mtp.weight); they are "
        "ignored\n"
    )


def test_check_finds_the_pair_lossless_in_every_situation():
    done = dflash(*"check --prompts 2 --max-tokens 20 --rounds 1 --rejected 40 --json -".split())
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {case["name"]: case for case in json.loads(done.stdout)["cases"]}
    assert len(cases) == 12 and all(case["passed"] for case in cases.values())
    # Two prompts, and one of several hundred tokens.
    assert cases["own drafts, alone"]["texts"] == 6 and cases["own drafts, alone"]["tau"] > 1.3
    assert cases["all drafts wrong, 40 tokens"]["tau"] == 1

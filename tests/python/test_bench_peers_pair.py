"""The suite of peers with the bundled pair: engines over one set of weights, loops of others beside them, and the command itself."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dflash_rs import LLM, SamplingParams, cli  # noqa: E402
from dflash_rs.bench import arms  # noqa: E402
from dflash_rs.bench.generate import GenerateLoop  # noqa: E402
from dflash_rs.bench.runner import REFERENCE, TRANSFORMERS, TRANSFORMERS_LOOKUP  # noqa: E402
from dflash_rs.config import assets  # noqa: E402
from dflash_rs.models.checkpoint import load_causal_lm  # noqa: E402
from dflash_rs.models.target import load  # noqa: E402

pytestmark = pytest.mark.pair

TEXTS = ["def mean(values):\n", "import os\n\n\nclass Stack:\n    def push(self, item):\n", "x = [1, 2, 1, 2, 1, 2, 1,"]


@pytest.fixture(scope="module")
def plain():
    """The plain greedy texts, and their prompts as tokens."""
    with LLM(draft=None, device="cpu", max_running=3, num_pages=60) as llm:
        outputs = llm.generate(TEXTS, SamplingParams(max_tokens=20))
        return [llm.encode(text) for text in TEXTS], [output.token_ids for output in outputs], llm.eos_token_ids


@pytest.fixture(scope="module")
def loop():
    return GenerateLoop(load_causal_lm(assets() / "target", torch.float32)[0])


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """An MTP head of three steps for the bundled target: its last layer, untrained."""
    from dflash_rs.models.loader import save_draft
    from dflash_rs.train.mtp import begin
    from dflash_rs.train.settings import MtpTraining

    target = load_causal_lm(assets() / "target", torch.float32)[0]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("head")
    save_draft(begin(target, MtpTraining(block_size=4), torch.zeros(1, 4, dtype=torch.int64)), folder)
    return folder


def test_a_batch_of_different_lengths_gets_the_texts_that_each_gets_alone(loop, plain):
    prompts, texts, ends = plain
    together, passes = loop.generate(prompts, 20, ends)
    assert together == texts and passes == max(map(len, texts))
    assert [loop.generate([one], 20, ends)[0][0] for one in prompts] == texts


def test_its_look_up_gives_the_same_text_in_fewer_passes(loop, plain):
    prompts, texts, ends = plain
    (text,), passes = loop.generate(prompts[2:], 20, ends, look_up=True)
    assert text == texts[2] and passes < len(text)


def test_nothing_of_a_checkpoints_own_settings_is_left_and_a_seed_repeats_a_text(loop, plain):
    prompts, texts, ends = plain
    loop.target.generation_config.repetition_penalty = 5.0
    loop.target.generation_config.min_new_tokens = 19
    assert loop.generate(prompts, 20, ends)[0] == texts
    one, two, other = (loop.generate(prompts[:1], 20, ends, 1.0, seed)[0] for seed in (3, 3, 4))
    assert one == two != other
    first = texts[0][3]
    cut = loop.generate(prompts[:1], 20, [first])[0][0]
    assert cut == texts[0][: texts[0].index(first) + 1]


def test_a_loop_that_does_not_know_a_drafter_says_so(plain, tmp_path):
    llm = SimpleNamespace(model_dir=str(assets() / "target"), dtype=torch.float32, device=torch.device("cpu"))
    found, reason = arms.others_beside(llm, str(tmp_path))
    assert [arm.name for arm in found] == [TRANSFORMERS, TRANSFORMERS_LOOKUP]
    assert reason.startswith("the package dflash is not installed") or reason.startswith("it does not load this pair: ")
    assert arms.others_beside(llm, None)[1] == "no DFlash drafter was given (--draft FOLDER)"


def test_engines_over_one_set_of_weights_live_beside_each_other(plain, monkeypatch):
    prompts, texts, _ = plain
    read = []
    monkeypatch.setattr(load, "check_finite", lambda *_: None)
    whole = load.read_model

    def counted(*args):
        read.append(args)
        return whole(*args)

    monkeypatch.setattr("dflash_rs.models.target.adapter.read_model", counted)
    args = cli.build_parser().parse_args(
        ["bench", "--suite", "peers", "--device", "cpu", "--threads", "1", "--num-pages", "60"]
    )
    make = cli.engine.Shared(args)
    engines = [make(None, 3, None, 0), make("auto", 3, None, 0), make("auto", 3, 4, 9), make("lookup", 3, None, 0)]
    engines.append(make("auto", 3, None, 0, True))
    try:
        assert len(read) == 1 and [one.draft_kind for one in engines] == [None, "dflash", "dflash", "lookup", "dflash"]
        assert [one.lookup for one in engines] == [False] * 4 + [True]
        assert [(one.block_size, one.tree_nodes) for one in engines[1:3]] == [(8, 0), (4, 9)]
        assert {one.model_dir for one in engines} == {str(assets() / "target")}
        assert engines[1].draft_dir == str(assets() / "draft")
        pointers = {one._target.embedding.weight.data_ptr() for one in engines}
        assert len(pointers) == 1 and len({id(one._target) for one in engines}) == 5
        # In turns, one begins while another is in the middle.
        params = SamplingParams(max_tokens=20)
        streams = [one.stream(prompts, params) for one in engines]
        found = [[None] * 3 for _ in engines]
        going = list(range(len(engines)))
        while going:
            for i in list(going):
                event = next(streams[i], None)
                if event is None:
                    going.remove(i)
                elif event.output is not None:
                    found[i][event.index] = event.output.token_ids
        assert found == [texts] * 5
    finally:
        for one in engines:
            one.close()
    again = make("auto", 1, None, 0)
    assert len(read) == 1 and again.generate(prompts[:1], params)[0].token_ids == texts[0]
    again.close()


def test_a_target_with_state_is_read_for_every_engine(monkeypatch):
    made = []

    def engine(args, **more):
        made.append((args.draft, args.no_draft, args.block_size, args.tree_nodes))
        target = SimpleNamespace(state=object(), twin=lambda: pytest.fail("its state was shared"))
        return SimpleNamespace(_target=target, _draft=None, tokenizer=None, _bytes=None, model_dir="m", draft_dir=None)

    monkeypatch.setattr(cli.engine, "make_engine", engine)
    make = cli.engine.Shared(cli.build_parser().parse_args(["bench", "--suite", "peers"]))
    for draft, block_size, tree_nodes in ((None, None, 0), ("d", None, 0), ("d", 4, 9)):
        make(draft, 2, block_size, tree_nodes)
    assert made == [(None, True, None, None), ("d", False, None, None), ("d", False, 4, 9)]


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["bench", "--suite", "peers", *words])
    return code, out.getvalue(), err.getvalue()


def test_the_command_runs_everything_that_is_here_and_tells_the_rest(head, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": str(i), "category": kind, "prompt": text} for i, (kind, text) in enumerate(zip("aab", TEXTS))]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = {"--model": assets() / "target", "--draft": assets() / "draft", "--prompts": prompts}
    words = [word for pair in folder.items() for word in map(str, pair)]
    more = ["--draft", str(head), "--max-tokens", "12", "--repeat", "1", "--concurrency", "1", "--temperature", "0,0.7"]
    code, out, err = run(*words, *more, "--device", "cpu", "--threads", "1", "--num-pages", "60", "--json", "-")
    assert code == 0, err
    data = json.loads(out)
    rows = {(row["mode"], row["temperature"], row["category"]): row for row in data["rows"]}
    modes = {mode for mode, _, _ in rows}
    own = {"plain", "dflash", "dflash + lookup", "dflash trees", "mtp", "mtp + lookup", "lookup"}
    assert own | {TRANSFORMERS, TRANSFORMERS_LOOKUP} <= modes
    assert REFERENCE in modes or [one["arm"] for one in data["skipped"]] == [REFERENCE]
    for (mode, temperature, _), row in rows.items():
        assert row["identical_to_plain"] is (True if mode in own or temperature == 0 else None), row
        assert row["tokens_per_s"] > 0 and row["speedup"] > 0
    assert len(rows) == len(modes) * 2 * 3
    assert data["scans"][0]["arm"] == "mtp" and set(data["scans"][0]["tokens_per_s"]) == {"1", "2", "3"}
    assert rows["mtp", 0.0, "all"]["block_size"] == data["scans"][0]["best"] + 1
    assert {"cpu", "load_average", "load_average_at_end", "dtype", "transformers"} <= set(data["header"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "3", "--prompts", "4"], "--prompts: got the numbers 3, 4, expected one"),
        (["--profile"], "--profile: got it with --suite peers"),
        (["--prompts", "nowhere.jsonl"], "prompt file nowhere.jsonl: No such file"),
        (
            ["--suite", "demo", "--prompts", "a", "--prompts", "b"],
            "--prompts: got 2 files, expected one for --suite demo",
        ),
    ],
)
def test_what_the_suite_cannot_do_is_refused_before_anything_is_loaded(words, said, monkeypatch):
    monkeypatch.setattr(cli.engine, "make_engine", lambda *_, **__: pytest.fail("an engine was made"))
    code, _, err = run(*words)
    assert code == 2 and said in err


def test_without_a_drafter_named_it_takes_what_there_is(monkeypatch):
    made = []

    class Stop(Exception):
        pass

    class Suite:
        def __init__(self, make, drafts, plan, **options):
            made.append((drafts, plan.concurrency, [one.temperature for one in plan.settings], options["tree_nodes"]))

        def run(self, prompts):
            raise Stop

    monkeypatch.setattr("dflash_rs.bench.peers.Suite", Suite)
    run()
    run("--model", "somewhere", "--concurrency", "3", "--tree-nodes", "7")
    run("--model", "somewhere", "--draft", "lookup", "--draft", "x", "--temperature", "0")
    assert made == [
        (["auto", "lookup"], (1, 2, 4, 8), [0.0, 0.7, 1.0], 15),
        (["lookup"], (3,), [0.0, 0.7, 1.0], 7),
        (["lookup", "x"], (1, 2, 4, 8), [0.0], 15),
    ]

"""Features kept on disk: the drafter that comes of them is the one trained online, and nothing is taken for what it is not."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from dflash_rs.train import common, drafter, features, mtp  # noqa: E402
from dflash_rs.train.documents import Documents, packed  # noqa: E402
from dflash_rs.train.features import FeatureStore, fingerprint  # noqa: E402
from dflash_rs.train.settings import DrafterTraining, MtpTraining  # noqa: E402

SIZES = {"steps": 14, "batch_size": 1, "anchors": 4, "block_size": 4, "seq_len": 32, "lr": 1e-2}
SETTINGS = {
    "drafter": (drafter, DrafterTraining(taps="0,2", num_layers=1, train_block_sizes="4", **SIZES)),
    "mtp": (mtp, MtpTraining(**SIZES)),
}


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Texts of which three or so make a row; some are kept apart."""
    folder = tmp_path_factory.mktemp("responses")
    generator = torch.Generator().manual_seed(1)
    texts = []
    for i in range(60):
        length = 8 + i % 5
        tokens = torch.randint(2, 64, (length,), generator=generator).tolist()
        texts.append((tokens, [j >= 3 for j in range(length)], "ab"[i % 2]))
    documents = Documents.of(texts[:12] + [text for text in texts[12:] if Documents.of([text]).held_out(0)])
    documents.save(folder / "shard-00000.npz")
    assert len(documents.split()[1])
    return folder


@pytest.fixture
def passes(monkeypatch):
    """Every pass of a target: how many rows it had."""
    found = []
    whole = drafter.Teacher.passed

    def counted(self, tokens, position=None):
        found.append(len(tokens))
        return whole(self, tokens, position)

    monkeypatch.setattr(drafter.Teacher, "passed", counted)
    return found


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_drafter_is_the_one_trained_online_and_the_target_passes_over_each_row_once(
    kind, target, responses, tmp_path, passes
):
    training, settings = SETTINGS[kind]
    own, kept = Documents.load(responses).split()
    rows = len(packed(own, settings.seq_len, settings.seed, False))
    assert 2 <= rows <= settings.steps / 2

    def train(name: str, **more) -> list[int]:
        passes.clear()
        training.train(settings, target, responses, None, tmp_path / name, device="cpu", save_every=7, **more)
        return list(passes)

    online = train("online")
    kept_rows = (len(online) - 2 - settings.steps) // 2
    first = train("first", store_features=tmp_path / "features")
    # Two passes to see whether documents disturb each other; what is kept apart is looked at twice, too.
    assert len(first) == 2 + rows + kept_rows and len(online) > len(first)
    assert len(train("second", store_features=tmp_path / "features")) == 2
    folders = [tmp_path / name for name in ("online", "first", "second")]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])
    histories = [common.load_checkpoint(folder / "checkpoint.pt")["history"] for folder in folders]
    assert histories[0] == histories[1] == histories[2]


def test_what_is_read_is_the_pass_over_that_row_alone_whoever_stands_beside_it(tmp_path):
    teacher = drafter.Teacher(model(), (0, 2), 1)
    store = FeatureStore(tmp_path, teacher.target, teacher.taps)
    tokens = torch.randint(2, 64, (3, 20))
    position = torch.arange(20).expand(3, 20)
    whole = store(teacher.passed, tokens, position)
    assert (store.computed, store.read) == (3, 0)
    again = store(teacher.passed, tokens.flip(0), position)
    assert (store.computed, store.read) == (3, 3)
    for one, other, r in zip(whole, again, range(2)):
        assert torch.equal(one, other.flip(0)) and torch.equal(one[1], teacher.passed(tokens[1:2], position[1:2])[r][0])
    # Other positions, other features: two documents in place of one.
    apart = position.clone()
    apart[:, 10:] -= 10
    other = store(teacher.passed, tokens, apart)
    assert store.computed == 6 and not torch.equal(other[1], whole[1])
    for one, exact in zip(whole, teacher.passed(tokens, position)):
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-5)


def test_half_precision_comes_back_as_it_was(tmp_path):
    teacher = drafter.Teacher(model().bfloat16(), (1,), 1)
    store = FeatureStore(tmp_path, teacher.target, teacher.taps)
    tokens = torch.randint(2, 64, (1, 9))
    first, second = (store(teacher.passed, tokens, None) for _ in range(2))
    assert second[0].dtype == torch.bfloat16 and all(torch.equal(a, b) for a, b in zip(first, second))


def test_another_target_other_taps_and_another_dtype_are_refused(tmp_path):
    own = model()
    FeatureStore(tmp_path, own, (0, 2))
    FeatureStore(tmp_path, model(), (0, 2))
    changed = model()
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(changed) != fingerprint(own)
    for target, taps in ((changed, (0, 2)), (own, (0, 1)), (model().bfloat16(), (0, 2))):
        with pytest.raises(ValueError, match="store_features: .* holds features of another target, taps or dtype"):
            FeatureStore(tmp_path, target, taps)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(ValueError, match="store_features: .*features.json cannot be read"):
        FeatureStore(tmp_path, own, (0, 2))


def test_a_damaged_file_is_named_and_room_is_looked_for_first(tmp_path, monkeypatch):
    teacher = drafter.Teacher(model(), (0,), 1)
    store = FeatureStore(tmp_path / "a", teacher.target, teacher.taps)
    tokens = torch.randint(2, 64, (1, 9))
    store(teacher.passed, tokens, None)
    (file,) = (tmp_path / "a").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"store_features: .*{file.name} is damaged .*: delete it"):
        store(teacher.passed, tokens, None)
    other = FeatureStore(tmp_path / "b", teacher.target, teacher.taps)
    other(teacher.passed, tokens[:, :5], None)
    (short,) = (tmp_path / "b").glob("*.safetensors")
    shutil.copy(short, file)
    with pytest.raises(ValueError, match="is damaged .*expected \\[1, 9\\] tokens"):
        store(teacher.passed, tokens, None)

    usage = namedtuple("usage", "total used free")(0, 0, (1 << 30) + 10 * 9 * 2 * 32 * 4)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage)
    FeatureStore(tmp_path / "c", teacher.target, teacher.taps, 10, 9)
    with pytest.raises(
        ValueError, match="store_features: got .* GB free, expected .* 11 rows of 9 tokens, 0.3 KB a token"
    ):
        FeatureStore(tmp_path / "c", teacher.target, teacher.taps, 11, 9)
    # One that is there needs no room any more.
    FeatureStore(tmp_path / "a", teacher.target, teacher.taps, 11, 9)


def test_what_never_comes_twice_or_has_to_run_together_is_refused(target, responses, tmp_path):
    _, settings = SETTINGS["drafter"]
    for named, more in (("a corpus", {"data": tmp_path}), ("shard_target", {"data": None, "shard_target": True})):
        with pytest.raises(ValueError, match=f"store_features: got {named}, too"):
            drafter.train(settings, target, responses, out=tmp_path / "out", store_features=tmp_path / "f", **more)
    assert not (tmp_path / "f").exists()


def test_texts_without_a_token_of_the_target_are_refused_instead_of_searched_for_ever():
    nothing = Documents.of([([1, 2, 3], [False] * 3, "")])
    with pytest.raises(ValueError, match="responses: got no document with a token of the target among its first 8"):
        next(drafter.rows_of(nothing, 8, 0, False))

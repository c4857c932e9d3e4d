"""The drafter: against the z-lab reference package, against itself, and its loading checks."""

import json

import numpy as np
import pytest
import torch
from models_helpers import HIDDEN, MASK, VOCAB, Pages, best, draft_config, greedy_loop, qwen3_target, random_draft

from dflash_rs.errors import CheckpointError, InvalidArgument
from dflash_rs.models.dflash import DFlashDraft
from dflash_rs.models.dflash.runtime import Runtime
from dflash_rs.models.dflash.training import training_hidden
from dflash_rs.models.dflash2 import DFlash2Draft
from dflash_rs.models.loader import default_layer_ids, load_draft, read_draft_config, save_draft
from dflash_rs.models.target import TargetModel

SECOND = {"conv_kernel_size": 4, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}
VARIANTS = {
    "full": {},
    "one_layer": {"num_hidden_layers": 1, "layer_causal": (), "layer_window": ()},
    "sliding_causal": {"layer_causal": (True, False), "layer_window": (7, None)},
    "sliding_symmetric": {"layer_causal": (False, False), "layer_window": (4, 4)},
    "all_causal": {"layer_causal": (True, True)},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
    "scaled_and_capped": {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 20.0},
    "biased": {"attention_bias": True},
    "second": SECOND,
    "second, one group, all causal": {**SECOND, "conv_group_size": HIDDEN, "conv_kernel_size": 2, "layer_causal": (True, True)},
    "second, scaled and capped": {**SECOND, "input_embedding_scale": 2.0, "output_multiplier": 0.5, "final_logit_softcapping": 9.0},
}  # fmt: skip


def reference_package():
    return pytest.importorskip(
        "dflash.model", reason="the z-lab reference is not installed: pip install --no-deps dflash==0.1.0"
    )


def copy_of_target_into(draft: DFlashDraft, target) -> DFlashDraft:
    """Warm-starts the drafter from target layers, so that greedy drafts are sometimes right."""
    with torch.no_grad():
        for own, theirs in zip(draft.layers, target.model.layers[-len(draft.layers) :], strict=True):
            state = {name: p for name, p in theirs.state_dict().items() if name in own.state_dict()}
            own.load_state_dict(state, strict=False)
        draft.norm.weight.copy_(target.model.norm.weight)
    return draft


# ---- against the reference -----------------------------------------------------------------------------------------


def reference_drafter(package, directory):
    second = "DFlash2" in json.loads((directory / "config.json").read_text())["architectures"][0]
    kind = package.DFlash2DraftModel if second else package.DFlashDraftModel
    return kind.from_pretrained(directory, attn_implementation="sdpa").eval()


def reference_drafts(package, directory, model, features, anchor, block):
    """The reference drafter's greedy block for one request whose context is `features` [L, K*H]."""
    drafter = reference_drafter(package, directory)
    length = features.shape[0]
    tokens = torch.full((1, block), MASK)
    tokens[0, 0] = anchor
    with torch.inference_mode():
        embedded = package._raw_input_embeddings(model, tokens, float(drafter.config.input_embedding_scale))
        hidden = drafter(
            position_ids=torch.arange(length + block)[None], noise_embedding=embedded, target_hidden=features[None]
        )
        logits = drafter.compute_logits(hidden[:, 1:], model.lm_head)
        logits[..., MASK] = -torch.inf
        if hasattr(drafter, "candidate_selector"):
            return drafter.candidate_selector.select(hidden[:, 1:], logits, torch.tensor([anchor]), 0.0)[0][0]
        return logits[0].argmax(-1)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_equal_those_of_the_reference_package(variant, page_size, tmp_path):
    package = reference_package()
    model = qwen3_target()
    save_draft(random_draft(**VARIANTS[variant]), tmp_path)
    draft = load_draft(tmp_path)
    draft.bind_target(model.get_input_embeddings(), model.lm_head)
    lengths = [1, 23, 9]
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n, 3 * HIDDEN, generator=generator) for n in lengths]
    anchors = [4, 50, 96]
    expected = torch.stack([
        reference_drafts(package, tmp_path, model, f, anchor, 6) for f, anchor in zip(features, anchors, strict=True)
    ])  # fmt: skip

    pages = Pages(3, 32, page_size)
    draft.alloc_kv(pages.num_slots)
    for row, (n, f) in enumerate(zip(lengths, features, strict=True)):
        positions = np.arange(n)
        for part in (slice(0, n // 2), slice(n // 2, n)):
            draft.inject(
                f[part], torch.from_numpy(positions[part]), torch.from_numpy(pages.slots(row, positions[part]))
            )
    assert np.array_equal(best(draft, anchors, lengths, pages.table, page_size=page_size)[0], expected)
    # Any order, any subset of the rows.
    picked = best(draft, [96, 4], [9, 1], pages.table, [2, 0], page_size=page_size)[0]
    assert np.array_equal(picked, expected[[2, 0]])


@pytest.mark.parametrize("page_size", [1, 16])
# The reference's convolution fails where the last block of a text is shorter than the kernel: this one's has two taps.
@pytest.mark.parametrize("variant", ["full", "sliding_causal", "second, one group, all causal"])
def test_a_whole_greedy_loop_gives_the_references_tokens(variant, page_size, tmp_path):
    package = reference_package()
    model = qwen3_target(2)
    save_draft(copy_of_target_into(random_draft(3, **VARIANTS[variant]), model), tmp_path)
    reference = reference_drafter(package, tmp_path)
    prompt = [7, 30, 12, 55, 8]
    expected = package.dflash_generate(
        reference, model, torch.tensor(prompt)[None], max_new_tokens=40, stop_token_ids=None, temperature=0.0,
        return_stats=False,
    )[0].tolist()  # fmt: skip

    target = TargetModel(qwen3_target(2))
    draft = load_draft(tmp_path, target)
    with_draft, _ = greedy_loop(target, draft, prompt, 40, page_size, 6)
    without, _ = greedy_loop(target, None, prompt, 40, page_size, 1)
    assert with_draft == expected
    assert without == expected


# ---- against itself ------------------------------------------------------------------------------------------------


def bound(draft: DFlashDraft) -> DFlashDraft:
    model = qwen3_target()
    return draft.bind_target(model.get_input_embeddings(), model.lm_head)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_blocks_equal_the_drafts_made_at_the_same_anchors(variant):
    draft = bound(random_draft(**VARIANTS[variant]))
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(2, 20, 3 * HIDDEN, generator=generator)
    tokens = torch.randint(2, VOCAB, (2, 20), generator=generator)
    anchors = torch.tensor([[3, 19, 7], [1, 12, 12]])
    hidden = training_hidden(draft, features, tokens, anchors, 6)
    logits = draft.bound[1](hidden[:, :, 1:]) * draft.config.output_multiplier
    if (cap := draft.config.final_logit_softcapping) is not None:
        logits = torch.tanh(logits / cap) * cap
    logits[..., MASK] = -torch.inf
    trained = logits.argmax(-1)
    if isinstance(draft, DFlash2Draft):
        firsts = tokens.gather(1, anchors).flatten()
        picked, _ = draft.candidate_selector(hidden[:, :, 1:].flatten(0, 1), logits.flatten(0, 1), firsts, 1)
        trained = picked.view_as(trained)

    pages = Pages(2, 24, 4)
    draft.alloc_kv(pages.num_slots)
    for row in range(2):
        positions = np.arange(20)
        draft.inject(features[row], torch.from_numpy(positions), torch.from_numpy(pages.slots(row, positions)))
        for column, anchor in enumerate(anchors[row].tolist()):
            drafts = best(draft, [int(tokens[row, anchor])], [anchor], pages.table, [row], page_size=4)[0]
            assert np.array_equal(drafts[0], trained[row, column])


def test_a_selector_walks_its_candidates_and_says_how_sure_it_is():
    draft = bound(random_draft(**SECOND))
    pages = Pages(1, 16, 4)
    draft.alloc_kv(pages.num_slots)
    context = torch.randn(9, 3 * HIDDEN)
    draft.inject(context, torch.arange(9), torch.from_numpy(pages.slots(0, np.arange(9))))
    likeliest, sure = best(draft, [5], [9], pages.table, page_size=4)
    tokens, chances = draft.candidates([5], [9], pages.table, page_size=4, k=5)
    assert tokens.shape == chances.shape == (1, 5, 5)
    assert np.array_equal(tokens[:, :, 0], likeliest) and np.allclose(chances[:, :, 0], sure)
    assert (chances.sum(-1) < 1).all() and (np.diff(chances, axis=-1) <= 1e-6).all()
    # Without codebooks the candidates, and how sure the drafter is of them, are a DFlash's.
    with torch.no_grad():
        draft.candidate_selector.successor_codebook.zero_()
    draft.alloc_kv(pages.num_slots)
    draft.inject(context, torch.arange(9), torch.from_numpy(pages.slots(0, np.arange(9))))
    free, plain = draft.candidates([5], [9], pages.table, page_size=4, k=5)
    assert not np.array_equal(free[:, :, 0], likeliest)
    in_one_call = draft.runtime.run
    draft.runtime.run = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(draft.runtime), "likeliest", Runtime.likeliest)
        tokens, sure = draft.candidates([5], [9], pages.table, page_size=4, k=5)
    assert np.array_equal(tokens, free) and np.allclose(sure, plain, atol=1e-5)
    for draft.runtime.run in (None, in_one_call):
        with pytest.raises(InvalidArgument, match="k: got 6, expected at most 5, the drafter's selector_top_k"):
            draft.candidates([5], [9], pages.table, page_size=4, k=6)


def test_a_training_block_sees_nothing_at_or_after_its_anchor_and_no_other_block():
    draft = bound(random_draft())
    features = torch.randn(1, 16, 3 * HIDDEN)
    tokens = torch.randint(2, VOCAB, (1, 16))
    base = training_hidden(draft, features, tokens, torch.tensor([[6, 2]]), 4)
    features[:, 6:] += 1.0
    tokens[:, 7:] = 5
    changed = training_hidden(draft, features, tokens, torch.tensor([[6, 11]]), 4)
    torch.testing.assert_close(base[:, 0], changed[:, 0])
    features[:, 5] += 1.0
    earlier = training_hidden(draft, features, tokens, torch.tensor([[6, 11]]), 4)
    assert not torch.allclose(base[:, 0], earlier[:, 0])


def test_training_runs_under_bfloat16_autocast_and_reaches_every_weight():
    draft = bound(random_draft()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = training_hidden(
            draft, torch.randn(1, 12, 3 * HIDDEN), torch.randint(2, VOCAB, (1, 12)), torch.tensor([[4, 9]]), 4
        )
    hidden.float().square().mean().backward()
    assert hidden.shape == (1, 2, 4, HIDDEN)
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


def test_the_mask_token_is_never_drafted():
    draft = random_draft()
    embedding, head = torch.nn.Embedding(VOCAB, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB)
    with torch.no_grad():
        head.bias.zero_()
        head.bias[MASK] = 1e6
    draft.bind_target(embedding, head)
    draft.alloc_kv(32)
    drafts = best(draft, [3], [0], np.zeros((1, 8), dtype=np.int32), page_size=4)[0]
    assert drafts.shape == (1, 5) and not (drafts == MASK).any()


def test_context_before_valid_from_is_not_seen():
    draft = bound(random_draft())
    pages = Pages(1, 16, 4)
    draft.alloc_kv(pages.num_slots)
    positions = torch.arange(10)
    slots = torch.from_numpy(pages.slots(0, np.arange(10)))
    features = torch.randn(10, 3 * HIDDEN)
    draft.inject(features, positions, slots)
    # Several anchors over the same context: of tiny random weights, one block may well be the same with and without it.
    anchors, lens, table = np.arange(2, 18), np.full(16, 10), np.tile(pages.table, (16, 1))

    def blocks(valid_from=None):
        return best(draft, anchors, lens, table, page_size=4, valid_from=valid_from)[0]

    seen = blocks(np.full(16, 6))
    features[:6] = 50.0
    draft.inject(features, positions, slots)
    assert np.array_equal(blocks(np.full(16, 6)), seen)
    assert (blocks() != seen).any(axis=1).sum() > 4


def test_bad_arguments_are_named():
    draft = random_draft()
    with pytest.raises(InvalidArgument, match="bind_target"):
        draft.alloc_kv(16)
    bound(draft)
    with pytest.raises(InvalidArgument, match="alloc_kv"):
        best(draft, [3], [0], np.zeros((1, 4), dtype=np.int32), page_size=4)[0]
    draft.alloc_kv(16)
    with pytest.raises(InvalidArgument, match=r"features: got shape \[2, 7\], expected \[T, 144\]"):
        draft.inject(torch.zeros(2, 7), torch.arange(2), torch.arange(2))
    with pytest.raises(InvalidArgument, match="block_size: got 1"):
        best(draft, [3], [0], np.zeros((1, 4), dtype=np.int32), page_size=4, block_size=1)[0]
    with pytest.raises(InvalidArgument, match="anchors: got 97, expected 0..96"):
        best(draft, [97], [0], np.zeros((1, 4), dtype=np.int32), page_size=4)[0]
    with pytest.raises(InvalidArgument, match="context_lens"):
        best(draft, [3], [17], np.zeros((1, 4), dtype=np.int32), page_size=4)[0]


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    save_draft(random_draft(), tmp_path)
    return tmp_path


def edit(directory, nested=False, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    place = config["dflash_config"] if nested else config
    for key, value in changes.items():
        if value is ...:
            place.pop(key, None)
        else:
            place[key] = value
    file.write_text(json.dumps(config))
    return directory


def test_a_saved_drafter_loads_to_the_same_weights_and_configuration(checkpoint):
    loaded = load_draft(checkpoint)
    assert loaded.config == draft_config()
    for name, tensor in random_draft().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_nested_keys_beat_top_level_ones_and_prefixes_and_shards_are_read(checkpoint):
    from safetensors.torch import load_file, save_file

    edit(checkpoint, block_size=9, mask_token_id=40)
    edit(checkpoint, nested=True, block_size=5)
    assert read_draft_config(checkpoint).block_size == 5
    assert read_draft_config(checkpoint).mask_token_id == MASK
    tensors = {f"model.{name}": t for name, t in load_file(checkpoint / "model.safetensors").items()}
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, checkpoint / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_draft(checkpoint).fc.weight, random_draft().fc.weight)
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="b.safetensors: not found"):
        load_draft(checkpoint)


def test_the_older_rope_fields_mean_the_same(checkpoint):
    edit(checkpoint, rope_parameters=..., rope_theta=10000.0)
    assert read_draft_config(checkpoint).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    edit(checkpoint, rope_scaling={"type": "linear", "factor": 2.0})
    assert read_draft_config(checkpoint).rope_parameters == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }


def test_layer_kinds_follow_layer_types_and_is_causal(checkpoint):
    edit(checkpoint, layer_types=["sliding_attention", "full_attention"], sliding_window=9)
    config = read_draft_config(checkpoint)
    assert config.layer_causal == (True, False) and config.layer_window == (9, None)
    edit(checkpoint, is_causal=False)
    assert read_draft_config(checkpoint).layer_causal == (False, False)
    edit(checkpoint, is_causal=True)
    assert read_draft_config(checkpoint).layer_causal == (True, True)


def test_default_layer_ids_are_those_of_the_paper():
    assert default_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_layer_ids(10, 1) == (5,)


WRONG_CONFIG = [
    ({"nested": True, "mask_token_id": VOCAB}, "mask_token_id: got 97, expected 0..96"),
    ({"nested": True, "mask_token_id": ...}, "mask_token_id: got nothing"),
    ({"nested": True, "target_layer_ids": [1, 6]}, r"target_layer_ids: got \[1, 6\], expected ids in 0..4"),
    ({"nested": True, "target_layer_ids": [1, 5]}, "off by one"),
    ({"nested": True, "target_layer_ids": []}, r"target_layer_ids: got \[\]"),
    ({"nested": True, "target_layer_ids": [True]}, "target_layer_ids"),
    ({"block_size": 1}, "block_size: got 1, expected an integer of at least 2"),
    ({"hidden_size": "48"}, "hidden_size: got '48'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads 4"),
    ({"head_dim": 15}, "head_dim: got 15"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 2}, "sliding_window: got nothing"),
    (
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4, "use_sliding_window": False},
        "use_sliding_window",
    ),
    ({"is_causal": "no"}, "is_causal: got 'no'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type of default"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
    ({"architectures": ["DFlash2DraftModel"]}, "conv_kernel_size: got nothing, expected an integer of at least 1"),
    ({"nested": True, "conv_kernel_size": 3}, "conv_kernel_size: got 3, expected nothing for a DFlashDraftModel"),
    (
        {"architectures": ["DFlash2DraftModel"], **SECOND, "conv_group_size": 7},
        "conv_group_size: got 7, expected a divisor",
    ),
    (
        {"architectures": ["DFlash2DraftModel"], **SECOND, "selector_top_k": VOCAB},
        "selector_top_k: got 97, expected less",
    ),
    ({"aux_hidden_state_layer_ids": [2, 4]}, "aux_hidden_state_layer_ids"),
    ({"dflash_config": [1]}, "dflash_config: got list"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_CONFIG, ids=[message[:30] for _, message in WRONG_CONFIG])
def test_a_wrong_configuration_field_is_named(changes, message, checkpoint):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_draft(edit(checkpoint, **changes))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_target_layers": 8}, "num_target_layers: got 8, expected the target's 6"),
        ({"vocab_size": 120}, "vocab_size: got 120, expected the target's 97"),
        ({"hidden_size": 64}, "hidden_size: got 64, expected the target's 48"),
    ],
)
def test_a_drafter_of_another_target_is_refused(changes, message, checkpoint):
    target = TargetModel(qwen3_target())
    with pytest.raises(CheckpointError, match=message):
        load_draft(edit(checkpoint, **changes), target)


def rewrite(directory, change):
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


WRONG_TENSORS = [
    (lambda t: t.pop("fc.weight"), "fc.weight: missing tensor"),
    (
        lambda t: t.update({"layers.2.mlp.up_proj.weight": torch.zeros(1)}),
        "layers.2.mlp.up_proj.weight: unexpected tensor",
    ),
    (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight: got shape \[3\], expected \[48\]"),
    (lambda t: t.update({"norm.weight": torch.zeros(48, dtype=torch.int32)}), "norm.weight: got I32"),
    (lambda t: t["norm.weight"].fill_(torch.nan), "norm.weight: has values that are not finite"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(9, 48)}), "lm_head.weight: a drafter with an embedding, head"),
    (lambda t: t.update({"candidate_selector.hidden_projection.weight": torch.zeros(1)}), "belongs to DFlash 2"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS, ids=[message[:30] for _, message in WRONG_TENSORS])
def test_a_wrong_tensor_is_named(change, message, checkpoint):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load_draft(checkpoint)


def test_damaged_files_are_named(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="model.safetensors: damaged or truncated"):
            load_draft(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: not found"):
        load_draft(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON"):
        load_draft(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: not found"):
        load_draft(checkpoint)

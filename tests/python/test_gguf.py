"""GGUF files: the same weights, positions and tokens after conversion, and nothing converted by half."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from dflash_rs import LLM, CheckpointError, SamplingParams  # noqa: E402
from dflash_rs.models.gguf import convert  # noqa: E402

SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
)  # fmt: skip
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
TOKENS = ["<|end|>", "<|turn|>", *BYTES, *(chr(256 + i) for i in range(68)), "Ġ1", "he", "12"]
KINDS = [3, 3] + [1] * (len(TOKENS) - 2)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tiny(kind: str, tied: bool = True):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **SHAPE, head_dim=16, vocab_size=len(TOKENS), tie_word_embeddings=tied, bos_token_id=1, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


def write(path, kind: str, model, *, change=None, stored=None, pre="smollm", extra=()):
    """Writes the model as llama.cpp's converter does; `change(writer)` adds what a test is about."""
    c = model.config
    w = gguf.GGUFWriter(str(path), kind)
    (
        w.add_block_count(c.num_hidden_layers),
        w.add_context_length(c.max_position_embeddings),
        w.add_embedding_length(c.hidden_size),
    )
    (
        w.add_feed_forward_length(c.intermediate_size),
        w.add_head_count(c.num_attention_heads),
        w.add_head_count_kv(c.num_key_value_heads),
    )
    w.add_key_length(16), w.add_value_length(16), w.add_layer_norm_rms_eps(c.rms_norm_eps), w.add_rope_freq_base(5000.0)
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre(pre), w.add_token_list(TOKENS), w.add_token_types(KINDS)
    w.add_token_merges(["Ġ 1", "h e", "1 2"]), w.add_bos_token_id(1), w.add_eos_token_id(0)
    if change is not None:
        change(w)
    for name, value in [*model.state_dict().items(), *extra]:
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = value.numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        part, _, suffix = name.rpartition(".")
        layer = part.startswith("model.layers.")
        place = part.split(".", 3)[3] if layer else part
        name = (f"blk.{part.split('.')[2]}." if layer else "") + NAMES.get(place, place) + f".{suffix}"
        array = np.ascontiguousarray(array)
        if stored is not None and array.ndim == 2:
            w.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
        else:
            w.add_tensor(name, array)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_a_converted_file_computes_what_the_model_computed(tmp_path, kind, tied):
    model = tiny(kind, tied)
    convert(write(tmp_path / "m.gguf", kind, model), tmp_path / "out", dtype=torch.float32)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert type(back) is type(model)


def test_quantised_weights_are_what_gguf_makes_of_them(tmp_path):
    model = tiny("llama")
    convert(
        write(tmp_path / "m.gguf", "llama", model, stored=gguf.GGMLQuantizationType.Q8_0),
        tmp_path / "out",
        dtype=torch.float32,
    )
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    assert (back.model.layers[1].mlp.up_proj.weight.detach().numpy() == expected).all()


def test_texts_become_the_same_tokens_and_come_back(tmp_path):
    template = "{{ messages[0]['content'] }}"

    def change(w):
        w.add_chat_template(template), w.add_add_bos_token(True)

    convert(write(tmp_path / "m.gguf", "llama", tiny("llama"), change=change), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("<|turn|>the 12").input_ids
    # Digits stand alone with this way of cutting, so that neither "Ġ1" nor "12" is ever joined.
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|turn|>", "<|turn|>", "t", "he", "Ġ", "1", "2"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 12" and tokenizer.chat_template == template
    assert tokenizer.eos_token_id == 0


def test_an_engine_takes_the_file_itself_and_converts_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFLASH_RS_HOME", str(tmp_path / "home"))
    file = write(tmp_path / "m.gguf", "qwen3", tiny("qwen3"))
    texts = []
    for _ in range(2):
        with LLM(model=str(file), draft=None, device="cpu", num_pages=16) as llm:
            texts.append(llm.generate("the", SamplingParams(max_tokens=6, ignore_eos=True))[0].token_ids)
    assert texts[0] == texts[1] and capsys.readouterr().err.count("converting") == 1


def add(name, value):
    return lambda w: w.add_uint32(name, value) if isinstance(value, int) else w.add_string(name, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": add("llama.expert_count", 4)}, "llama.expert_count: got 4, expected nothing"),
        ({"change": add("llama.rope.scaling.type", "yarn")}, "llama.rope.scaling.type: got 'yarn', expected none"),
        ({"change": add("llama.attention.sliding_window", 64)}, "llama.attention.sliding_window: got 64"),
        ({"extra": [("rope_freqs.weight", torch.ones(8))]}, "tensor rope_freqs.weight: scaled positions"),
        (
            {"extra": [("model.layers.0.self_attn.q_proj.bias", torch.ones(64))]},
            "tensor blk.0.attn_q.bias: it has no place",
        ),
        ({"pre": "tekken"}, "tokenizer.ggml.pre: got 'tekken', expected one of default, gpt-2, smollm"),
    ],
)
def test_what_has_no_place_in_a_checkpoint_is_refused_by_name(tmp_path, options, message):
    file = write(tmp_path / "m.gguf", "llama", tiny("llama"), **options)
    with pytest.raises(CheckpointError, match=message):
        convert(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_other_architectures_missing_tensors_and_damaged_files_are_refused(tmp_path):
    model = tiny("llama")
    whole = write(tmp_path / "m.gguf", "llama", model).read_bytes()
    with pytest.raises(CheckpointError, match="general.architecture: got 'gemma', expected one of llama, qwen2, qwen3"):
        convert(write(tmp_path / "g.gguf", "gemma", model), tmp_path / "out")
    state = model.state_dict()
    model.state_dict = lambda: {k: v for k, v in state.items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(CheckpointError, match="tensor blk.1.ffn_up.weight: not there"):
        convert(write(tmp_path / "less.gguf", "llama", model), tmp_path / "out")
    damaged = tmp_path / "cut.gguf"
    for end in (0, 3, 100, 5000, len(whole) - 1000):
        damaged.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="cut.gguf"):
            convert(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", "llama", tiny("llama"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(CheckpointError, match="needs 6[0-9] MiB there as a checkpoint, but 1 MiB are free"):
        convert(file, tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", "llama", tiny("llama"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]

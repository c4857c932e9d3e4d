"""From ids to text, compared with what transformers makes of the same ids."""

from __future__ import annotations

import random

import pytest
import torch
from models_helpers import randomise

from dflash_rs import LLM, InvalidArgument, SamplingParams
from dflash_rs.text import Detokenizer, _byte_level_alphabet, token_bytes

EOT, HEADER = "<|eot_id|>", "<|start_header_id|>"


def wrapped(backend, **roles):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def byte_level(first: int = 256, words=("he", "llo", "\u0120w", "x\u00e9")):
    """256 bytes, words from id `first` on, then added tokens: two special ones without a role, one with, and some that are text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = dict(_byte_level_alphabet()) | {word: first + i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(EOT, special=True), AddedToken(HEADER, special=True), AddedToken("<|end|>", special=True)]
    )
    backend.add_tokens(["<tool>", "n w", "\u65e5\u672c"])
    return wrapped(backend, eos_token="<|end|>")


def byte_fallback(strip: bool = True):
    """As SentencePiece makes them: words with a lower block for a space, bytes as hexadecimal numbers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for word in ("\u2581", "\u2581Hel", "lo", "\u2581wor", "ld", "\u00e9", "<0x4>", "<0x 1>"):
        vocab[word] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if strip else []))
    backend.add_special_tokens(["<s>", "</s>", AddedToken(EOT, special=True)])
    backend.add_tokens(["\u2581tool", "<0x41>"])
    return wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(mark: str = "\u2581"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), (mark + "a", -1.0), ("b", -2.0), (mark, -2.5), ("<0x41>", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark)
    backend.decoder = decoders.Metaspace(replacement=mark)
    backend.add_special_tokens([EOT])
    return wrapped(backend, unk_token="<unk>")


def word_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"[UNK]": 0, "hello": 1, "##ly": 2, "world": 3}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]", EOT])
    return wrapped(backend, unk_token="[UNK]", sep_token="[SEP]")


def bundled():
    from dflash_rs.config import assets
    from dflash_rs.models.checkpoint import load_tokenizer

    return load_tokenizer(assets() / "target")


# Whether tokens have bytes, and what transformers takes from the beginning of a text: ours may continue a prompt, so it stays.
KINDS = [
    (byte_level, True, ""),
    (lambda: byte_level(300), True, ""),
    (byte_fallback, True, " "),
    (lambda: byte_fallback(False), True, ""),
    (metaspace, True, " "),
    (lambda: metaspace("_"), True, " "),
    (word_piece, False, ""),
    (bundled, True, ""),
]
NAMES = "byte_level holes byte_fallback unstripped metaspace underscore word_piece bundled".split()


@pytest.mark.parametrize(("make", "bytewise", "taken"), KINDS, ids=NAMES)
def test_text_is_what_transformers_makes_of_the_ids(make, bytewise, taken):
    tokenizer = make()
    top = max(tokenizer.get_vocab().values()) + 20  # a model's matrices are often padded
    table = token_bytes(tokenizer, top)
    assert (table is not None) == bytewise and (table is None or len(table) == top)
    draw, compared = random.Random(0), 0
    for _ in range(600):
        ids = [draw.randrange(top) for _ in range(draw.randrange(1, 9))]
        want = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "\ufffd" in want:
            continue  # broken characters: one mark for the whole run of bytes there, one for each here
        got = Detokenizer(tokenizer, table).push(ids, None, True)
        assert got == want or (taken and got == taken + want), (ids, tokenizer.convert_ids_to_tokens(ids))
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("make", [kind[0] for kind in KINDS], ids=NAMES)
def test_special_tokens_are_not_shown_with_a_role_or_without(make):
    tokenizer = make()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    assert special
    table = token_bytes(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    for i in special:
        assert table is None or table[i] == b""
        assert Detokenizer(tokenizer, table).push([i], None, True) == ""


def test_added_tokens_that_are_text_are_shown():
    tokenizer = byte_level()
    table = token_bytes(tokenizer, len(tokenizer))
    for word in ("<tool>", "n w", "\u65e5\u672c"):
        assert table[tokenizer.convert_tokens_to_ids(word)] == word.encode()


def test_a_decoder_that_nobody_knows_gives_no_bytes():
    from tokenizers import Regex, decoders

    tokenizer = byte_fallback()
    backend = tokenizer.backend_tokenizer
    for decoder in (
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace(Regex("a+"), "b"), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        None,
    ):
        backend.decoder = decoder
        assert token_bytes(tokenizer, 300) is None, decoder


def test_ids_that_only_the_model_has_are_left_out_by_tokenizers_in_python_too():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    table = token_bytes(tokenizer, 500)
    assert table is None
    detokenizer = Detokenizer(tokenizer, table)
    ids = tokenizer("hello", add_special_tokens=False).input_ids
    assert detokenizer.push([*ids[:2], 450], None, False) + detokenizer.push([499, *ids[2:]], None, True) == "hello"


def make_target(folder, tokenizer, vocab_size: int, eos: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, eos_token_id=eos, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(Qwen3ForCausalLM(config), 0)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """256 bytes, then nothing up to x, y and z at 300 to 302; 320 rows in the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: b for c, b in _byte_level_alphabet().items() if c not in "xyz"}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"x": 300, "y": 301, "z": 302}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    with LLM(
        make_target(tmp_path_factory.mktemp("holes"), wrapped(backend), 320, 0), draft=None, device="cpu"
    ) as engine:
        yield engine


def test_text_of_high_ids_is_shown_where_the_vocabulary_has_holes(holes):
    assert holes.encode("axbycz") == [97, 300, 98, 301, 99, 302]
    assert holes.decode(holes.encode("axbycz")) == "axbycz"
    assert holes.decode([97, 280, 319, 98]) == "ab"


def test_stop_strings_see_the_text_of_high_ids(holes):
    params = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={301: 1e4})
    assert holes.generate("a", params)[0].text == "yyyyyy"
    params = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={301: 1e4}, stop="yyy")
    output = holes.generate("a", params)[0]
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("", "stop", 3)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, word_piece], ids=lambda make: make.__name__)
def ended(request, tmp_path_factory):
    """A model whose texts end with a special token that has no role."""
    tokenizer = request.param()
    eot = tokenizer.convert_tokens_to_ids(EOT)
    folder = make_target(tmp_path_factory.mktemp("ended"), tokenizer, len(tokenizer) + 7, eot)
    with LLM(folder, draft=None, device="cpu") as engine:
        yield engine, eot


def test_an_end_token_without_a_role_is_not_part_of_the_answer(ended):
    engine, eot = ended
    assert engine.eos_token_ids == [eot] and eot not in engine.tokenizer.all_special_ids
    events = list(engine.stream("hello", SamplingParams(max_tokens=5, logit_bias={eot: 1e4})))
    assert [event.text for event in events] == [""]
    assert (events[-1].output.text, events[-1].output.finish_reason) == ("", "stop")
    assert engine.decode([*engine.encode("hello"), eot]) == engine.decode(engine.encode("hello"))


def test_stop_strings_do_not_see_special_tokens(ended):
    engine, eot = ended
    if engine._bytes is None:  # without bytes there are no stop strings
        with pytest.raises(
            InvalidArgument, match="^stop: got strings, expected stop_token_ids: this tokenizer's tokens have no bytes"
        ):
            engine.generate("hello", SamplingParams(stop=EOT))
        return
    params = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={eot: 1e4}, stop=[EOT, "eot"])
    output = engine.generate("hello", params)[0]
    assert (output.text, output.finish_reason) == ("", "length")

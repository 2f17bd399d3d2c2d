"""Token ids equal those of transformers' CLIPTokenizer, for any text."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import MERGES, edit_json, refusal, reference_tokenizer, vocabulary

from tinydb.tokenizer import CLIPTokenizer

PADS = ["<|endoftext|>", "!"]
PIECES = [
    "the photo of dog's cat ohwx red", "The PHOTO Of", "don't we'll it'd I'm they've you're",
    "naïve café ÉÀ ß ǅ", "e\u0301 o\u0308\u0323 \u212b \ufb01", "日本語の写真", "Привет мир",
    "שלום عليكم", "हिन्दी ไทย", "🐶👨\u200d👩\u200d👧 🇫🇷 ❤\ufe0f",
    "½ ٣ 42 1,000.5 Ⅳ ²", " \t\n\r\x0b\x0c\u00a0\u2003\u3000\u2028",
    "\x00\x01\x07\x1b\x7f\x85\u200b\ufeff\ufffd\ufffe",
    "!!! ?! -- ... <|> |endoftext| ¡¿", "<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>",
    "</w> Ġ Ã© [V] (a:1.2)",
    "\U0010ffff\ue000\u0378"]


def random_text(rng: random.Random) -> str:
    """A few words, letters or symbols, or many; some from one script, some from anywhere in Unicode."""
    length = rng.choice([0, 1, 2, 5, 10, 30, 120])
    choices = (lambda: rng.choice(PIECES), lambda: rng.choice(rng.choice(PIECES)),
               lambda: rng.choice("abcdegotx!' "),
               lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])))
    pick = rng.choice([*choices, lambda: rng.choice(choices)()])
    return "".join(pick() for _ in range(length))


@pytest.fixture(params=PADS)
def pad(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(pad) -> CLIPTokenizer:
    return CLIPTokenizer(vocabulary(), MERGES, pad)


def reference_ids(pad: str, texts: list[str]) -> torch.Tensor:
    tokenizer = reference_tokenizer(pad)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_ids_of_random_texts(tokenizer, pad):
    rng = random.Random(0)
    texts = PIECES + ["", " ", "dog " * 200] + [random_text(rng) for _ in range(2000)]
    ours, expected = tokenizer.encode(texts), reference_ids(pad, texts)
    assert ours.shape == (len(texts), 77) and ours.dtype == torch.long
    assert [text for text, a, b in zip(texts, ours.tolist(), expected.tolist()) if a != b] == []


ADDED = {"<cat-toy>": {}, "Rex": {"normalized": False}, "<s*>": {"special": True, "rstrip": True},
         "toy": {"single_word": True}}


def with_added_tokens(folder: Path, pad: str, layout: str) -> Path:
    """A tokenizer's folder with tokens that textual inversion added, as programs of three generations write it."""
    CLIPTokenizer(vocabulary(), MERGES, pad).save(folder)
    flags = {"normalized": True, "lstrip": False, "rstrip": False, "single_word": False, "special": False}
    tokens = {token: i for i, token in enumerate(ADDED, max(vocabulary().values()) + 1)}
    if layout == "added_tokens.json":
        (folder / layout).write_text(json.dumps(tokens))
    if layout == "tokenizer_config.json":
        edit_json(folder / layout, added_tokens_decoder={
            str(i): {**flags, "content": token, **ADDED[token]} for token, i in tokens.items()})
    if layout == "tokenizer.json":
        reference = transformers.CLIPTokenizer.from_pretrained(folder)
        for token in ADDED:
            reference.add_tokens([transformers.AddedToken(token, **{**flags, **ADDED[token]})])
        shutil.rmtree(folder)
        reference.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    return folder


@pytest.mark.parametrize("layout", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_added_tokens_are_read_as_one_piece_and_kept(tmp_path, pad, layout):
    """Exactly as transformers reads the same folder, and what we save of it."""
    folder, rng = with_added_tokens(tmp_path / "theirs", pad, layout), random.Random(0)
    texts = ["a <cat-toy> dog", "a<CAT-TOY>!", "rex Rex REXes", "<s*>  dog", "toys toy", " ".join(ADDED)]
    texts += [f"{random_text(rng)}{rng.choice(list(ADDED))}{random_text(rng)}" for _ in range(300)]
    ours = CLIPTokenizer.read(folder)
    assert len(ours.encode("<cat-toy>")[0].unique()) == 4 - (pad == "<|endoftext|>")  # start, token, end, pad
    ours.save(tmp_path / "ours")
    again = CLIPTokenizer.read(tmp_path / "ours")
    assert again.added == ours.added and len(again.added) == len(ADDED) and again.vocab == ours.vocab
    for path in (folder, tmp_path / "ours"):
        reference = transformers.CLIPTokenizer.from_pretrained(path)
        expected = reference(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (ours, again):
            assert [t for t, a, b in zip(texts, tokenizer.encode(texts), expected) if not torch.equal(a, b)] == []


def test_textual_inversion_of_several_vectors_is_refused(tmp_path):
    """diffusers writes all of its tokens for the first one, which a prompt has."""
    CLIPTokenizer(vocabulary(), MERGES).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<toy>": 600, "<toy>_1": 601}))
    assert "'<toy>' is a textual inversion of several vectors" in refusal(CLIPTokenizer.read, tmp_path)


def test_an_added_token_may_be_a_piece_of_other_words(tmp_path, pad):
    """It stays in the vocabulary that the merges need; what is saved opens, here and in transformers."""
    CLIPTokenizer(vocabulary(), MERGES, pad).save(tmp_path / "theirs")
    token = {"content": "ph", "normalized": True, "lstrip": False, "rstrip": False, "single_word": True}
    edit_json(tmp_path / "theirs" / "tokenizer_config.json", added_tokens_decoder={vocabulary()["ph"]: token})
    ours = CLIPTokenizer.read(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    texts = ["a photo of the dog", "ph of the dog", "PH, ph!"]
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        reference = transformers.CLIPTokenizer.from_pretrained(path)
        expected = reference(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (ours, CLIPTokenizer.read(tmp_path / "ours")):
            assert torch.equal(tokenizer.encode(texts), expected)


@pytest.mark.parametrize("says, length", [(248, 248), (60, 60), (1e30, 77), (None, 77)], ids=str)
def test_length_is_what_the_folder_says(tokenizer, tmp_path, says, length):
    """Longer than CLIP's too; where it does not know, transformers writes 1e30."""
    tokenizer.save(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "tokenizer_config.json", model_max_length=says)
    CLIPTokenizer.read(tmp_path / "theirs").save(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert CLIPTokenizer.read(tmp_path / folder).encode("dog " * 300).shape == (1, length)


def test_one_text_is_a_batch_of_one(tokenizer):
    assert torch.equal(tokenizer.encode("the dog"), tokenizer.encode(["the dog"]))


def test_layout_of_a_row(tokenizer, pad):
    """Start, text, end, padding; the merges make one token of a word."""
    ids = vocabulary()
    row = ["<|startoftext|>", "the</w>", "dog</w>", "<|endoftext|>"] + [pad] * 73
    assert tokenizer.encode("The dog")[0].tolist() == [ids[token] for token in row]


def test_long_text_is_cut_before_the_end_token(tokenizer):
    ids = vocabulary()
    assert tokenizer.encode("dog " * 100)[0].tolist() == (
        [ids["<|startoftext|>"]] + [ids["dog</w>"]] * 75 + [ids["<|endoftext|>"]])


@pytest.mark.parametrize("text, lost", [
    ("", ""), ("dog " * 75, ""), ("dog " * 75 + "cat", "cat"), ("dog " * 75 + " Red  cat ", "Red  cat"),
    ("É " * 75 + "É of É", "É of É"), ("é 🐶" * 80, None),
], ids=["empty", "fits", "one word more", "inner space", "two-byte letters", "four-byte letters"])
def test_dropped(tokenizer, text, lost):
    """The very end of the text; what comes before it has the same ids."""
    dropped = tokenizer.dropped(text)
    assert text.rstrip().endswith(dropped)
    if lost is None:
        kept = text.rstrip().removesuffix(dropped)
        assert dropped and torch.equal(tokenizer.encode(kept), tokenizer.encode(text))
    else:
        assert dropped == lost


def test_exclamation_marks_are_padding_where_that_is_the_pad_token(tokenizer, pad):
    ids = vocabulary()
    expected = {"!": [0, 0], "<|endoftext|>": [ids["!!</w>"], ids["<|endoftext|>"]]}
    assert tokenizer.encode("dog!!")[0, 2:4].tolist() == expected[pad]


def test_save_and_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    expected, read = vars(tokenizer), vars(CLIPTokenizer.read(tmp_path))
    assert {**read, "bpe": None} == {**expected, "bpe": None}
    assert read["bpe"].to_str() == expected["bpe"].to_str()


def test_transformers_reads_what_we_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    read = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = read(PIECES, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenizer.encode(PIECES), ids)


@pytest.mark.parametrize("identifier, word", [(None, "ohwx"), ("red", "red")], ids=["default", "taught"])
def test_placeholder_stands_for_the_identifier(pairs, identifier, word):
    """Every [V] in a prompt is the word that the folder records."""
    sd = replace(pairs("tiny").sd, info=replace(pairs("tiny").sd.info, identifier=identifier))
    found = sd.encode_prompt("a photo of [V] dog, [V]")
    assert torch.equal(found, sd.text_encoder(sd.tokenizer.encode(f"a photo of {word} dog, {word}")))
    assert not torch.equal(found, sd.text_encoder(sd.tokenizer.encode("a photo of [V] dog, [V]")))

"""CLIP's byte-level BPE, on the `tokenizers` library, and the placeholder [V]."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from tinydb.config import InputError, as_text, read_json, read_text, write_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PLACEHOLDER = "[V]"  # stands for the identifier in every prompt, as in the DreamBooth paper
LONGEST = 10**4  # ids of a text; transformers writes 1e30 where it does not know
MATCHING = ("normalized", "lstrip", "rstrip", "single_word")  # how an added token is found in a text
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """Text to the ids that transformers' CLIPTokenizer gives with max_length padding and truncation.

    `vocab` maps tokens to ids, `merges` lists the pairs to join, best first. `pad` is the padding token: the end token
    in SD 1.x, "!" in SD 2.x. Every special token is matched anywhere in a text, the pad token included: in SD 2.x each
    "!" becomes padding. `added` maps the id of an extra token, such as the <cat-toy> of a textual inversion, to its
    text ("content") and the rules by which it is found in a prompt.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = EOS, max_length: int = 77,
                 added: dict[int, dict[str, Any]] = {}):
        self.own_vocab, self.added = vocab, added  # as the files have them; `added` may repeat tokens of `vocab`
        vocab = vocab | {token["content"]: number for number, token in added.items()}
        missing = [token for token in (BOS, EOS, pad) if token not in vocab]
        if missing:
            raise InputError(f"tokenizer: no {' and no '.join(missing)} in the vocabulary; expected CLIP's vocab.json")
        texts = {token["content"] for token in added.values()}
        several = [text for text in texts if f"{text}_1" in texts]
        if several:
            raise InputError(f"tokenizer: {min(several)!r} is a textual inversion of several vectors, which is not "
                             "supported; get the model without it")
        self.vocab, self.merges, self.pad, self.max_length = vocab, merges, pad, max_length
        try:
            self.bpe = Tokenizer(BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                                     unk_token=EOS, fuse_unk=False))
        except Exception as error:  # the library raises nothing narrower
            reason = str(error).splitlines()[0]
            raise InputError(f"tokenizer: merges and vocabulary do not fit ({reason}); copy both together") from None
        self.bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(False)])
        self.bpe.post_processor = processors.RobertaProcessing((EOS, vocab[EOS]), (BOS, vocab[BOS]),
                                                               trim_offsets=False, add_prefix_space=False)
        self.bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS, pad)])
        self.bpe.add_tokens([AddedToken(**token) for token in added.values()])

    def encode(self, text: str | list[str]) -> Tensor:
        """One text or several -> ids (B, max_length): start, text, end, padding. A text that is too long is cut
        before the end token; `dropped` tells what is lost."""
        texts = [text] if isinstance(text, str) else text
        rows = [encoding.ids for encoding in self.bpe.encode_batch([as_text(each) for each in texts])]
        ids = torch.full((len(rows), self.max_length), self.vocab[self.pad])
        for row, tokens in zip(ids, rows):
            tokens = tokens[: self.max_length - 1] + tokens[-1:] if len(tokens) > self.max_length else tokens
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def dropped(self, text: str) -> str:
        """The end of `text` that `encode` cuts off; empty where all of it fits."""
        encoding = self.bpe.encode(as_text(text))
        kept = encoding.offsets[self.max_length - 2 : self.max_length - 1]  # the last token that stays
        return text[kept[0][1]:].strip() if len(encoding.ids) > self.max_length else ""

    @classmethod
    def read(cls, folder: Path) -> "CLIPTokenizer":
        """Read a `tokenizer/` folder: vocab.json and merges.txt, or the tokenizer.json that newer programs write."""
        try:
            settings, model, added = {}, {}, []
            for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the map decides, where there is one
                if (folder / name).exists():
                    settings |= read_json(folder / name)
            if (folder / "vocab.json").exists():
                lines = read_text(folder / "merges.txt").split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
                model = {"vocab": read_json(folder / "vocab.json"), "merges": merges}
            else:
                whole = read_json(folder / "tokenizer.json")
                model, added = whole["model"], whole.get("added_tokens") or []
            if (folder / "added_tokens.json").exists():  # of older programs
                added = [{"content": token, "id": i} for token, i in read_json(folder / "added_tokens.json").items()]
            added += [{"id": i, **token} for i, token in (settings.get("added_tokens_decoder") or {}).items()]
            vocab = dict(model["vocab"])
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
            pad = settings.get("pad_token") or EOS
            pad = pad["content"] if isinstance(pad, dict) else pad
            # a rule that a file does not name is off, but for "normalized"
            known = {int(token["id"]): {"content": token["content"], "special": token.get("special") is True,
                                        **{name: token.get(name, name == "normalized") is True for name in MATCHING}}
                     for token in added if token["content"] not in (BOS, EOS, pad)}
            length = int(settings.get("model_max_length") or 77)
            return cls(vocab, merges, pad, length if length <= LONGEST else 77, known)
        except InputError:
            raise
        except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InputError(f"{folder}: not a CLIP tokenizer ({error}); expected vocab.json and merges.txt") from None

    def save(self, folder: Path) -> None:
        """Write vocab.json, merges.txt and the two files of settings, as Stable Diffusion folders carry them."""
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": self.pad, "unk_token": EOS}
        settings = {**tokens, "model_max_length": self.max_length, "tokenizer_class": "CLIPTokenizer"}
        if self.added:
            settings["added_tokens_decoder"] = self.added
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        (folder / "vocab.json").write_text(json.dumps(self.own_vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        write_json(folder / "special_tokens_map.json", tokens)
        write_json(folder / "tokenizer_config.json", settings)

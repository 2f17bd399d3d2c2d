"""The prompts under which pictures are learnt: a text beside each of them, and templates for the class."""

import re
from collections.abc import Iterable
from pathlib import Path

from tinydb.config import read_text, require
from tinydb.tokenizer import PLACEHOLDER, CLIPTokenizer

NOUN = "{noun}"  # stands for the class in a template


def fill(template: str, noun: str) -> str:
    """A template as a prompt, with the article that the noun wants: "a {noun} at night" -> "an owl at night"."""
    n = "n" if noun[0].lower() in "aeiou" else ""
    return re.sub(r"\b([aA]) \{noun\}", rf"\g<1>{n} {NOUN}", template).replace(NOUN, noun)


def class_prompt(noun: str) -> str:
    """The plain class prompt of the DreamBooth paper: "a photo of a dog"."""
    return fill(f"a photo of a {NOUN}", noun)


def without_subject(prompt: str) -> str:
    """What a CLIP, which does not know the subject, can read: "[V] dog on the moon" -> "dog on the moon"."""
    return re.sub(r"\[V\](['’]s)?,?\s*", "", prompt)


def read_lines(path: Path) -> list[str]:
    """The prompts in a file, one on each line; empty lines and those that begin with # are passed over."""
    lines = [" ".join(line.split()) for line in read_text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_templates(path: Path) -> tuple[str, ...]:
    """The templates in a file."""
    templates = tuple(read_lines(path))
    require(bool(templates), f"{path}: no class prompt in it; write one a line, such as: a red {NOUN} in the snow")
    for template in templates:
        require(NOUN in template, f"{path}: {template!r} has no {NOUN}; write it where the class stands")
    return templates


def read_captions(folder: Path, names: Iterable[str]) -> list[str]:
    """The text beside each picture, dog1.txt for dog1.jpg; empty where there is none. [v] in it is [V]."""
    paths = [(folder / name).with_suffix(".txt") for name in names]
    paths = [path if path.exists() else path.with_suffix(".TXT") for path in paths]
    texts = [" ".join(read_text(path).split()) if path.exists() else "" for path in paths]
    return [text.replace("[v]", PLACEHOLDER) for text in texts]


def subject_prompts(captions: list[str], identifier: str, noun: str) -> list[str]:
    """The prompt of each picture of the subject: its caption, with the identifier for [V], or the usual one."""
    usual = f"a photo of {PLACEHOLDER} {noun}"
    return [(caption or usual).replace(PLACEHOLDER, identifier) for caption in captions]


def identifier_pattern(identifier: str) -> re.Pattern:
    """Finds the identifier in a prompt as the text encoder reads it: no letter beside it, in capitals or not."""
    return re.compile(rf"(?<![^\W\d_]){re.escape(identifier)}(?![^\W\d_])", re.IGNORECASE)


def prompt_remarks(tokenizer: CLIPTokenizer, prompts: list[list[str]], identifier: str) -> list[str]:
    """A line on each prompt, of the subject's pictures and of the class's, that will not teach what it should."""
    pattern = identifier_pattern(identifier)
    remarks = [f"the caption {prompt!r} does not name your subject; write {PLACEHOLDER} where it stands"
               for prompt in dict.fromkeys(prompts[0]) if not pattern.search(prompt)]
    remarks += [f"the class prompt {prompt!r} names your subject, whose name should mean nothing else; leave it out"
                for prompt in dict.fromkeys(sum(prompts[1:], []))
                if pattern.search(prompt) or PLACEHOLDER in prompt]
    return remarks + [f"{prompt!r} is too long for the text encoder, which will not see: {dropped!r}"
                      for prompt in dict.fromkeys(sum(prompts, [])) if (dropped := tokenizer.dropped(prompt))]

"""The README keeps its promises: its commands parse, and those that need nothing but this folder run."""

import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from processes import start

import convert_weights
import sample
import train
from tinydb.config import Parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "sample.py": sample, "convert_weights.py": convert_weights}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [shlex.split(part, comments=True) for language, block in BLOCKS if not language
            for line in block.splitlines() for part in line.split("&&")]
COMMANDS += [shlex.split(inline) for inline in re.findall(r"`((?:python|torchrun) \w+\.py[^`]*)`", README)]
OURS = [words for words in COMMANDS if words and words[0] in ("python", "torchrun") and SCRIPTS.keys() & set(words)]
PYTHON = [block for language, block in BLOCKS if language == "python"]


def split(words: list[str]) -> tuple[str, list[str]]:
    """A command -> the script, and what it is given."""
    [script] = SCRIPTS.keys() & set(words)
    return script, words[words.index(script) + 1 :]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_command_parses(words):
    script, given = split(words)
    Parser(SCRIPTS[script].Settings, "").parse_args(given)


def test_every_flag_is_one_that_a_script_has():
    known = {"--nproc_per_node", "--nnodes"}
    for module in SCRIPTS.values():
        known |= {flag for action in Parser(module.Settings, "")._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


def test_first_commands_run_and_so_does_the_python(tmp_path, monkeypatch):
    """Two steps of training on two class images; what follows finds its result, as the README has it."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    for words, short in zip(OURS[:2], (["--steps", "2", "--class-images", "2"], ["--steps", "2"])):
        script, given = split(words)
        run = start(tmp_path / "output", script, *given, *short, prepare=partial(os.chdir, tmp_path))
        assert run.wait() == 0, run.message
    assert len(list((tmp_path / "samples").glob("*-V-dog-on-the-moon.png"))) == 4
    for code in PYTHON:
        exec(code, {})

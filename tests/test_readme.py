"""The README keeps its promises: its commands parse, and those that need nothing but this folder run."""

import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import ROOT, start

import convert_weights
import sample
import tinydb
import train
from tinydb.cli import Parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "sample.py": sample, "convert_weights.py": convert_weights}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [shlex.split(part, comments=True) for language, block in BLOCKS if not language
            for line in block.splitlines() for part in line.split("&&")]
INLINE = [shlex.split(inline) for inline in re.findall(r"`((?:python|torchrun) \w+\.py[^`]*)`", README)]
OURS = [words for words in COMMANDS if words[0] in ("python", "torchrun") and SCRIPTS.keys() & set(words)]
ELSEWHERE = "sd1", "openai"  # from the hub
OFFLINE = [words for words in OURS if not any(name in word for word in words for name in ELSEWHERE)]
FEW = {"train.py": ["--steps", "2", "--class-images", "2"], "sample.py": ["--steps", "2"], "convert_weights.py": []}
IDEA = re.search(r"^## The idea alone$.*?^```python\n(.*?)^```$", README, re.M | re.S)[1]


def split(words: list[str]) -> tuple[str, list[str]]:
    """A command -> the script, and what it is given."""
    [script] = SCRIPTS.keys() & set(words)
    return script, words[words.index(script) + 1 :]


@pytest.mark.parametrize("words", OURS + INLINE, ids=" ".join)
def test_command_parses(words):
    script, given = split(words)
    Parser(SCRIPTS[script].Settings, "").parse_intermixed_args(given)


@pytest.mark.parametrize("page", [Path("README.md"), Path("weights/README.md")], ids=str)
def test_every_file_that_a_page_points_to_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z]+@", text) == [], "a number that was never filled in"
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (ROOT / page.parent / target).is_file(), target


def test_every_flag_is_one_that_a_script_has():
    known = {"--nproc_per_node"}  # torchrun's
    for module in SCRIPTS.values():
        known |= {flag for action in Parser(module.Settings, "")._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


@pytest.fixture
def clone(tmp_path, monkeypatch) -> None:
    """A folder to run things in that looks like a fresh clone, with pictures of a teapot of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(ROOT / "weights")
    shutil.copytree(ROOT / "weights" / "subjects" / "pip", "my_teapot")


def run(words: list[str], *more: str) -> str:
    """Run a command with few steps, in a process of its own; what it said on stderr."""
    script, given = split(words)
    process = start(Path("output").absolute(), script, *given, *FEW[script], *more,
                    prepare=partial(os.chdir, Path.cwd()))
    assert process.wait() == 0, f"{shlex.join(words)}\n{process.message}"
    return process.message


def test_commands_run_one_after_the_other(clone):
    """Each finds what those before it left."""
    for words in OFFLINE:
        message = run(words)
        for noun in re.findall(r"\[V\] (\w+)", " ".join(words)):  # drawn by the model that was taught it
            assert f"[V] is a {noun}" in message, shlex.join(words)
    assert len(list(Path("samples").glob("*-V-dog-on-the-moon.png"))) == 4


def test_the_idea_alone_is_what_train_does(clone, one_thread):
    """A step of either moves the weights to the same place, without captions and with the paper's prior. (AdamW goes
    by the sign of each gradient at first: rounding in one step turns many signs in the next.)"""
    code = IDEA.replace("range(120)", "range(1)").replace("range(48)", "range(2)")
    assert code.count("range(1)") == code.count("range(2)") == 1
    exec(code, {})
    shutil.copytree(ROOT / "weights" / "subjects" / "rex", "rex", ignore=shutil.ignore_patterns("*.txt"))
    run(shlex.split("python train.py --images rex --class dog --lora 0 --class-prompts plain --no-frozen-prior"),
        "--steps", "1")
    start_from, ours, theirs = (
        torch.cat([tensor.flatten() for part in (sd.unet, sd.text_encoder) for tensor in part.parameters()])
        for sd in map(tinydb.load, ("weights/tiny", "runs/idea/model", "runs/rex/model")))
    assert (ours - theirs).norm() < 0.01 * (theirs - start_from).norm()
    assert tinydb.load("runs/idea/model").info.class_noun == "dog"  # so sample.py knows what [V] is


def test_every_file_is_named_and_those_of_the_book_with_about_their_lines():
    section = re.search(r"^## The files, in the order in which to read them$.*?(?=^## )", README, re.M | re.S)[0]
    counts = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", section, re.M)
    assert len(counts) == 10
    for file, count in counts:
        assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) == pytest.approx(int(count), rel=0.1), file
    named = {Path(file).name for file in re.findall(r"`([\w/]+\.py)`", section)}
    assert {path.name for path in (ROOT / "tinydb").glob("[!_]*.py")} | SCRIPTS.keys() == named

"""What people type: words of other trainers, folders one level off, devices that are not there."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from conftest import refusal

import train
from tinydb import cli
from tinydb.class_images import plain_noun
from tinydb.cli import choose_device
from tinydb.storage import WEIGHT_FILES, fingerprint


@pytest.fixture
def refused(command):
    """A whole script that must end with code 2 and one line: refused(script, *arguments) -> the line."""
    def run(script: str, *arguments: object) -> str:
        code, out, error = command(script, *map(str, arguments))
        assert code == 2 and out == "" and error.count("\n") == 1 and error.startswith(f"{script}: "), error
        return error
    return run


@pytest.mark.parametrize("noun, plain", [
    ("a dog", "dog"), ("an  Airedale terrier", "Airedale terrier"), ("a photo of a dog", "dog"), ("dog", "dog"),
    ("my the dog", "dog"), (" antique vase ", "antique vase"), ("image of THE cat", "cat"), ("theatre", "theatre"),
])
def test_the_class_is_a_plain_noun(noun, plain):
    assert plain_noun(noun, "ohwx") == plain


@pytest.mark.parametrize("noun, identifier, word", [
    ("sks dog", "ohwx", "sks"), ("a photo of ohwx dog", "ohwx", "ohwx"), ("[V] dog", "ohwx", "[v]"),
    ("Rexy dog", "rexy", "rexy"), ("dog", "sks dog", "dog"), ("dog", "[V]", "[V]"), ("dog", " ", "--identifier"),
])
def test_the_class_holds_no_word_for_the_subject(noun, identifier, word):
    assert word in refusal(plain_noun, noun, identifier)


@pytest.mark.parametrize("script, given, words", [
    ("train.py", ["--clas", "dog"], ["--class: "]),
    ("train.py", ["--class_images", "5"], ["--class-images: "]), ("train.py", ["--zzz"], ["--zzz", "--help"]),
    ("train.py", ["--resume", "latest"], ["'latest' is not an option or its value"]),
    ("train.py", ["--class-images", "0"], ["--class-images 0", "--prior-weight 0"]),
    ("sample.py", ["--prompt", "a dog"], ["'--prompt'", "prompt, without a flag"]),
], ids=str)
def test_options_that_are_not_there_get_a_hint(refused, script, given, words):
    error = refused(script, *given)
    assert [word for word in words if word not in error] == [], error


def test_option_in_a_file_that_is_not_there(refused, tmp_path):
    (tmp_path / "a.json").write_text('{"image": "x"}')
    assert "--images: folder" in refused("train.py", "--config", "a.json")


def test_options_in_a_file_may_be_written_as_flags(tmp_path):
    (tmp_path / "a.json").write_text('{"class-images": 8, "--class": "dog", "lr_text": 1e-4}')
    options = cli.options_in_file(train.Settings, str(tmp_path / "a.json"))
    assert options == {"class_images": 8, "class_noun": "dog", "lr_text": 1e-4}


def test_home_in_quotes(command, nano, photos, tmp_path, monkeypatch):
    """A shell leaves ~ as it is in quotes, behind "=", and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(photos, tmp_path / "home" / "photos")
    (tmp_path / "a.json").write_text(json.dumps({"out": "~/run", "weights": str(nano), "class": "dog"}))
    code, _, error = command("train.py", "--images=~/photos", "--config=a.json", "--device=cpu", "--prior-weight=0")
    assert code == 0 and (tmp_path / "home" / "run" / "model").is_dir(), error
    code, out, _ = command("sample.py", "a ~/dog", "--weights=~/run/model", "--out=~/dog.png", "-n1", "--device=cpu")
    assert code == 0 and out == f"{tmp_path}/home/dog.png\n"


@pytest.mark.parametrize("inside", [["10_sks dog/1.png"], ["day/1.png", "night/2.png"]], ids=str)
def test_photographs_in_subfolders_are_named(refused, nano, photos, tmp_path, inside):
    for name in inside:
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        shutil.copy(photos / "1.png", tmp_path / "in" / name)
    error = refused("train.py", "--images=in", "--class=dog", f"--weights={nano}", "--device=cpu")
    assert "no picture in it" in error
    assert [name for name in inside if f"--images in/{Path(name).parent}" not in error] == [], error


def test_names_of_bytes_that_are_no_text(command, refused, nano, photos, tmp_path):
    """As folders from another system have them: pictures may have such names; where tensors are, they are refused."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(photos, odd)
    (odd / "0.png").rename(odd / os.fsdecode(b"\xff.png"))
    line = [f"--images={odd}", "--class=dog", f"--weights={nano}", "--out=run", "--prior-weight=0", "--device=cpu"]
    for more in (["--steps=1"], ["--steps=2", "--resume"]):
        code, _, error = command("train.py", *line, *more)
        assert code == 0 and "no report" not in error, error
    assert "udcff.png" in (tmp_path / "run" / "report.html").read_text()
    shutil.copytree(nano, odd, dirs_exist_ok=True)
    assert "no text; write it in UTF-8" in refused("train.py", *line, f"--out={odd / 'out'}")
    assert "not valid UTF-8" in refused("train.py", *line, f"--weights={odd}", "--out=other")


def test_pipe_beside_a_picture(refused, nano, photos, tmp_path):
    """It is no caption, and reading it would never end."""
    shutil.copytree(photos, tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "0.txt")
    assert "0.txt: not readable as text (not a file)" in refused(
        "train.py", "--images=photos", "--class=dog", f"--weights={nano}", "--device=cpu")


def test_the_folder_of_a_run_stands_for_its_model(command, nano, photos, tmp_path):
    """Where there is one; a folder without either is refused by name."""
    shutil.copytree(nano, tmp_path / "runs" / "dog" / "model")
    given = [f"--images={photos}", "--class=cat", "--prior-weight=0", "--steps=1", "--device=cpu", "--save-every=0"]
    code, _, error = command("train.py", *given, "--weights=runs/dog", "--out=again")
    assert code == 0 and (tmp_path / "again" / "model").is_dir(), error
    code, _, error = command("train.py", *given, "--weights=runs", "--out=never")
    assert code == 2 and "runs/dog/model is; give that" in error
    code, _, error = command("sample.py", "a dog", "-n1", "--steps=1", "--weights=runs/dog", "--device=cpu")
    assert code == 0 and "runs/dog/model on cpu" in error


def test_fingerprint_tells_models_by_the_end_of_their_files(tmp_path):
    prints = set()
    for last in (b"a", b"b"):
        for part, name in WEIGHT_FILES.items():
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / name).write_bytes(bytes(2**21) + last)
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 2


def test_weights_of_nowhere_have_no_fingerprint(tmp_path):
    assert "expected a model folder" in refusal(fingerprint, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["hpu", "meta", "privateuseone", "nonsense", "cuda:99", "", "CPU", "cpu;0", "cpu:-2"])
def test_devices_that_are_not_there(name):
    assert f"--device {name!r}" in refusal(choose_device, name)


@pytest.mark.parametrize("error", [
    RuntimeError("could not create a primitive\nand a stack"), RuntimeError("out of memory"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")], ids=str)
def test_memory_that_is_full_and_no_docstring(monkeypatch, capsys, error):
    """oneDNN has words of its own for it, NumPy an exception; and `python -OO` takes the docstring away."""
    def fail(settings: train.Settings) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(fail, train.Settings, None, out_of_memory="Try --batch 1")
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.endswith(". Try --batch 1\n") and error.count("\n") == 1
    assert ": . " not in error  # something is said before that


def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    """A compiler that fails."""
    raise OSError("no triton here")


@pytest.mark.parametrize("backend, reason", [("inductor", "No working C++ compiler"), (broken, "no triton here")],
                         ids=["inductor", "broken"])
def test_compile_without_a_compiler(monkeypatch, capsys, backend, reason):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end, torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        cli.run(lambda settings: torch.compile(torch.sin, backend=backend)(torch.ones(2)), train.Settings, "",
                out_of_memory="")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("train.py: --compile: ") and error.count("\n") == 1, error
    assert reason in error and "leave it out" in error

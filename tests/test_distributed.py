"""Two processes do together what one does with twice the batch; nothing hangs when one has trouble."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files, metrics, names, refusal
from processes import Script, arguments, slow_disk, start, start_ranks, turn_pictures
from safetensors.torch import load_file

import train
from tinydb.run import check_processes


@pytest.fixture
def line(nano, photos, tmp_path):
    """line(out, **settings) -> the command line of a run with few class images."""
    def build(out: str, **settings) -> list[str]:
        given = {"images": photos, "class_noun": "dog", "weights": nano, "out": tmp_path / out,
                 "device": "cpu", "batch": 1, "steps": 1, "save_every": 2}
        return arguments(**{**given, **settings})
    return build


def finish(runs: list[Script]) -> list[int]:
    """The exit codes of all ranks."""
    return [run.wait() for run in runs]


def succeed(runs: list[Script]) -> None:
    assert finish(runs) == [0] * len(runs), [run.stderr for run in runs]


def wait_until(condition: Callable[[], bool], runs: list[Script]) -> None:
    """Until it holds, as long as all ranks run."""
    until = time.monotonic() + 100
    while not condition():
        assert all(run.process.is_alive() for run in runs), [run.stderr for run in runs]
        assert time.monotonic() < until
        time.sleep(0.01)


def some_steps(out: Path) -> bool:
    return (out / "metrics.jsonl").exists() and len(metrics(out)) >= 2


def gradient(out: Path) -> torch.Tensor:
    """The clipped gradient of a run's only step, in one vector: Adam's first moment after it is 0.1 of it."""
    saved = load_file(out / "checkpoints" / "step-000001" / "state.exp_avg.safetensors")
    return 10 * torch.cat([saved[name].flatten() for name in sorted(saved)])


def test_two_ranks_are_one_process_with_twice_the_batch(line, tmp_path):
    """In gradients, and in the losses that are reported. Had they the same examples, it would be half the batch."""
    succeed(start_ranks(2, tmp_path / "log", *line("two", accumulate=2)))
    for name, batch in (("one", 4), ("half", 2)):
        succeed([start(tmp_path / "log", "train.py", *line(name, batch=batch))])
    two, one, half = (gradient(tmp_path / name) for name in ("two", "one", "half"))
    assert (two - one).norm() < 1e-5 * one.norm() and one.norm() > 0.1
    assert (half - one).norm() > 0.1 * one.norm()
    [reported], [expected] = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for name in ("instance_loss", "prior_loss"):
        assert reported[name] == pytest.approx(expected[name], rel=1e-5)


def test_two_ranks_learn_each_picture_under_its_prompt(line, photos, tmp_path):
    """As one process does: no two pictures have the same."""
    images = shutil.copytree(photos, tmp_path / "photos")
    for i, word in enumerate(("red", "cat", "the")):
        (images / f"{i}.txt").write_text(f"{word} [V] dog")
    (tmp_path / "prompts.txt").write_text("red {noun}\nthe {noun}\n")
    settings = {"images": images, "class_prompts": tmp_path / "prompts.txt", "class_images": 8}
    succeed(start_ranks(2, tmp_path / "log", *line("two", **settings)))
    succeed([start(tmp_path / "log", "train.py", *line("one", batch=2, **settings))])
    succeed([start(tmp_path / "log", "train.py", *line("plain", batch=2, class_images=8))])
    two, one, plain = (gradient(tmp_path / name) for name in ("two", "one", "plain"))
    assert (two - one).norm() < 1e-5 * one.norm() < 1e-3 * (plain - one).norm()


def test_class_images_are_the_same_for_any_number_of_ranks(line, tmp_path):
    """Ten of them are two groups, so the third rank has nothing to do and waits for the others."""
    succeed(start_ranks(3, tmp_path / "log", *line("three", class_images=10)))
    succeed([start(tmp_path / "log", "train.py", *line("one", class_images=10))])
    images = files(tmp_path / "three" / "class_images")
    assert len({content for name, content in images.items() if name.endswith(".png")}) == 10
    assert images == files(tmp_path / "one" / "class_images")


@pytest.mark.parametrize("asked", [0, 1], ids=["first", "second"])
def test_stop_of_any_rank_stops_all(line, tmp_path, asked):
    """At the same step; and no rank leaves before the checkpoint is there, however slow the disk is: torchrun ends
    those that are left."""
    out = tmp_path / "out"
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=1000, save_every=1000),
                       prepare=partial(slow_disk, "0", 0.05))
    wait_until(lambda: some_steps(out), runs)
    os.kill(runs[asked].process.pid, signal.SIGTERM)
    assert runs[1].wait() == 130
    assert names(out / "checkpoints") == [f"step-{len(metrics(out)):06d}"]
    assert runs[0].wait() == 130
    assert not (out / "model").exists() and "--resume" in runs[0].message.split("\n")[-1]


@pytest.mark.parametrize("more", [{"sample_every": 1, "frozen_prior": True}, {"lora": 2, "recompute": True},
                                  {"offload": True, "freeze_text": True, "precision": "bf16"}], ids=str)
def test_resumed_ranks_end_in_the_same_bytes(line, tmp_path, more):
    settings = {"accumulate": 2, **more}
    for steps, resume in ((2, []), (4, ["--resume"])):
        succeed(start_ranks(2, tmp_path / "log", *line("out", steps=steps, **settings), *resume))
    succeed(start_ranks(2, tmp_path / "log", *line("whole", steps=4, **settings)))
    for folder in ("model", "checkpoints/step-000004"):
        assert files(tmp_path / "out" / folder) == files(tmp_path / "whole" / folder)
    assert (tmp_path / "out" / ("lora.safetensors" if "lora" in more else "model")).exists()


def test_stop_while_class_images_are_made(line, tmp_path):
    """Only one rank hears of it; both leave with 130, and what was drawn is there for --resume."""
    def drawn() -> int:
        return len(list((tmp_path / "out").glob("class_images/*/*.png")))

    runs = start_ranks(2, tmp_path / "log", *line("out", class_images=600))
    wait_until(lambda: drawn() >= 20, runs)
    os.kill(runs[1].process.pid, signal.SIGTERM)
    assert finish(runs) == [130, 130]
    assert "--resume" in runs[0].message.split("\n")[-1] and "died" not in runs[0].message
    assert 20 <= drawn() < 600


def test_rank_that_dies_ends_the_run_with_one_message(line, tmp_path):
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=1000, save_every=1000))
    wait_until(lambda: some_steps(tmp_path / "out"), runs)
    runs[1].process.kill()
    assert runs[0].wait() == 1
    assert "Traceback" not in runs[0].stderr and "another process of this run died" in runs[0].message


def test_loss_that_is_not_finite_ends_all_ranks(line, tmp_path):
    """Rank 0 says why, and no one hangs or talks over it."""
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=5, lr=1e12, save_every=5))
    assert runs[0].wait() == 2 and "--lr" in runs[0].message
    assert runs[1].wait() != 0 and not (tmp_path / "out" / "checkpoints").exists()


def test_bad_input_ends_all_ranks(line, tmp_path):
    """Whether it is on the command line or was found by the first process, which alone looks into OUT."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    for out, settings, words in (("out", {"images": "nowhere"}, "nowhere: not a folder"),
                                 ("taken", {}, "taken is not empty")):
        runs = start_ranks(2, tmp_path / "log", *line(out, **settings))
        assert runs[0].wait() == 2 and words in runs[0].message and runs[1].wait() != 0
        assert "Traceback" not in runs[0].stderr + runs[1].stderr
    assert not (tmp_path / "out").exists() and names(tmp_path / "taken") == ["notes.txt"]


@pytest.mark.parametrize("name, others", [
    ("steps", {"steps": 7}), ("resume", {"resume": True}), ("lr_text", {"lr_text": 1e-4}), ("pictures", {}),
])
def test_ranks_that_were_started_differently_end_at_once(line, tmp_path, name, others):
    """All of them, with the name of what differs; otherwise they hang, or train on different things."""
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=5), others=arguments(**others),
                       prepare=partial(turn_pictures, "1" if name == "pictures" else "none"))
    assert finish(runs) == [2, 2]
    assert all(f"process 1 has {name} " in run.message for run in runs)
    assert not (tmp_path / "out").exists()


def test_torchrun(line, tmp_path):
    """As a user starts it, and without a warning. The model is the one that the ranks of the other tests make."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, str(ROOT / "train.py"), *line("out")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    succeed(start_ranks(2, tmp_path / "log", *line("same")))
    assert files(tmp_path / "out" / "model") == files(tmp_path / "same" / "model")
    assert done.stdout.count("python sample.py") == 1


@pytest.mark.parametrize("there", [[], ["MASTER_ADDR"], ["RANK", "MASTER_ADDR"]], ids=str)
def test_several_processes_without_torchrun_are_refused(nano, photos, tmp_path, monkeypatch, there):
    """WORLD_SIZE may be there for another reason."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WORLD_SIZE", *there):
        monkeypatch.setenv(name, "2")
    settings = train.Settings(images=str(photos), class_noun="dog", weights=str(nano), device="cpu", out=str(tmp_path))
    assert "no torchrun started this process" in refusal(train.main, settings)


def test_one_gpu_for_several_processes_is_refused():
    assert "each takes a GPU of its own; give --device cuda" in refusal(check_processes, torch.device("cuda", 1), 2)


@pytest.mark.parametrize("there", [{"RANK": "1"}, {"WORLD_SIZE": ""}], ids=str)
def test_one_process_whatever_else_is_set(teach, tmp_path, monkeypatch, there):
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert (teach(tmp_path / "out", steps=1) / "model").is_dir()

"""Two processes do together what one does with twice the batch; nothing hangs when one has trouble."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import files
from processes import ROOT, Script, arguments, record_noise, start, start_ranks
from safetensors.torch import load_file

STATE = "state.safetensors"


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


def gradient(out: Path) -> torch.Tensor:
    """The clipped gradient of a run's only step, in one vector: Adam's first moment after it is 0.1 of it."""
    saved = load_file(out / "checkpoints" / "step-000001" / STATE)
    return 10 * torch.cat([saved[name].flatten() for name in sorted(saved) if name.startswith("exp_avg.")])


def metrics(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(out: Path, runs: list[Script]) -> None:
    """Until some steps are done."""
    until = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 2:
        assert all(run.process.is_alive() for run in runs), [run.stderr for run in runs]
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_are_one_process_with_twice_the_batch(line, tmp_path, accumulate):
    """In gradients, and in the losses that are reported."""
    succeed(start_ranks(2, tmp_path / "log", *line("two", accumulate=accumulate)))
    succeed([start(tmp_path / "log", "train.py", *line("one", batch=2 * accumulate))])
    two, one = gradient(tmp_path / "two"), gradient(tmp_path / "one")
    assert (two - one).norm() < 1e-5 * one.norm() and one.norm() > 0.1
    [reported], [expected] = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for name in ("instance_loss", "prior_loss", "validation_loss"):
        assert reported[name] == pytest.approx(expected[name], rel=1e-5)
    if accumulate == 1:
        succeed([start(tmp_path / "log", "train.py", *line("half", batch=1))])
        assert (gradient(tmp_path / "half") - one).norm() > 0.1 * one.norm()


def test_ranks_add_different_noise(line, tmp_path):
    """No noise comes twice, in any rank, step or micro-step, instance or class."""
    noted = tmp_path / "noted"
    noted.mkdir()
    succeed(start_ranks(2, tmp_path / "log", *line("out", accumulate=2, steps=3),
                        prepare=partial(record_noise, noted)))
    noise = [(noted / f"noise-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert [len(values) for values in noise] == [2 * 2 * 3] * 2
    assert len(set(noise[0] + noise[1])) == 24


def test_class_images_are_the_same_for_any_number_of_ranks(line, tmp_path):
    """17 of them: two groups for the first rank, one for the second, a picture alone in the last."""
    succeed(start_ranks(2, tmp_path / "log", *line("two", class_images=17)))
    succeed([start(tmp_path / "log", "train.py", *line("one", class_images=17))])
    images = files(tmp_path / "two" / "class_images")
    assert len(images) == len(set(images.values())) == 17
    assert images == files(tmp_path / "one" / "class_images")


def test_more_ranks_than_groups_of_class_images(line, tmp_path):
    """Those without work wait for the others."""
    succeed(start_ranks(3, tmp_path / "log", *line("out", class_images=3)))
    assert len(files(tmp_path / "out" / "class_images")) == 3


@pytest.mark.parametrize("asked", [[0, 1], [0], [1]], ids=["both", "first", "second"])
def test_stop_of_any_rank_stops_all_and_the_run_resumes(line, tmp_path, asked):
    """All of them exit with 130 at the same step; in the end the bytes are those of a run left alone."""
    out = tmp_path / "out"
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=1000, save_every=1000))
    wait_for_steps(out, runs)
    for rank in asked:
        os.kill(runs[rank].process.pid, signal.SIGTERM)
    assert finish(runs) == [130, 130]
    assert not (out / "model").exists() and "--resume" in runs[0].message.split("\n")[-1]
    done = len(metrics(out))
    last = f"step-{done + 2:06d}"
    succeed(start_ranks(2, tmp_path / "log", *line("out", steps=done + 2, save_every=1000), "--resume"))
    if asked == [0]:  # once is enough
        succeed(start_ranks(2, tmp_path / "log", *line("whole", steps=done + 2, save_every=1000)))
        assert files(out / "model") == files(tmp_path / "whole" / "model")
        assert files(out / "checkpoints" / last) == files(tmp_path / "whole" / "checkpoints" / last)


def test_resumed_ranks_end_in_the_same_bytes(line, tmp_path):
    """With accumulation and previews; the plain case is above."""
    settings = {"accumulate": 2, "sample_every": 1}
    for steps, resume in ((2, []), (4, ["--resume"])):
        succeed(start_ranks(2, tmp_path / "log", *line("out", steps=steps, **settings), *resume))
    succeed(start_ranks(2, tmp_path / "log", *line("whole", steps=4, **settings)))
    assert files(tmp_path / "out" / "model") == files(tmp_path / "whole" / "model")
    last = Path("checkpoints") / "step-000004"
    assert files(tmp_path / "out" / last) == files(tmp_path / "whole" / last)


def test_stop_while_class_images_are_made(line, tmp_path):
    """Only one rank hears of it; both leave with 130, and what was drawn is there for --resume."""
    runs = start_ranks(2, tmp_path / "log", *line("out", class_images=600))
    until = time.monotonic() + 100
    while len(list((tmp_path / "out").glob("class_images/*/*.png"))) < 20:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(runs[1].process.pid, signal.SIGTERM)
    assert finish(runs) == [130, 130]
    assert "--resume" in runs[0].message.split("\n")[-1] and "died" not in runs[0].message
    assert 20 < len(list((tmp_path / "out").glob("class_images/*/*.png"))) < 600


def test_rank_that_dies_ends_the_run_with_one_message(line, tmp_path):
    out = tmp_path / "out"
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=1000, save_every=1000))
    wait_for_steps(out, runs)
    runs[1].process.kill()
    assert runs[0].wait() == 1
    assert "Traceback" not in runs[0].stderr and "another process of this run died" in runs[0].message


def test_loss_that_is_not_finite_ends_all_ranks(line, tmp_path):
    """Rank 0 says why, and no one hangs or talks over it."""
    runs = start_ranks(2, tmp_path / "log", *line("out", steps=5, lr=1e30, save_every=5))
    assert runs[0].wait() == 2 and "--lr" in runs[0].message
    assert runs[1].wait() != 0 and not (tmp_path / "out" / "checkpoints").exists()


def torchrun(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*launcher, str(ROOT / "train.py"), *command], capture_output=True, text=True,
                          env=environment)


def test_torchrun(line, tmp_path):
    """As a user starts it. The model is the one that the ranks of the other tests make."""
    done = torchrun(*line("out"))
    assert done.returncode == 0, done.stderr
    succeed(start_ranks(2, tmp_path / "log", *line("same")))
    assert files(tmp_path / "out" / "model") == files(tmp_path / "same" / "model")
    assert done.stdout.count("python sample.py") == 1


def test_bad_input_under_torchrun(line, tmp_path):
    """Our line comes first, once for each process; torchrun's own report follows."""
    failed = torchrun(*line("out", steps=0))
    assert failed.returncode != 0 and not (tmp_path / "out").exists()
    assert failed.stderr.lstrip().startswith("train.py: --steps 0")

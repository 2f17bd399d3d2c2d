"""Nothing is lost: a run that was stopped, killed or ran out of disk goes on and ends in the same bytes."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import files
from PIL import Image
from processes import Script, arguments, limit_file_size, start
from safetensors.torch import load_file, save_file
from torch import nn

import tinydb
import train
from tinydb.cli import Stopped
from tinydb.config import InputError

STATE = "state.safetensors"


def steps_of(out: Path) -> list[int]:
    """The steps that metrics.jsonl holds."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def refusal(teach, out: Path, **settings) -> str:
    """The one line that a run ends with; it changes nothing in `out`."""
    before = files(out)
    with pytest.raises(InputError) as caught:
        teach(out, **settings)
    assert files(out) == before and "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_result(out: Path, expected: Path) -> None:
    """Identical bytes in the model and in the newest checkpoint; each step once in the metrics."""
    assert files(out / "model") == files(expected / "model")
    newest = checkpoints(expected)[-1]
    assert files(out / "checkpoints" / newest) == files(expected / "checkpoints" / newest)
    assert steps_of(out) == steps_of(expected)


@pytest.fixture
def signal_at(monkeypatch) -> Callable[[int, signal.Signals], None]:
    """signal_at(step, number): this process gets a signal in the middle of that step."""
    def arrange(step: int, number: signal.Signals = signal.SIGTERM) -> None:
        calls = []

        def clip_grad_norm_(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
            calls.append(limit)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return clip(parameters, limit)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_grad_norm_)

    clip = nn.utils.clip_grad_norm_
    return arrange


def stopped(teach, out: Path, **settings) -> Path:
    """A run that a signal ends."""
    with pytest.raises(Stopped, match="--resume"):
        teach(out, **settings)
    assert not (out / "model").exists()
    return out


# ------------------------------------------------------------------------------- the same bytes in the end


@pytest.mark.parametrize("settings", [
    {}, {"accumulate": 2}, {"sample_every": 1}, {"freeze_text": True}, {"prior_weight": 0.0},
    {"precision": "bf16"}, {"precision": "fp16"}, {"save_every": 0}, {"recompute": True},
], ids=lambda settings: " ".join(settings) or "plain")
def test_stopped_and_resumed_run_ends_in_the_same_bytes(teach, signal_at, tmp_path, settings):
    """As one that was left alone."""
    settings = {"save_every": 4, **settings}
    whole = teach(tmp_path / "whole", **settings)
    signal_at(1)  # too late for this step, in time for the next
    out = stopped(teach, tmp_path / "out", **settings)
    assert checkpoints(out) == ["step-000002"]
    teach(out, resume=True, **settings)
    if settings["save_every"]:
        assert_same_result(out, whole)
    assert files(out / "model") == files(whole / "model")


def test_steps_may_be_raised(teach, tmp_path):
    whole = teach(tmp_path / "whole", steps=4, save_every=2)
    out = teach(tmp_path / "out", steps=2, save_every=2)
    teach(out, steps=4, save_every=2, resume=True)
    assert_same_result(out, whole)
    assert json.loads((out / "config.json").read_text())["steps"] == 4


def test_stopped_while_class_images_are_made(teach, tmp_path, monkeypatch):
    """What was made is kept, the rest is made later."""
    settings = {"class_images": 17, "steps": 1, "save_every": 1}
    whole = teach(tmp_path / "whole", **settings)
    calls, original = [], tinydb.StableDiffusion.generate

    def generate(self, prompts, **options):
        calls.append(prompts)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, prompts, **options)

    monkeypatch.setattr(tinydb.StableDiffusion, "generate", generate)
    out = stopped(teach, tmp_path / "out", **settings)
    assert len(files(out / "class_images")) == 16
    teach(out, resume=True, **settings)
    assert len(calls) == 3
    assert_same_result(out, whole)
    assert files(out / "class_images") == files(whole / "class_images")


def test_resumes_from_the_newest_whole_checkpoint(teach, tmp_path):
    """Without the newest one, and with half of one beside it; metrics are cut back to where it goes on."""
    whole = teach(tmp_path / "whole", save_every=1, keep=9)
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for name in ("step-000003", "step-000004"):
        shutil.rmtree(out / "checkpoints" / name)
    (out / "checkpoints" / ".step-000003.tmp" / "unet").mkdir(parents=True)
    (out / "checkpoints" / ".step-000003.tmp" / "state.json").write_text("{")
    shutil.rmtree(out / "model")
    teach(out, save_every=1, keep=9, resume=True)
    assert_same_result(out, whole)
    assert [name for name in checkpoints(out) if name.startswith("step-")] == checkpoints(whole)


def test_without_a_checkpoint_it_starts_at_step_0(teach, tmp_path):
    whole = teach(tmp_path / "whole", save_every=2)
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    teach(out, save_every=2, resume=True)
    assert_same_result(out, whole)


def test_finished_run_writes_its_model_again(teach, tmp_path):
    out = teach(tmp_path / "out", save_every=2)
    before = files(out)
    shutil.rmtree(out / "model")
    teach(out, save_every=2, resume=True)
    assert files(out) == before


def test_best_step_is_remembered(teach, tmp_path, monkeypatch, capsys):
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(train, "validate", lambda *_: next(losses))
    out = teach(tmp_path / "out", steps=2, save_every=1, keep=1)
    teach(out, steps=4, save_every=1, keep=1, resume=True)
    assert checkpoints(out) == ["step-000001", "step-000004"]
    assert "lowest at step 1" in capsys.readouterr().out.rpartition("knows your dog")[2]


def test_moments_are_laid_out_like_their_weights(teach, nano, tmp_path):
    """Fused AdamW pairs storages, not elements: row-major moments of such weights would be shuffled."""
    out = teach(tmp_path / "out", steps=2, save_every=2)
    model = train.DreamBoothLoss(tinydb.load(nano), ["a dog"], False).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = train.load_checkpoint(out / "checkpoints" / "step-000002", model, optimizer)
    saved = load_file(out / "checkpoints" / "step-000002" / STATE)
    assert state["step"] == 2
    weight, expected = model.unet.conv_in.weight, saved["exp_avg.unet.conv_in.weight"]
    moment = optimizer.state[weight]["exp_avg"]
    assert weight.stride() == moment.stride() != expected.stride()
    assert torch.equal(moment, expected)


# ----------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory, nano, photos) -> Path:
    """The OUT of a run of two steps."""
    out = tmp_path_factory.mktemp("begun") / "out"
    run = start(out.parent / "log", "train.py", *arguments(
        images=photos, class_noun="dog", weights=nano, device="cpu", out=out, steps=2, save_every=2))
    assert run.wait() == 0, run.stderr
    return out


@pytest.mark.parametrize("name, before, now", [
    ("seed", 0, 1), ("lr", 1e-3, 2e-3), ("lr_text", 5e-4, 2e-3), ("batch", 2, 3), ("accumulate", 1, 2),
    ("prior_weight", 1.0, 0.5),
    ("class_images", 5, 6), ("class_noun", "dog", "cat"), ("identifier", "ohwx", "zwx"),
    ("freeze_text", False, True),
])
def test_changed_option_is_refused_with_both_values(teach, begun, name, before, now):
    text = refusal(teach, begun, save_every=2, steps=4, resume=True, **{name: now})
    assert name in text and f"was {before!r}" in text and f"is now {now!r}" in text


def test_changed_precision_is_refused(teach, begun):
    text = refusal(teach, begun, save_every=2, steps=4, resume=True, precision="bf16")
    assert "precision was 'torch.float32' and is now 'torch.bfloat16'" in text


def test_an_option_that_an_older_run_did_not_know_had_its_default(teach, begun, tmp_path):
    """And names that are no options any more, such as "checkpointing", decide nothing."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    del config["prior_weight"], config["compile"], config["recompute"]
    (out / "config.json").write_text(json.dumps({**config, "checkpointing": False}))
    teach(out, save_every=2, steps=3, resume=True)
    assert steps_of(out) == [1, 2, 3]


def test_paths_and_device_may_be_written_in_another_way(teach, begun, nano, photos, tmp_path):
    """Digests prove that they are the same."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    moved = shutil.copytree(photos, tmp_path / "moved")
    teach(out, images=f"{moved}/", weights=f"{nano}/", device="auto", save_every=2, steps=3, resume=True)
    assert steps_of(out) == [1, 2, 3]


def test_somebody_elses_folder_among_the_checkpoints(teach, begun, tmp_path):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    for name in ("step-000030-keep", "step-x", "notes"):
        (out / "checkpoints" / name).mkdir()
    teach(out, save_every=1, steps=4, keep=1, resume=True)
    assert {"step-000030-keep", "step-x", "notes", "step-000004"} <= set(checkpoints(out))


@pytest.mark.parametrize("file, damage", [
    ("unet/diffusion_pytorch_model.safetensors", lambda tensors: dict(list(tensors.items())[1:])),
    (STATE, lambda tensors: {}), (STATE, lambda tensors: {name: t[:0] for name, t in tensors.items() if t.dim()}),
], ids=["a weight is missing", "empty state", "other shapes"])
def test_incomplete_checkpoint_is_refused(teach, begun, tmp_path, file, damage):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    path = out / "checkpoints" / "step-000002" / file
    save_file(damage(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not fit") as caught:
        teach(out, save_every=2, steps=4, resume=True)
    assert str(path) in str(caught.value)


def test_changed_pictures_are_refused(teach, begun, photos, tmp_path):
    images = Path(shutil.copytree(photos, tmp_path / "photos"))
    config = json.loads((begun / "config.json").read_text())
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    (out / "config.json").write_text(json.dumps({**config, "images": str(images)}))
    Image.open(images / "0.png").rotate(180).save(images / "0.png")
    text = refusal(teach, out, images=str(images), save_every=2, steps=4, resume=True)
    assert "pictures" in text and config["run"]["pictures"] in text


def test_other_number_of_processes_is_refused(begun, nano, photos, tmp_path, teach):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "run": {**config["run"], "world_size": 2}}))
    text = refusal(teach, out, save_every=2, steps=4, resume=True)
    assert "world_size was 2 and is now 1" in text


def test_finished_run_without_checkpoints_is_refused(teach, tmp_path):
    """Rather than taught anew from the beginning."""
    out = teach(tmp_path / "out", steps=2, save_every=0)
    before = files(out)
    assert "kept no checkpoint" in refusal(teach, out, steps=4, save_every=0, resume=True)
    assert files(out) == before


def test_steps_below_those_done_are_refused(teach, begun):
    assert "--steps 1" in refusal(teach, begun, save_every=2, steps=1, resume=True)


def test_options_that_change_no_weight_are_not_refused(teach, begun, tmp_path):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    teach(out, save_every=1, steps=3, keep=5, recompute=True, resume=True)
    assert checkpoints(out) == ["step-000002", "step-000003"]


def test_another_run_is_not_overwritten(teach, begun):
    assert "holds a run" in refusal(teach, begun, save_every=2, steps=2)


def test_run_without_a_checkpoint_may_start_over(teach, tmp_path):
    """With other settings, and with the class images that it has."""
    out = tmp_path / "out"
    with pytest.raises(InputError):
        teach(out, lr=1e30, steps=3, save_every=5)
    before = files(out / "class_images")
    teach(out, lr=1e-4, steps=1)
    assert files(out / "class_images") == before and steps_of(out) == [1]


# -------------------------------------------------------------------------------------------- signals


def command_line(nano: Path, photos: Path, out: Path, **settings) -> list[str]:
    """A run that takes seconds and can be stopped anywhere."""
    given = {"images": photos, "class_noun": "dog", "weights": nano, "device": "cpu", "out": out, "batch": 1}
    return arguments(**{**given, "steps": 1000, "save_every": 500, **settings})


def wait_for(run: Script, condition: Callable[[], bool]) -> None:
    """Until it holds, as long as the script runs."""
    until = time.monotonic() + 60
    while not condition():
        assert run.process.is_alive() and time.monotonic() < until, run.stderr
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_exit_with_130(nano, photos, tmp_path, number):
    """However many of them come; what it prints is true."""
    out = tmp_path / "out"
    run = start(tmp_path / "log", "train.py", *command_line(nano, photos, out))
    wait_for(run, lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) >= 3)
    for _ in range(5):
        os.kill(run.process.pid, number)
        time.sleep(0.01)
    assert run.wait() == 130
    assert "--resume" in run.message.split("\n")[-1] and "Traceback" not in run.stderr
    assert not (out / "model").exists()
    [done] = steps_of(out)[-1:]
    assert checkpoints(out) == [f"step-{done:06d}"]
    again = start(tmp_path / "log", "train.py", *command_line(nano, photos, out, steps=done + 1), "--resume")
    assert again.wait() == 0 and steps_of(out) == list(range(1, done + 2))


# ---------------------------------------------------------------------------------- killed, and a full disk


def assert_whole(out: Path, model_files: set[str]) -> None:
    """Every file and folder that has its final name can be read to its end."""
    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")
    for folder in [out / "model", *out.glob("checkpoints/step-*")]:
        if folder.exists():
            assert model_files <= files(folder).keys()
    for folder in out.glob("checkpoints/step-*"):
        assert {"state.json", STATE} <= files(folder).keys()


def test_killed_at_20_random_instants(nano, photos, tmp_path):
    """And resumed each time: no file is ever half there; the model's bytes are those of a run left alone."""
    def run(out: Path, *more: str) -> Script:
        return start(tmp_path / "log", "train.py", *command_line(
            nano, photos, out, steps=5, save_every=1, keep=1, sample_every=2, class_images=9), *more)

    whole, started = tmp_path / "whole", time.monotonic()
    assert run(whole).wait() == 0
    longest, chance, outs = time.monotonic() - started, random.Random(0), []
    for i in range(20):
        if not outs or (outs[-1] / "model").exists():
            outs.append(tmp_path / f"out{i}")
        resume = ["--resume"] if (outs[-1] / "config.json").exists() else []
        script = run(outs[-1], *resume)
        script.process.join(chance.uniform(0, longest))
        script.process.kill()
        script.process.join()
        assert_whole(outs[-1], files(whole / "model").keys())
    for out in outs:
        script = run(out, *["--resume"] * (out / "config.json").exists())
        assert script.wait() == 0, script.stderr
        assert_same_result(out, whole)
        assert files(out / "samples") == files(whole / "samples")


def test_full_disk_leaves_the_last_checkpoint_whole(nano, photos, tmp_path):
    """A limit on the size of files that the optimizer's state alone exceeds, from the second step on."""
    out = tmp_path / "out"
    settings = partial(command_line, nano, photos, out, save_every=2)
    assert start(tmp_path / "log", "train.py", *settings(steps=2)).wait() == 0
    checkpoint = out / "checkpoints" / "step-000002"
    before, limit = files(checkpoint), (checkpoint / STATE).stat().st_size - 1
    full = start(tmp_path / "log", "train.py", *settings(steps=4), "--resume",
                 prepare=partial(limit_file_size, limit))
    assert full.wait() in (1, 2) and "Traceback" not in full.stderr
    last = full.message.split("\n")[-1]
    assert last.startswith("train.py: ") and "step-000004" in last and "could not be written" in last
    assert files(checkpoint) == before and checkpoints(out) == ["step-000002"]
    assert start(tmp_path / "log", "train.py", *settings(steps=4), "--resume").wait() == 0
    assert checkpoints(out) == ["step-000002", "step-000004"] and steps_of(out) == [1, 2, 3, 4]


def test_full_disk_while_metrics_are_written(nano, tmp_path):
    """One line that names what is wrong; everything else that this run writes is smaller than the limit."""
    Image.new("RGB", (16, 16)).save(tmp_path / "flat.png")
    run = start(tmp_path / "log", "train.py", *command_line(
        nano, tmp_path, tmp_path / "out", steps=100, save_every=0, prior_weight=0),
        prepare=partial(limit_file_size, 3000))
    assert run.wait() in (1, 2) and "Traceback" not in run.stderr
    last = run.message.split("\n")[-1]
    assert last.startswith("train.py: ") and "too large" in last and "None" not in last


def test_half_a_line_of_metrics_is_cut_off(teach, tmp_path):
    whole = teach(tmp_path / "whole", save_every=2)
    out = teach(tmp_path / "out", steps=2, save_every=2)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "inst')
    teach(out, save_every=2, resume=True)
    assert_same_result(out, whole)


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does, but for `finally`."""


def test_killed_around_a_checkpoint(teach, tmp_path, monkeypatch):
    """Just before it is written, and just after: no step is missing in the metrics, none is there twice."""
    def killed(*arguments):
        raise Killed

    whole = teach(tmp_path / "whole", save_every=2, sample_every=2)
    for name in ("save_checkpoint", "drop_checkpoints"):
        out = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train if name == "save_checkpoint" else train.Run, name, killed)
            teach(out, save_every=2, sample_every=2)
        teach(out, save_every=2, sample_every=2, resume=True)
        assert_same_result(out, whole)
        assert files(out / "samples") == files(whole / "samples")


def test_killed_before_anything_was_noted(teach, tmp_path):
    """What is left of OUT then does not stand in the way."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.json.tmp").write_text("{")
    assert (teach(out, steps=1) / "model").is_dir()


def test_leftovers_of_a_killed_run_do_no_harm(teach, tmp_path):
    """Half of what was being written, and half of what was being deleted."""
    out = teach(tmp_path / "out", steps=2, save_every=1, keep=1)
    expected = files(out / "model")
    for name in ("model", "checkpoints/step-000002", "checkpoints/step-000003"):
        for leftover in (".{}.tmp", ".{}.old", "..{}.tmp.old"):
            path = out / Path(name).parent / leftover.format(Path(name).name)
            shutil.copytree(out / "checkpoints" / "step-000002", path)
            (path / STATE).write_bytes(b"half")
    teach(out, steps=2, save_every=1, keep=1, resume=True)
    assert files(out / "model") == expected
    teach(out, steps=5, save_every=1, keep=1, resume=True)
    whole = teach(tmp_path / "whole", steps=5, save_every=1, keep=1)
    assert files(out / "model") == files(whole / "model")


def test_nothing_is_half_deleted_under_its_name(teach, tmp_path, monkeypatch):
    """Neither an old checkpoint nor the model that is written again."""
    def killed(path, *arguments, **options):
        next(Path(path).rglob("*.safetensors")).unlink()
        raise Killed

    out = teach(tmp_path / "out", steps=2, save_every=1, keep=2)
    model_files = files(out / "model").keys()
    for settings in ({"steps": 2}, {"steps": 3, "keep": 1}):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shutil, "rmtree", killed)
            teach(out, save_every=1, resume=True, **settings)
        assert_whole(out, model_files)

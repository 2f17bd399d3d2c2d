"""Nothing is lost: a run that was stopped, killed or ran out of disk goes on and ends in the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, UNET, VAE, edit_json, edit_tensors, files, metrics, names, refusal
from PIL import Image
from processes import Script, arguments, kill_at_file, limit_file_size, start
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tinydb
import train
from tinydb.cli import Stopped, option
from tinydb.config import InputError, ModelInfo
from tinydb.run import Run, StopSignal, earlier_options
from tinydb.scores import CLIP
from tinydb.storage import HERE, model_folder, written_whole

STATE = "state.exp_avg.safetensors"  # the largest file of a checkpoint


def steps_of(out: Path) -> list[int]:
    """The steps that metrics.jsonl holds."""
    return [line["step"] for line in metrics(out)]


def checkpoints(out: Path) -> list[str]:
    return names(out / "checkpoints")


def result(out: Path) -> dict[str, bytes]:
    """The files of a run's model folder, or its low-rank updates."""
    found = {name: content for name, content in files(out).items() if name.startswith(("model", "lora."))}
    assert found
    return found


def copied(out: Path, tmp_path: Path) -> Path:
    """A run of one's own to go on with."""
    return Path(shutil.copytree(out, tmp_path / "out"))


def assert_same_result(out: Path, expected: Path) -> None:
    """Identical bytes in the model and in the newest checkpoint; each step once in the metrics."""
    assert files(out / "model") == files(expected / "model")
    newest = checkpoints(expected)[-1]
    assert files(out / "checkpoints" / newest) == files(expected / "checkpoints" / newest)
    assert metrics(out) == metrics(expected)


def stopped_at_step(teach, step: int, out: Path, **settings) -> Path:
    """A run that gets a signal in the middle of that step."""
    calls = []

    def kill(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(kill)
    with pytest.raises(Stopped, match="--resume"):
        teach(out, **settings)
    hook.remove()
    assert not (out / "model").exists()
    return out


# ------------------------------------------------------------------------------- the same bytes in the end


@pytest.mark.parametrize("settings", [
    {"accumulate": 2, "sample_every": 1, "lr_decay": 1.0}, {"freeze_text": True, "precision": "bf16"},
    {"precision": "fp16"}, {"frozen_prior": True, "batch": 4}, {"frozen_prior": True, "lora": 2, "lora_conv": True},
    {"recompute": True, "prior_weight": 0.0}, {"save_every": 0}, {"lora": 2, "precision": "bf16", "lr": 1e-2},
    {"lora": 1, "recompute": True, "accumulate": 2, "freeze_text": True, "precision": "fp16"},
    {"offload": True, "precision": "bf16", "frozen_prior": True},
    {"offload": True, "precision": "fp16", "accumulate": 2, "recompute": True},
], ids=" ".join)
def test_stopped_and_resumed_run_ends_in_the_same_bytes(teach, tmp_path, settings):
    """As one that was left alone."""
    settings = {"save_every": 4, **settings}
    whole = teach(tmp_path / "whole", **settings)
    out = stopped_at_step(teach, 1, tmp_path / "out", **settings)  # too late for this step, in time for the next
    assert checkpoints(out) == ["step-000002"]
    teach(out, resume=True, **settings)
    if settings["save_every"]:
        assert files(out / "checkpoints" / "step-000004") == files(whole / "checkpoints" / "step-000004")
    assert result(out) == result(whole) and steps_of(out) == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, nano, photos) -> Path:
    """The OUT of a run of two steps. Its pictures are elsewhere now."""
    out = tmp_path_factory.mktemp("begun") / "out"
    images = shutil.copytree(photos, out.parent / "photos")
    run = start(out.parent / "log", "train.py", *arguments(
        images=images, class_noun="dog", weights=nano, device="cpu", out=out, steps=2, save_every=2))
    assert run.wait() == 0, run.stderr
    shutil.rmtree(images)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nano, photos) -> Path:
    """The OUT of the same run of four steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run = start(out.parent / "log", "train.py", *arguments(
        images=photos, class_noun="dog", weights=nano, device="cpu", out=out, steps=4, save_every=2))
    assert run.wait() == 0, run.stderr
    return out


def test_steps_may_be_raised_and_folders_moved(teach, begun, whole, nano, tmp_path):
    """The weights that it began with as well: the digests in config.json tell that they are the same."""
    out, weights = copied(begun, tmp_path), shutil.copytree(nano, tmp_path / "elsewhere" / nano.name)
    teach(out, weights=str(weights), save_every=2, resume=True)
    assert_same_result(out, whole)
    assert json.loads((out / "config.json").read_text())["steps"] == 4


@pytest.mark.parametrize("gone, noted", [("/gone/weights/tiny", False), ("/gone/sd15", True)])
def test_model_that_is_gone_is_named(begun, tmp_path, gone, noted):
    """Except that in the box of another clone, which is the same as this one's."""
    out = copied(begun, tmp_path)
    edit_json(out / "config.json", weights=gone)
    found = earlier_options(train.Settings, train.Settings(out=str(out), resume=True))
    assert found.get("weights") == (gone if noted else None)
    text = refusal(train.main, train.Settings(**{**found, "out": str(out), "resume": True}))
    assert ("/gone/sd15: not a folder" in text) == noted


def test_stopped_with_broken_weights_saves_none(teach, tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "asked", property(lambda _: True, lambda *_: None), raising=False)
    settings = {"lr": 1e12, "steps": 5, "save_every": 5, "prior_weight": 0.0}
    assert "step 1: the loss is [nan" in refusal(teach, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_options_that_change_no_weight_may_change(teach, begun, whole, tmp_path):
    out = copied(begun, tmp_path)
    teach(out, save_every=1, keep=5, recompute=True, sample_every=3, resume=True)
    assert files(out / "model") == files(whole / "model")
    assert checkpoints(out) == ["step-000002", "step-000003", "step-000004"] and names(out / "samples")


def to_old_format(out: Path) -> None:
    """The files of a run as they were before train.py was taken apart into rooms."""
    config = json.loads((out / "config.json").read_text())
    config["checkpointing"] = config.pop("recompute")  # which was called so
    del config["class_prompts"], config["lr_decay"], config["frozen_prior"]
    for path in out.glob("class_images/*/*.txt"):
        path.unlink()
    (out / "config.json").write_text(json.dumps(config))
    for checkpoint in (out / "checkpoints").iterdir():  # the moments in one file
        parts = sorted(checkpoint.glob("state.*.safetensors"))
        tensors = {name: tensor.clone() for part in parts for name, tensor in load_file(part).items()}
        save_file(tensors, checkpoint / "state.safetensors", metadata={"format": "pt"})
        for part in parts:
            part.unlink()
    more = {"lr": 1e-3, "unet_change": 0.1, "text_encoder_change": 0.1}  # of which nothing is logged any more
    (out / "metrics.jsonl").write_text("".join(json.dumps(line | more) + "\n" for line in metrics(out)))
    for path in out.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "class_images"}))


def test_old_run_goes_on(teach, begun, whole, tmp_path):
    out = copied(begun, tmp_path)
    to_old_format(out)
    teach(out, save_every=2, resume=True)
    for folder in ("model", "checkpoints/step-000004"):
        assert files(out / folder) == files(whole / folder)
    assert steps_of(out) == [1, 2, 3, 4]


def test_old_run_goes_on_whatever_the_recipe_says_now(command, begun, whole, nano, photos, tmp_path):
    """With the same command: what it does not say, the run has noted, or did before there was an option for it."""
    out = copied(begun, tmp_path)
    to_old_format(out)
    weights = Path(shutil.copytree(nano, tmp_path / "weights"))
    recipe = ModelInfo.read(weights / "tinydb.json").recipe
    edit_json(weights / "tinydb.json", recipe=asdict(replace(
        recipe, steps=9, batch=5, lr=0.1, lr_decay=0.5, frozen_prior=True, class_images=7,
        class_prompts=("a red {noun}",))))
    code, _, error = command("train.py", "--images", str(photos), "--class", "dog", "--weights", str(weights), "--out",
                             str(out), "--steps=4", "--resume", "--device=cpu")
    assert code == 0, error
    for file in (UNET, TEXT):
        assert (out / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()


@dataclass(frozen=True)
class LaterSettings(train.Settings):
    """The settings of a later version."""

    ema: float = option(0.0, "an option that older runs do not know")


def test_older_run_has_the_default_of_an_option_that_it_does_not_know(begun, whole, nano, photos, one_thread,
                                                                      tmp_path):
    out = copied(begun, tmp_path)
    settings = partial(LaterSettings, images=str(photos), class_noun="dog", weights=str(nano), device="cpu",
                       out=str(out), save_every=2, resume=True)
    assert "ema was 0.0 and is now 0.9" in refusal(train.main, settings(ema=0.9))
    train.main(settings())
    assert_same_result(out, whole)


def test_stopped_while_class_images_are_made(teach, tmp_path, monkeypatch):
    """What was made is kept, the rest is made later."""
    settings = {"class_images": 17, "steps": 1, "save_every": 1}
    expected = teach(tmp_path / "whole", **settings)
    calls, original = [], tinydb.StableDiffusion.generate

    def generate(self, prompts, **options):
        calls.append(prompts)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, prompts, **options)

    monkeypatch.setattr(tinydb.StableDiffusion, "generate", generate)
    with pytest.raises(Stopped, match="--resume"):
        teach(tmp_path / "out", **settings)
    assert len(list((tmp_path / "out" / "class_images").glob("*/*.png"))) == 16
    out = teach(tmp_path / "out", resume=True, **settings)
    assert len(calls) == 3
    assert_same_result(out, expected)
    assert files(out / "class_images") == files(expected / "class_images")


def test_metrics_are_cut_back_to_the_checkpoint(teach, begun, whole, tmp_path):
    """Of steps that come again, and of half a line."""
    out = copied(begun, tmp_path)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "instance_loss": 1.0}\n{"step": 4, "inst')
    teach(out, save_every=2, resume=True)
    assert_same_result(out, whole)


def test_without_a_checkpoint_it_starts_at_step_0(teach, whole, tmp_path):
    out = copied(whole, tmp_path)
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    teach(out, save_every=2, resume=True)
    assert_same_result(out, whole)


def test_finished_run_writes_its_model_again(teach, begun, photos, tmp_path):
    out = copied(begun, tmp_path)
    shutil.rmtree(out / "model")
    teach(out, steps=2, save_every=2, resume=True)
    assert files(out / "model") == files(begun / "model")


def test_finished_run_that_cannot_go_on_keeps_its_result(teach, begun, tmp_path):
    out = copied(begun, tmp_path)
    (out / "checkpoints" / "step-000002" / STATE).unlink()
    assert STATE in refused(teach, out, steps=9)  # of which config.json says nothing either
    assert files(out / "model") == files(begun / "model")


def test_result_that_is_newer_than_any_checkpoint_is_kept(teach, begun, tmp_path):
    """Going on would delete it, and start from what knows less."""
    out = copied(begun, tmp_path)
    teach(out, steps=3, save_every=0, resume=True)
    text = refused(teach, out, steps=9)
    assert "is of step 3, its newest checkpoint of step 2" in text


def test_previews_of_a_run_that_is_started_over_go(teach, begun, tmp_path):
    out = copied(begun, tmp_path)
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    (out / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(out / "samples" / "step-000001.png")
    teach(out, steps=2, sample_every=2)
    assert names(out / "samples") == ["step-000002.png"]


def test_previews_of_steps_that_come_again_go(teach, begun, tmp_path):
    """And those of steps that do not: other rates may have led to them."""
    out = copied(begun, tmp_path)
    (out / "samples").mkdir()
    for name in ("step-000001.png", "step-000003.png", "step-000003 (1).png"):
        Image.new("RGB", (8, 8)).save(out / "samples" / name)
    teach(out, steps=4, save_every=2, resume=True)
    assert names(out / "samples") == ["step-000001.png", "step-000003 (1).png"]  # which somebody made


def test_finished_run_that_goes_on_and_is_stopped_stands_for_its_checkpoint(teach, begun, tmp_path):
    """Not for its earlier result, which knows less."""
    out = stopped_at_step(teach, 1, copied(begun, tmp_path), steps=9, save_every=2, resume=True)
    assert model_folder(out) == out / "checkpoints" / checkpoints(out)[-1] and checkpoints(out)[-1] > "step-000002"


def test_scores_are_remembered(teach, small_clip, tmp_path, monkeypatch):
    """The interrupted run draws and scores what the uninterrupted one does, and names the same step."""
    settings = {"save_every": 1, "keep": 1, "clip": str(small_clip)}
    whole = teach(tmp_path / "whole", steps=4, **settings)
    out = teach(tmp_path / "out", steps=2, **settings)
    teach(out, steps=4, resume=True, **settings)
    assert files(out / "checkpoints") == files(whole / "checkpoints")
    assert files(out / "samples") == files(whole / "samples")


def test_clip_that_moved_begins_to_score_anew(teach, small_clip, tmp_path, capsys):
    """It is somewhere else, or another one, with whose scores the earlier ones cannot be compared."""
    clip = shutil.copytree(small_clip, tmp_path / "clip")
    out = teach(tmp_path / "out", steps=2, save_every=1, clip=str(clip))
    clip = clip.rename(tmp_path / "moved")
    teach(out, steps=3, save_every=1, clip=str(clip), resume=True)
    assert json.loads((out / "checkpoints" / "step-000003" / "state.json").read_text())["scores"].keys() == {"3"}
    assert "scores begin anew" in capsys.readouterr().err


def test_score_that_fails_ends_nothing(teach, small_clip, tmp_path, monkeypatch, capsys):
    calls, original = [], CLIP.images

    def fail(self, pictures: list[Image.Image]) -> torch.Tensor:
        calls.append(pictures)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return original(self, pictures)

    monkeypatch.setattr(CLIP, "images", fail)
    out = teach(tmp_path / "out", steps=3, save_every=1, keep=3, clip=str(small_clip))
    assert "no score this time: out of luck" in capsys.readouterr().err
    assert [step for step, line in enumerate(metrics(out), 1) if "likeness" in line] == [2, 3]


def test_model_that_is_gone_by_the_end(teach, nano, tmp_path):
    """Everything that is written is in memory."""
    weights = shutil.copytree(nano, tmp_path / "weights")
    hook = register_optimizer_step_pre_hook(lambda *_: shutil.rmtree(weights, ignore_errors=True))
    out = teach(tmp_path / "out", steps=1, weights=str(weights))
    hook.remove()
    kept, expected = (load_file(folder / VAE) for folder in (out / "model", nano))
    assert all(torch.equal(kept[name], tensor.float()) for name, tensor in expected.items())


def test_checkpoint_that_cannot_be_deleted_ends_nothing(teach, tmp_path, monkeypatch, capsys):
    """A network share keeps files that somebody reads."""
    def keep(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(shutil, "rmtree", keep)
    out = teach(tmp_path / "out", steps=3, save_every=1, keep=1)
    assert steps_of(out) == [1, 2, 3] and "no removal of an old checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("lr_decay, said", [(1.0, True), (0.5, False)], ids=["fell-already", "not-yet"])
def test_steps_that_move_the_fall_of_the_rates_are_said(teach, tmp_path, capsys, lr_decay, said):
    """Where it matters: where they have not fallen yet, the result is that of one run."""
    out = teach(tmp_path / "out", steps=2, save_every=2, lr_decay=lr_decay)
    teach(out, steps=4, save_every=2, lr_decay=lr_decay, resume=True)
    assert ("--steps was 2 and is now 4: the rates fall at other steps" in capsys.readouterr().err) == said
    whole = teach(tmp_path / "whole", steps=4, save_every=2, lr_decay=lr_decay)
    assert (files(out / "model") == files(whole / "model")) != said


def test_fewer_steps_move_the_fall_of_the_rates(teach, tmp_path, capsys):
    out = teach(tmp_path / "out", steps=8, save_every=4, keep=9, lr_decay=0.5)
    shutil.rmtree(out / "checkpoints" / "step-000008")
    shutil.rmtree(out / "model")
    teach(out, steps=5, save_every=4, lr_decay=0.5, resume=True)
    assert "--steps was 8 and is now 5: the rates fall at other steps" in capsys.readouterr().err


def test_rates_that_begin_to_fall_where_the_run_was_left(teach, tmp_path, capsys):
    """(1 - 0.8) * 5 is a little less than 1."""
    out = teach(tmp_path / "out", steps=5, save_every=2, keep=9, lr_decay=0.8)
    for step in (4, 5):
        shutil.rmtree(out / "checkpoints" / f"step-00000{step}")
    shutil.rmtree(out / "model")
    teach(out, steps=9, save_every=9, lr_decay=0.8, resume=True)
    assert "the rates fall" not in capsys.readouterr().err


def test_result_that_was_moved_to_another_disk(teach, tmp_path):
    """And linked: the link goes, the model stays there."""
    out = teach(tmp_path / "out", steps=1)
    before = files(shutil.move(out / "model", tmp_path / "elsewhere"))
    (out / "model").symlink_to(tmp_path / "elsewhere")
    teach(out, steps=2, resume=True)
    assert files(tmp_path / "elsewhere") == before and not (out / "model").is_symlink()
    assert not any(name.endswith(".tmp") for name in names(out))


def test_config_of_a_run_that_was_moved_goes_on_where_it_is(teach, tmp_path):
    first = teach(tmp_path / "first", steps=1)
    moved = shutil.copytree(first, tmp_path / "moved")
    begun = files(first)
    options = earlier_options(train.Settings, train.Settings(config=f"{tmp_path}/./moved/config.json"))
    assert options["out"] == str(moved)
    train.main(train.Settings(**{**options, "steps": 2, "resume": True}))
    assert steps_of(moved) == [1, 2] and files(first) == begun


def test_weights_that_are_still_there_need_not_be_given_again(command, begun, whole, photos, tmp_path):
    out = copied(begun, tmp_path)
    code, _, error = command("train.py", "--images", str(photos), "--class", "dog", "--out", str(out), "--steps=4",
                             "--resume", "--device=cpu")
    assert code == 0, error
    assert files(out / "model") == files(whole / "model")


def test_run_from_before_there_were_scores_goes_on(teach, begun, whole, small_clip, tmp_path):
    """It has nothing to measure its steps against, so it recommends none."""
    out = copied(begun, tmp_path)
    for path in out.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["scores"]
        path.write_text(json.dumps({**state, "best_step": 2, "best_loss": 0.5}))
    edit_json(out / "config.json", save_every=2)
    config = json.loads((out / "config.json").read_text())
    del config["clip"]
    (out / "config.json").write_text(json.dumps(config))
    teach(out, save_every=2, resume=True)
    assert files(out / "model") == files(whole / "model")


def test_folders_that_somebody_put_among_the_checkpoints(teach, begun, whole, tmp_path):
    """They are no checkpoints, and they stay."""
    out, others = copied(begun, tmp_path), ["step-000030-keep", "step-best", "notes"]
    for name in others:
        (out / "checkpoints" / name).mkdir()
    teach(out, save_every=1, keep=1, resume=True)
    assert files(out / "model") == files(whole / "model")
    assert set(others) < set(checkpoints(out)) and "step-000002" not in checkpoints(out)


def test_moments_are_laid_out_like_their_weights(nano, begun):
    """Fused AdamW pairs storages, not elements: row-major moments of such weights would be shuffled."""
    model = train.DreamBoothLoss(tinydb.load(nano), [["a dog"]], False).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train.load_checkpoint(begun / "checkpoints" / "step-000002", model, optimizer)
    saved = load_file(begun / "checkpoints" / "step-000002" / STATE)
    weight, expected = model.unet.conv_in.weight, saved["exp_avg.unet.conv_in.weight"]
    moment = optimizer.state[weight]["exp_avg"]
    assert weight.stride() == moment.stride() != expected.stride()
    assert torch.equal(moment, expected)


# ----------------------------------------------------------------------------------------- what is refused


def refused(teach, out: Path, **settings) -> str:
    """The one line that a run ends with; it changes nothing in `out` but who holds it."""
    before = files(out)
    text = refusal(teach, out, **{"save_every": 2, "resume": True, **settings})
    assert files(out) | {".lock": before[".lock"]} == before
    return text


@pytest.mark.parametrize("name, before, now", [
    ("seed", 0, 1), ("lr", 1e-3, 2e-3), ("lr_decay", 0.0, 0.5), ("lr_text", 5e-4, 2e-3), ("batch", 2, 3),
    ("accumulate", 1, 2),
    ("prior_weight", 1.0, 0.5), ("class_images", 5, 6), ("class_noun", "dog", "cat"), ("identifier", "ohwx", "zwx"),
    ("freeze_text", False, True), ("compile", False, True), ("frozen_prior", False, True),
])
def test_changed_option_is_named_alone(teach, begun, name, before, now):
    text = refused(teach, begun, **{name: now})
    assert f"{name} was {before!r} and is now {now!r}" in text and text.count(" was ") == 1


def test_changed_precision_is_refused(teach, begun):
    text = refused(teach, begun, precision="bf16")
    assert "precision was 'torch.float32' and is now 'torch.bfloat16'" in text


def test_changed_pictures_are_refused(teach, begun, photos, tmp_path):
    images = Path(shutil.copytree(photos, tmp_path / "photos"))
    Image.open(images / "0.png").rotate(180).save(images / "0.png")
    text = refused(teach, begun, images=str(images))
    assert f"pictures was {json.loads((begun / 'config.json').read_text())['run']['pictures']!r}" in text


@pytest.mark.parametrize("replace", [lambda paths: paths[0].write_bytes(paths[1].read_bytes()),
                                     lambda paths: Image.open(paths[4]).rotate(180).save(paths[4])],
                         ids=["copied", "turned"])
def test_replaced_class_images_are_refused(teach, begun, whole, tmp_path, replace):
    """One that is merely lost is drawn again, to the same."""
    out = copied(begun, tmp_path)
    paths = sorted(out.glob("class_images/*/*.png"))
    paths[2].unlink()
    teach(out, save_every=2, resume=True, steps=2)
    replace(paths)
    assert "class images are not those" in refusal(teach, out, save_every=2, resume=True)


@pytest.mark.parametrize("changes", [{"scores": [1]}, {"scores": {"2": {"likeness": 0.5}}}, {"scaler": {"scale": 1}},
                                     {"scaler": None}, {"step": 10**9}, {"step": None}], ids=str)
def test_senseless_state_is_refused(teach, begun, tmp_path, changes):
    out = copied(begun, tmp_path)
    edit_json(out / "checkpoints" / "step-000002" / "state.json", **changes)
    assert "state.json: damaged; delete" in refusal(teach, out, save_every=2, resume=True)


@pytest.mark.parametrize("before, now", [("", "a photo of [V] dog at night"), ("a [V] dog", "the [V] dog")])
def test_changed_captions_are_refused(teach, photos, tmp_path, before, now):
    images = Path(shutil.copytree(photos, tmp_path / "photos"))
    (images / "1.txt").write_text(before)
    out = teach(tmp_path / "out", images=str(images), steps=1)
    (images / "1.txt").write_text(now)
    assert "pictures was " in refused(teach, out, images=str(images))


def test_changed_weights_are_refused(teach, begun, nano, tmp_path):
    weights = Path(shutil.copytree(nano, tmp_path / "nano"))
    edit_tensors(weights / TEXT, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    assert "model was " in refused(teach, begun, weights=str(weights))


def test_other_number_of_processes_is_refused(teach, begun, tmp_path):
    out = copied(begun, tmp_path)
    edit_json(out / "config.json", run={**json.loads((out / "config.json").read_text())["run"], "world_size": 2})
    text = refused(teach, out)
    assert "world_size was 2 and is now 1" in text and text.count(" was ") == 1


def test_finished_run_without_checkpoints_is_refused(teach, begun, tmp_path):
    """Rather than taught anew from the beginning."""
    out = copied(begun, tmp_path)
    shutil.rmtree(out / "checkpoints")
    assert "its newest checkpoint of step 0" in refused(teach, out)


def test_steps_below_those_done_are_refused(teach, begun):
    assert "--steps 1" in refused(teach, begun, steps=1)


def test_another_run_is_not_overwritten(teach, begun):
    assert "holds a run" in refused(teach, begun, steps=2, resume=False)


def lose_a_tensor(path: Path) -> None:
    edit_tensors(path, lambda tensors: dict(list(tensors.items())[1:]))


def lose_all_tensors(path: Path) -> None:
    edit_tensors(path, lambda tensors: {})


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_all_entries(path: Path) -> None:
    path.write_text("{}")


def another_step(path: Path) -> None:
    edit_json(path, step=10**9)


def scores_as_text(path: Path) -> None:
    edit_json(path, scores={"2": {"likeness": "much", "prompt": 0.5}})


def foreign_scaler(path: Path) -> None:
    edit_json(path, scaler={"scale": [1]})


@pytest.mark.parametrize("file, damage", [
    (UNET, lose_a_tensor), (TEXT, lose_a_tensor), (UNET, empty), (STATE, lose_a_tensor), (STATE, lose_all_tensors),
    (STATE, empty), (STATE, Path.unlink), ("state.json", empty), ("state.json", lose_all_entries),
    ("state.json", Path.unlink), ("state.json", another_step), ("state.json", scores_as_text),
    ("state.json", foreign_scaler),
], ids=lambda value: getattr(value, "__name__", Path(str(value)).parts[0]))
def test_incomplete_checkpoint_is_refused(command, begun, nano, photos, tmp_path, file, damage):
    """One line that names the file, and nothing more is lost."""
    out = copied(begun, tmp_path)
    damage(out / "checkpoints" / "step-000002" / file)
    before = files(out / "checkpoints")
    code, _, error = command("train.py", *command_line(nano, photos, out, batch=2, steps=4), "--resume")
    [line] = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and "Traceback" not in error and f"step-000002/{file}" in line
    assert files(out / "checkpoints") == before


def test_run_without_a_checkpoint_may_start_over(teach, tmp_path):
    """With other settings, and with the class images that it has."""
    out = tmp_path / "out"
    refusal(teach, out, lr=1e12, steps=3, save_every=5)
    before = files(out / "class_images")
    teach(out, lr=1e-4, steps=1)
    assert files(out / "class_images") == before and steps_of(out) == [1]


def test_hidden_files_do_not_make_a_folder_somebody_elses(teach, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("{")
    assert (teach(tmp_path / "out", steps=1) / "model").is_dir()


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


def test_signals_save_and_exit_with_130(nano, photos, tmp_path):
    """However many of them come; what it prints is true."""
    out = tmp_path / "out"
    run = start(tmp_path / "log", "train.py", *command_line(nano, photos, out))
    wait_for(run, lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) >= 3)
    for number in 2 * (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with suppress(ProcessLookupError):  # it may be done already
            os.kill(run.process.pid, number)
        time.sleep(0.01)
    assert run.wait() == 130
    assert "--resume" in run.message.split("\n")[-1] and "Traceback" not in run.stderr
    assert not (out / "model").exists()
    done = steps_of(out)[-1]
    assert checkpoints(out) == [f"step-{done:06d}"]
    again = start(tmp_path / "log", "train.py", *command_line(nano, photos, out, steps=done + 1), "--resume")
    assert again.wait() == 0 and steps_of(out) == list(range(1, done + 2))


def test_hanging_up_that_nohup_ignores_stays_ignored():
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopSignal(rank=0)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def test_a_terminal_that_goes_away_does_not_end_the_training(nano, photos, tmp_path):
    """As `python train.py ... 2>&1 | head -c 300`."""
    command = [sys.executable, str(ROOT / "train.py"), *command_line(nano, photos, tmp_path / "out", steps=30)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run.stdout.read(300)
    run.stdout.close()
    assert run.wait(timeout=120) == 0
    assert (tmp_path / "out" / "model").is_dir() and len(steps_of(tmp_path / "out")) == 30


# ------------------------------------------------------------------------------------------- two at once


def test_two_runs_never_write_into_one_folder(nano, photos, tmp_path):
    """The second one says who is there and since when; a kill frees the folder, and what was half written goes, but for
    what another process is writing: a run that draws its class images here."""
    out = tmp_path / "out"
    line = command_line(nano, photos, out, steps=1000, save_every=5)
    first = start(tmp_path / "log", "train.py", *line)
    for condition, more in ((out / "config.json").exists, []), ((out / "checkpoints").exists, ["--resume"]):
        wait_for(first, condition)
        second = start(tmp_path / "second", "train.py", *line, *more)
        assert second.wait() == 2 and f"process {first.process.pid} on" in second.message
        assert f"since {time.strftime('%Y-')}" in second.message and "another --out" in second.message
    first.process.kill()
    first.process.join()
    gone = first.process.pid
    leftovers = [out / f".model.{HERE}.{gone}.tmp", out / "checkpoints" / f".step-000005.{HERE}.old.{gone}.tmp"]
    for leftover in leftovers:
        (leftover / "unet").mkdir(parents=True)
    living = out / "class_images" / f".00000.png.{HERE}.{os.getpid()}.tmp"
    living.touch()
    short = command_line(nano, photos, out, steps=steps_of(out)[-1] + 5, save_every=5)
    assert start(tmp_path / "second", "train.py", *short, "--resume").wait() == 0
    assert not any(leftover.exists() for leftover in leftovers) and list(out.rglob(".*.tmp")) == [living]


def test_two_runs_may_share_class_images(nano, photos, tmp_path):
    """And draw them at the same time: each picture is whole, and the same."""
    line = {"steps": 1, "class_images": 40, "class_dir": tmp_path / "class"}
    (tmp_path / "class").mkdir()
    runs = [start(tmp_path / f"log{i}", "train.py", *command_line(nano, photos, tmp_path / f"out{i}", **line))
            for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.stderr for run in runs]
    assert files(tmp_path / "out0" / "model") == files(tmp_path / "out1" / "model")
    assert len(list((tmp_path / "class").rglob("*.png"))) == 40 and not list((tmp_path / "class").rglob(".*"))


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda out: out.rename(out.with_name("elsewhere"))],
                         ids=["deleted", "moved"])
def test_folder_that_is_lost_meanwhile_ends_the_run(nano, photos, tmp_path, lose):
    out = tmp_path / "out"
    run = start(tmp_path / "log", "train.py", *command_line(nano, photos, out))
    wait_for(run, lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) >= 3)
    lose(out)
    assert run.wait() == 2 and "out was deleted, moved or taken by another run" in run.message
    assert not out.exists()


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    path, dead = tmp_path / "a[1].json", start(tmp_path / "log", "sample.py", "--help")
    dead.wait()
    writing = [f".{path.name}.{HERE}.{os.getppid()}.tmp", f".{path.name}.elsewhere.{dead.process.pid}.tmp"]
    for name in [*writing, f".{path.name}.{HERE}.{dead.process.pid}.tmp"]:
        path.with_name(name).touch()
    with written_whole(path) as temporary:
        temporary.write_text("{}")
    assert {name for name in names(tmp_path) if name != "log"} == {*writing, "a[1].json"}


# ---------------------------------------------------------------------------------- killed, and a full disk


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(
        (Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / "a").exists())))
    with written_whole(tmp_path / "a") as path:
        path.mkdir()
        (path / "b").write_text("b")
    assert ("b", False) in flushed and flushed[-1] == (tmp_path.name, True)


@pytest.mark.parametrize("number, lost", [(errno.EINVAL, False), (errno.EACCES, False), (errno.ENOTSUP, False),
                                          (errno.ENOSPC, True), (errno.EIO, True)])
def test_folder_that_cannot_be_flushed(tmp_path, monkeypatch, number, lost):
    """Network shares and WSL have some that cannot; what was written is there, unless the disk says otherwise."""
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="could not be written") if lost else nullcontext():
        with written_whole(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
    assert names(tmp_path) == ([] if lost else ["a.json"])


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


def test_killed_at_random_instants(nano, photos, tmp_path):
    """And resumed each time: no file is ever half there; the model's bytes are those of a run left alone."""
    def run(out: Path, *more: str) -> Script:
        return start(tmp_path / "log", "train.py", *command_line(
            nano, photos, out, steps=5, save_every=1, keep=1, sample_every=2, class_images=9), *more)

    expected, started = tmp_path / "whole", time.monotonic()
    assert run(expected).wait() == 0
    longest, chance, outs = time.monotonic() - started, random.Random(0), []
    for i in range(8):
        if not outs or (outs[-1] / "model").exists():
            outs.append(tmp_path / f"out{i}")
        resume = ["--resume"] if (outs[-1] / "config.json").exists() else []
        script = run(outs[-1], *resume)
        script.process.join(chance.uniform(0, longest))
        script.process.kill()
        script.process.join()
        assert_whole(outs[-1], files(expected / "model").keys())
    for out in outs:
        script = run(out, *["--resume"] * (out / "config.json").exists())
        assert script.wait() == 0, script.stderr
        assert_same_result(out, expected)
        assert files(out / "samples") == files(expected / "samples")


def test_killed_while_it_writes_a_checkpoint(nano, photos, tmp_path, begun, whole):
    """Half of it is never taken for one, and is gone in the end."""
    out = copied(begun, tmp_path)
    resumed = [*command_line(nano, photos, out, batch=2, steps=4, save_every=2), "--resume"]
    killed = start(tmp_path / "log", "train.py", *resumed, prepare=partial(kill_at_file, STATE, 1))
    assert killed.wait() == -signal.SIGKILL
    assert_whole(out, files(whole / "model").keys())
    assert start(tmp_path / "log", "train.py", *resumed).wait() == 0
    assert_same_result(out, whole)
    assert checkpoints(out) == checkpoints(whole)


def test_full_disk_leaves_the_last_checkpoint_whole(nano, photos, tmp_path):
    """A limit on the size of files that the optimizer's state alone exceeds, from the second step on."""
    out = tmp_path / "out"
    settings = partial(command_line, nano, photos, out, save_every=2)
    assert start(tmp_path / "log", "train.py", *settings(steps=2)).wait() == 0
    checkpoint = out / "checkpoints" / "step-000002"
    before, limit = files(checkpoint), (checkpoint / STATE).stat().st_size - 1
    full = start(tmp_path / "log", "train.py", *settings(steps=4), "--resume",
                 prepare=partial(limit_file_size, limit))
    assert full.wait() == 2 and "Traceback" not in full.stderr
    last = full.message.split("\n")[-1]
    assert last.startswith("train.py: ") and "step-000004" in last and "could not be written" in last
    assert files(checkpoint) == before and checkpoints(out) == ["step-000002"]
    assert start(tmp_path / "log", "train.py", *settings(steps=4), "--resume").wait() == 0
    assert checkpoints(out) == ["step-000002", "step-000004"] and steps_of(out) == [1, 2, 3, 4]


def test_full_disk_while_metrics_are_written(nano, photos, tmp_path, begun):
    """One line that names what is wrong, and what it promises is true. Of all files, the metrics are the longest."""
    out = copied(begun, tmp_path)
    first, last = metrics(out)
    lines = [json.dumps(first), json.dumps(last | {"note": 300_000 * "x"})]
    (out / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    limit = (out / "metrics.jsonl").stat().st_size + 10
    resumed = [*command_line(nano, photos, out, batch=2, steps=3), "--resume"]
    full = start(tmp_path / "log", "train.py", *resumed, prepare=partial(limit_file_size, limit))
    assert full.wait() == 1 and "Traceback" not in full.stderr
    message = full.message.split("\n")[-1]
    assert message.startswith("train.py: ") and "too large" in message and "--resume" in message
    assert start(tmp_path / "log", "train.py", *resumed).wait() == 0 and steps_of(out) == [1, 2, 3]


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does, but for `finally`."""


@pytest.mark.parametrize("owner, name", [(train, "save_checkpoint"), (Run, "drop_checkpoints")],
                         ids=["before", "after"])
def test_killed_around_a_checkpoint(teach, whole, tmp_path, monkeypatch, owner, name):
    """No step is missing in the metrics, none is there twice."""
    def killed(*arguments):
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killed)
        teach(out, save_every=2)
    teach(out, save_every=2, resume=True)
    assert_same_result(out, whole)


def test_nothing_is_half_deleted_under_its_name(teach, begun, tmp_path, monkeypatch):
    """Neither an old checkpoint nor the model that is written again."""
    def killed(path, *arguments, **options):
        next(Path(path).rglob("*.safetensors")).unlink()
        raise Killed

    out = copied(begun, tmp_path)
    for settings in ({"steps": 2}, {"steps": 4, "keep": 1}):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shutil, "rmtree", killed)
            teach(out, save_every=1, resume=True, **settings)
        assert_whole(out, files(begun / "model").keys())


def test_damaged_config_is_refused(begun, teach, tmp_path):
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    edit_json(out / "config.json", run=[])
    assert "no run in" in refused(teach, out, steps=4)


def test_folder_with_the_config_of_another_program_is_not_taken(teach, small_clip, tmp_path):
    out = shutil.copytree(small_clip, tmp_path / "clip")
    before = files(out)
    assert "is not empty, and no run of this program" in refusal(teach, out)
    assert files(out) == before

"""train.py in one process: its steps, what a run leaves behind, class images, configuration, and bad input."""

import copy
import json
import re
import shlex
import shutil
import sys
import types
from dataclasses import asdict, dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (ROOT, TEXT, UNET, VAE, Pair, difference, edit_json, edit_tensors, files, loss_on_fixed_noise,
                      metrics, names, prefixed, refusal)
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from processes import arguments, raise_out_of_memory, start
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tinydb
import tinydb.run
import train
from convert_weights import SD1
from tinydb.class_images import ClassImages
from tinydb.config import Recipe, ScheduleConfig
from tinydb.data import Examples, Latents, fit, open_picture, random_batch, read_pictures
from tinydb.diffusion import NoiseSchedule
from tinydb.layers import ResnetBlock2D
from tinydb.pipeline import LAST_SEED
from tinydb.pictures import grid, save_png
from tinydb.cli import Parser, choose_dtype
from tinydb.run import Run, memory_plan
from tinydb.scores import Scorer
from tinydb.vae import AutoencoderKL
from train import DreamBoothLoss, Settings

PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]
HELD = {"lr": 1e-20, "lr_text": 1e-20}  # learning rates that move nothing


def distance(tensors: list[Tensor], others: list[Tensor]) -> float:
    """How far two lists of tensors are apart, relative to the second."""
    ours, theirs = (torch.cat([tensor.flatten() for tensor in each]) for each in (tensors, others))
    return ((ours - theirs).norm() / theirs.norm()).item()


# ------------------------------------------------------------------------------------- the training step


def dreambooth_losses(unet: nn.Module, text_encoder: nn.Module, pair: Pair, batch: list[Examples],
                      prompts: list[list[str]]) -> list[Tensor]:
    """The loss of each set of pictures as diffusers' examples/dreambooth/train_dreambooth.py computes it, each picture
    under its prompt."""
    losses, scheduler = [], DDPMScheduler.from_config(pair.reference.scheduler.config)
    for of_set, examples in zip(prompts, batch):
        latents, noise, timesteps = examples.latents, examples.noise, examples.timesteps
        texts = [of_set[i] for i in examples.indices]
        ids = pair.reference.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy_latents, timesteps, text_encoder(ids)[0]).sample
        epsilon = scheduler.config.prediction_type == "epsilon"
        target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
        losses.append(F.mse_loss(prediction, target))
    return losses


def trainable_reference(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """diffusers' UNet and transformers' text encoder, to train."""
    networks = pair.reference.unet, pair.reference.text_encoder
    return tuple(copy.deepcopy(network).requires_grad_(True) for network in networks)


def by_our_names(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the two references under the names that they have in our model."""
    named = {f"unet.{name}": parameter for name, parameter in unet.named_parameters()}
    return named | {f"text_encoder.{prefixed(name)}": p for name, p in text_encoder.named_parameters()}


def of_each(prompts: list[str]) -> list[list[str]]:
    """The prompts of the pictures of `random_sets`, the same for all of a set."""
    return [[prompts[0]] * 3, [prompts[1]] * 4]


def random_sets(pair: Pair) -> list[Latents]:
    """Latents of three instance and four class images that never were."""
    generator = torch.Generator().manual_seed(0)
    return [Latents(torch.randn(count, pair.config.unet.in_channels, 8, 8, generator=generator),
                    torch.full((count, 1, 1, 1), 0.1)) for count in (3, 4)]


VARIED = [["a photo of ohwx dog", "a red ohwx dog", "ohwx"],
          ["a photo of a dog", "a photo of a dog", "a red dog", "a photo of ohwx dog"]]


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("prompts", [of_each(PROMPTS), VARIED], ids=["plain", "varied"])
def test_loss_and_gradients_are_those_of_diffusers(pairs, kind, prompts):
    """One kind of model predicts the noise, the other v; all pictures of a set have one prompt, or each its own."""
    pair = pairs(kind)
    batch = random_batch(random_sets(pair), [3, 2], 1000, seed=0, step=0)
    unet, text_encoder = trainable_reference(pair)
    expected = dreambooth_losses(unet, text_encoder, pair, batch, prompts)
    (expected[0] + 0.7 * expected[1]).backward()
    model = DreamBoothLoss(tinydb.load(pair.folder), prompts, freeze_text=False)
    losses = model(batch)
    (losses * torch.tensor([1, 0.7])).sum().backward()
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    reference = by_our_names(unet, text_encoder)
    ours = dict(model.named_parameters())
    assert distance([ours[name].grad for name in reference], [p.grad for p in reference.values()]) < 1e-5


def test_frozen_prior_holds_the_class_to_what_the_model_predicted(pairs):
    """By diffusers' UNet and text encoder as they were, under each class image's own prompt."""
    pair = pairs("sd2")
    batch, sd = random_batch(random_sets(pair), [3, 2], 1000, seed=0, step=0), tinydb.load(pair.folder)
    frozen = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder})
    model = DreamBoothLoss(sd, VARIED, freeze_text=False, frozen=copy.deepcopy(frozen))
    assert model(batch)[1] < 1e-10  # nothing is learnt yet
    with torch.no_grad():
        for parameter in [*sd.unet.parameters(), *sd.text_encoder.parameters()]:
            parameter.mul_(1.1)
    unet, text_encoder = trainable_reference(pair)
    noisy = sd.schedule.add_noise(batch[1].latents, batch[1].noise, batch[1].timesteps)
    ids = sd.tokenizer.encode([VARIED[1][i] for i in batch[1].indices])
    before = unet(noisy, batch[1].timesteps, text_encoder(ids)[0]).sample
    now = sd.unet(noisy, batch[1].timesteps, sd.text_encoder(ids))
    losses = model(batch)
    torch.testing.assert_close(losses[1], F.mse_loss(now, before), rtol=1e-4, atol=0)
    losses[1].backward()
    assert all(p.grad is None for p in model.frozen.parameters()) and sd.unet.conv_in.weight.grad.norm() > 0


@pytest.mark.parametrize("settings, prior_weight", [
    ({"batch": 4, "prior_weight": 1.7}, 1.7),
    ({"batch": 4, "prior_weight": 0.0, "lr_decay": 1.0}, 0),
    ({"batch": 2, "accumulate": 2, "recompute": True, "freeze_text": True, "lr": 1e-3}, 1),
], ids=["whole", "without-class-images", "in-parts"])
def test_two_steps_are_those_of_a_plain_loop(teach, pairs, photos, tmp_path, settings, prior_weight):
    """The whole way from the pictures to the weights, against diffusers' models and torch's AdamW."""
    out, pair = teach(tmp_path / "out", steps=2, save_every=2, **settings), pairs("nano")
    paths = [sorted(photos.glob("*.png")), sorted(out.glob("class_images/*/*.png"))]
    assert len(paths[0]) == 3 and len(paths[1]) == (5 if prior_weight else 0)
    sets = [Latents.of([fit(open_picture(path), 16) for path in each], pair.sd.vae, torch.device("cpu"))
            for each in paths if each]

    unet, text_encoder = trainable_reference(pair)
    groups = [{"params": list(unet.parameters()), "lr": 1e-3}, {"params": list(text_encoder.parameters()), "lr": 5e-4}]
    groups = groups[:1] if "freeze_text" in settings else groups
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    before = {name: p.detach().clone() for name, p in by_our_names(unet, text_encoder).items()}
    for step in range(2):
        batch = random_batch(sets, [4] * len(sets), 1000, 0, step)
        losses = dreambooth_losses(unet, text_encoder, pair, batch, [[PROMPTS[0]] * 3, [PROMPTS[1]] * 5])
        sum(weight * loss for weight, loss in zip([1, prior_weight], losses)).backward()
        norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        if "lr_decay" in settings:  # over all of the two steps
            for group, lr in zip(optimizer.param_groups, (1e-3, 5e-4)):
                group["lr"] = lr * (1 - step / 2)
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 1  # so that the clipping shows
        for name, loss in zip(["instance_loss", "prior_loss"], losses):
            assert metrics(out)[step][name] == pytest.approx(loss.item(), rel=1e-5)

    reference = by_our_names(unet, text_encoder)
    model = {f"{part}.{name}": tensor for part, file in (("unet", UNET), ("text_encoder", TEXT))
             for name, tensor in load_file(out / "model" / file).items()}
    assert distance([model[name] - before[name] for name in reference],
                    [p.detach() - before[name] for name, p in reference.items()]) < 5e-4
    trained = {name: p for name, p in reference.items() if p in optimizer.state}
    assert all(torch.equal(model[name], before[name]) for name in reference.keys() - trained.keys())
    for moment in ("exp_avg", "exp_avg_sq"):
        state = load_file(out / "checkpoints" / "step-000002" / f"state.{moment}.safetensors")
        ours = [state[f"{moment}.{name}"] for name in trained]
        assert distance(ours, [optimizer.state[p][moment] for p in trained.values()]) < 1e-5


def test_every_timestep_is_taken(pairs):
    batch = random_batch(random_sets(pairs("nano")), [100, 100], num_timesteps=10, seed=0, step=0)
    assert all(set(examples.timesteps.tolist()) == set(range(10)) for examples in batch)


def test_loss_is_computed_in_fp32(pairs):
    """Whatever the precision of the prediction: a loss in bf16 would have two or three digits."""
    pair, predictions = pairs("nano"), []
    model = DreamBoothLoss(tinydb.load(pair.folder), of_each(PROMPTS), freeze_text=False)
    model.unet.register_forward_hook(lambda unet, inputs, output: predictions.append(output))
    batch = random_batch(random_sets(pair), [2, 2], 1000, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    [prediction] = predictions
    assert prediction.dtype == torch.bfloat16 and losses.dtype == torch.float32
    error = prediction.double() - torch.cat([examples.noise for examples in batch]).double()
    expected = error.square().unflatten(0, (2, 2)).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


def test_recompute_runs_each_block_once_more_and_changes_nothing(teach, pairs, tmp_path, monkeypatch):
    calls, forward = [], ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *x: calls.append(self.training) or forward(self, *x))
    settings = {"steps": 1, "save_every": 0, "prior_weight": 0.0}
    plain, plain_calls = teach(tmp_path / "plain", **settings), len(calls)
    recomputed = teach(tmp_path / "recomputed", recompute=True, **settings)
    blocks = sum(isinstance(module, ResnetBlock2D) for module in pairs("nano").sd.unet.modules())
    assert len(calls) - 2 * plain_calls == blocks
    assert files(recomputed / "model") == files(plain / "model")


@pytest.mark.parametrize("given, lr, lr_text", [
    ({}, 2e-6, 1e-6), ({"lr": 4e-6}, 4e-6, 2e-6), ({"lr_text": 3e-6}, 2e-6, 3e-6),
    ({"freeze_text": True}, 5e-6, None), ({"freeze_text": True, "lr": 4e-6, "lr_text": 1e-6}, 4e-6, None),
    ({"lora": 8}, 4e-4, 3e-4), ({"lora": 8, "freeze_text": True}, 4e-4, None), ({"lora": 8, "lr": 8e-4}, 8e-4, 6e-4),
], ids=str)
def test_learning_rates_come_from_the_recipe(given, lr, lr_text):
    """The text encoder's follows --lr unless it is given; a frozen one has none. Low-rank updates have their own."""
    recipe = Recipe(lr=2e-6, lr_text=1e-6, lr_lora=4e-4, lr_lora_text=3e-4)
    settings = Settings(images="rex", class_noun="dog", **given).resolve(recipe)
    assert (settings.lr, settings.lr_text) == (pytest.approx(lr), pytest.approx(lr_text))


@pytest.mark.parametrize("decay, shares", [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 0.5]), (1.0, [1, 0.75, 0.5, 0.25])])
@pytest.mark.parametrize("lora", [0, 2])
def test_rates_are_constant_and_then_fall_to_0(teach, tmp_path, decay, shares, lora):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    teach(tmp_path / "out", steps=4, save_every=0, prior_weight=0.0, lr_decay=decay, lora=lora, lr=1e-3, lr_text=5e-4)
    hook.remove()
    assert rates == [pytest.approx([1e-3 * share, 5e-4 * share]) for share in shares]


@pytest.mark.parametrize("given, expected", [
    ({}, [6, 6]), ({"frozen_prior": True}, [6, 2]), ({"frozen_prior": True, "batch": 4}, [4, 2]),
    ({"prior_weight": 0.0, "frozen_prior": True}, [6])], ids=str)
def test_a_frozen_prior_takes_a_third_as_many_class_images(given, expected):
    assert Settings(**{"batch": 6, **given}).examples_per_set == expected


def test_the_vae_computes_in_fp32_whatever_the_precision(teach, tmp_path, monkeypatch):
    dtypes = {}
    for name in ("encode", "decode"):
        def watched(self, x, name=name, original=getattr(AutoencoderKL, name)):
            result = original(self, x)
            dtypes.setdefault(name, set()).add((result[0] if name == "encode" else result).dtype)
            return result

        monkeypatch.setattr(AutoencoderKL, name, watched)
    teach(tmp_path / "out", precision="bf16", steps=1, sample_every=1, save_every=0)
    assert dtypes == {"encode": {torch.float32}, "decode": {torch.float32}}


# ---------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def taught(tmp_path_factory, nano, photos) -> Path:
    """The OUT of one ordinary run with previews, to look at."""
    out = tmp_path_factory.mktemp("taught") / "out"
    done = start(out.parent / "log", "train.py", *arguments(
        images=photos, class_noun="dog", weights=nano, out=out, device="cpu", steps=5, batch=3, save_every=2,
        sample_every=2))
    assert done.wait() == 0, done.stderr
    return out


def test_what_a_run_writes(taught, nano):
    assert names(taught) == [".lock", "checkpoints", "class_images", "config.json", "inputs.png", "metrics.jsonl",
                             "model", "report.html", "samples"]
    assert names(taught / "checkpoints") == ["step-000004", "step-000005"]
    assert names(taught / "samples") == ["step-000002.png", "step-000004.png"]
    assert {path.suffix for path in taught.rglob("*.*") if path.is_file() and path.suffix} == {
        ".png", ".json", ".jsonl", ".html", ".txt", ".safetensors"}  # no pickles


def test_same_seed_gives_identical_bytes_wherever(teach, tmp_path):
    """No time and no path gets into the files."""
    first, second, other = [teach(tmp_path / name / "out", seed=seed, steps=2)
                            for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for folder in ("model", "checkpoints", "class_images"):
        assert files(first / folder) == files(second / folder)
    assert files(first / "model")[UNET] != files(other / "model")[UNET]


def test_model_opens_in_diffusers_and_draws_the_same_picture(taught):
    pipeline = StableDiffusionPipeline.from_pretrained(taught / "model")
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"guidance_scale": 3.0, "latents": latents}
    expected = pipeline("a photo of ohwx dog", num_inference_steps=5, **settings).images
    images = tinydb.load(taught / "model").generate("a photo of [V] dog", steps=5, **settings)
    assert difference(images, expected) <= 2


def test_checkpoint_is_a_model_folder(taught):
    """To sample from as it is: the last one holds what the result holds."""
    model, checkpoint = files(taught / "model"), files(taught / "checkpoints" / "step-000005")
    assert {name: checkpoint.get(name) for name in model} == model
    assert checkpoint.keys() - model.keys() == {
        "state.json", "state.exp_avg.safetensors", "state.exp_avg_sq.safetensors", "state.step.safetensors"}
    assert tinydb.load(taught / "checkpoints" / "step-000004").info.step == 4


def test_nothing_that_is_done_to_the_result_reaches_another_model(taught, nano):
    """Each folder has files of its own: somebody may copy another VAE over one of them, in place."""
    folders = [nano, taught / "model", *sorted((taught / "checkpoints").iterdir())]
    for file in (TEXT, UNET, VAE):
        assert len({(folder / file).stat().st_ino for folder in folders}) == len(folders)


def test_inputs_show_what_the_model_sees(taught, photos):
    images = [fit(open_picture(path), 16) for path in sorted(photos.glob("*.png"))]
    shown = Image.open(taught / "inputs.png")
    assert difference([shown], [grid(images, 3, [PROMPTS[0]] * 3)]) == 0
    assert shown.text["parameters"].splitlines() == [f"{i}.png: {PROMPTS[0]}" for i in range(3)]


@pytest.mark.parametrize("count", [41, 700])
def test_inputs_of_many_pictures_stay_small(tmp_path, count):
    pictures = {f"{i}.png": Image.new("RGB", (128, 128), "red") for i in range(count)}
    Run(tmp_path).save_inputs(pictures, [f"a photo of {name}" for name in pictures])
    shown = Image.open(tmp_path / "inputs.png")
    assert shown.width == 5 * 128 and 8 * 128 <= shown.height < 8 * 160
    assert len(shown.text["parameters"].splitlines()) == 40


def test_config_tells_everything_that_ran(taught, photos, nano):
    config = config_of(taught)
    assert config.pop("run").keys() == {"world_size", "device", "precision", "pictures", "model"}
    settings = asdict(Settings(
        images=str(photos), class_noun="dog", weights=str(nano), out=str(taught), steps=5, batch=3, lr=1e-3,
        lr_text=5e-4, lr_decay=0.0, frozen_prior=False, lora_conv=False, class_images=5, save_every=2, sample_every=2,
        device="cpu"))
    assert config.items() <= settings.items() and settings.keys() - config.keys() == {"resume", "config"}


def test_metrics_hold_every_step(taught):
    assert [line["step"] for line in metrics(taught)] == [1, 2, 3, 4, 5]
    assert all(line["instance_loss"] > 0 and line["prior_loss"] > 0 for line in metrics(taught))


def test_model_notes_what_it_was_taught_and_the_run_ends_with_a_command(teach, nano, tmp_path, capsys):
    """Which survives the shell."""
    out = teach(tmp_path / "my dog", identifier="zwx", class_noun="red cat", steps=1)
    info = tinydb.load(out / "model").info
    assert (info.identifier, info.class_noun, info.step) == ("zwx", "red cat", 1)
    assert info.recipe == tinydb.load(nano).info.recipe
    [line] = [line for line in capsys.readouterr().out.splitlines() if "sample.py" in line]
    assert shlex.split(line) == ["python", "sample.py", "[V] red cat on the moon", "--weights", str(out)]


def test_base_of_a_model_that_was_taught_is_the_first_one(teach, nano, tmp_path):
    """A name by which the CLIP in the box is found, and whose licence the result stays under."""
    base = {"name": "a base", "license": "MIT"}
    weights = Path(shutil.copytree(nano, tmp_path / "weights"))
    edit_json(weights / "tinydb.json", base=base)
    out = teach(tmp_path / "out", weights=str(weights), steps=1, prior_weight=0.0)
    assert tinydb.load(out / "model").info.base == base


def test_out_is_named_after_the_pictures(one_thread, nano, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(photos, tmp_path / "rex"))
    train.main(Settings(images=".", class_noun="dog", weights=str(nano), steps=1, save_every=0, device="cpu"))
    assert (tmp_path / "rex" / "runs" / "rex" / "model").is_dir()


def test_checkpoints_are_scored(teach, small_clip, tmp_path):
    """By the likeness of their pictures to the subject's, and by the prompt without the identifier; at step 0 too."""
    out = teach(tmp_path / "out", steps=4, save_every=2, clip=str(small_clip), **HELD)
    assert [line["step"] for line in metrics(out) if "likeness" in line] == [2, 4]
    state = json.loads((out / "checkpoints" / "step-000004" / "state.json").read_text())
    assert list(state["scores"]) == ["0", "2", "4"]
    assert state["scores"]["2"] == {name: metrics(out)[1][name] for name in ("likeness", "prompt")}
    sheets = [(out / "samples" / f"step-{step:06d}.png").read_bytes() for step in (0, 2, 4)]
    assert sheets[0] == sheets[1] == sheets[2]  # from the same noise, with weights that did not move
    assert state["scores"]["0"] == state["scores"]["2"]

    clip, prompts = tinydb.load_clip(small_clip), Image.open(out / "samples" / "step-000002.png").info["parameters"]
    text = clip.text([prompt.replace("[V] ", "") for prompt in prompts.split(" | ")[:-1]])
    pictures, _ = read_pictures(Path(config_of(out)["images"]), 16)
    sd = tinydb.load(out / "model")
    images = clip.images(sd.generate(prompts.split(" | "), steps=1, sampler="dpm")[:-1])
    assert state["scores"]["2"] == {
        "likeness": pytest.approx((images[:-2] @ clip.images(list(pictures.values())).T).mean().item(), abs=1e-5),
        "prompt": pytest.approx((images * text).sum(1).mean().item(), abs=1e-5)}
    features = clip.images(list(pictures.values()))
    worst = Scorer(clip, list(pictures.values()), "dog").own_fit
    assert worst == pytest.approx((features @ text.T).mean().item(), abs=1e-6)


def scored(monkeypatch, scores: list[tuple[float, float]]) -> None:
    """Let CLIP say this of the pictures of step 0, and of each checkpoint in turn; photographs fit the prompts by
    0.1."""
    coming = iter(scores)

    def note(self: Scorer, scores: dict, step: int, images: list) -> dict:
        scores[str(step)] = dict(zip(("likeness", "prompt"), next(coming)))
        return scores[str(step)]

    monkeypatch.setattr(Scorer, "note", note)
    monkeypatch.setattr(Scorer, "own_fit", property(lambda _: 0.1, lambda *_: None), raising=False)


@pytest.mark.parametrize("scores, keep, kept, said", [
    ([(0.3, 0.2), (0.4, 0.2), (0.79, 0.19), (0.8, 0.12)], 1, [2, 3], "step 2 is the best"),
    ([(0.3, 0.2), (0.8, 0.3), (0.8, 0.3), (0.8, 0.2)], 1, [2, 3], "step 2 is the best"),  # the last of equals, so far
    ([(0.3, 0.2), (0.4, 0.2), (0.7, 0.19), (0.8, 0.19)], 2, [2, 3], "no earlier checkpoint is better"),
    ([(0.3, 0.2), (0.8, 0.2), (0.8, 0.196), (0.8, 0.192), (0.8, 0.188)], 1, [2, 4], "step 2 is the best"),  # not 3: 8 %
], ids=["in-the-middle", "the-last-of-equals", "the-last", "slowly-down"])
def test_best_step_is_kept_and_named(teach, small_clip, tmp_path, monkeypatch, capsys, scores, keep, kept, said):
    scored(monkeypatch, scores)
    out = teach(tmp_path / "out", steps=len(scores) - 1, save_every=1, keep=keep, clip=str(small_clip))
    assert names(out / "checkpoints") == [f"step-00000{step}" for step in kept]
    printed = capsys.readouterr().out
    assert said in printed
    assert (str(out / "checkpoints" / f"step-00000{kept[0]}") in printed) == (keep == 1)


@pytest.mark.parametrize("scores, best", [
    ([(0.3, 0.2), (0.79, 0.2), (0.8, 0.18)], 1),  # nearly as much alike, and fits the prompts better
    ([(0.3, 0.2), (0.78, 0.2), (0.8, 0.18)], 2),  # hardly better than the last
    ([(0.3, 0.3), (0.7, 0.2), (0.8, 0.17)], 2),  # less alike, which counts more
    ([(0.3, 0.3), (0.7, 0.2), (0.8, 0.1)], 1),  # no better fit than that of the photographs themselves
    ([(0.3, 0.3), (0.1, 0.2), (0.2, 0.2)], 2),  # all of them less alike than before training
    ([(0.3, 0.3), (0.75, 0.2), (0.8, 0.158)], 2), ([(0.3, 0.3), (0.75, 0.2), (0.8, 0.153)], 1),  # by the fifth power
])
def test_best_step_weighs_both_scores(teach, small_clip, tmp_path, monkeypatch, capsys, scores, best):
    scored(monkeypatch, scores)
    teach(tmp_path / "out", steps=2, save_every=1, keep=2, clip=str(small_clip))
    out = capsys.readouterr().out
    assert (f"step {best} is the best" if best < 2 else "no earlier checkpoint is better") in out


def test_previews_between_checkpoints_recommend_nothing(teach, small_clip, tmp_path, monkeypatch, capsys):
    """They are scored, but cannot be had, and the bar is that of the checkpoints."""
    scored(monkeypatch, [(0.3, 0.3), (0.8, 0.2), (0.8, 0.19), (0.8, 0.3), (0.8, 0.188)])
    out = teach(tmp_path / "out", steps=4, save_every=2, sample_every=1, clip=str(small_clip))
    assert "no earlier checkpoint is better" in capsys.readouterr().out
    assert len([line for line in metrics(out) if "likeness" in line]) == 4


def test_last_step_without_a_checkpoint_is_not_compared(teach, small_clip, tmp_path, monkeypatch, capsys):
    scored(monkeypatch, [(0.3, 0.2), (0.4, 0.2), (0.5, 0.2), (0.8, 0.2)])
    out = teach(tmp_path / "out", steps=2, save_every=1, clip=str(small_clip))
    capsys.readouterr()
    teach(out, steps=3, save_every=0, clip=str(small_clip), resume=True)
    assert "By CLIP" not in capsys.readouterr().out


def test_clip_of_no_numbers_is_refused_before_the_work(teach, small_clip, tmp_path):
    clip = shutil.copytree(small_clip, tmp_path / "clip")
    edit_tensors(clip / "model.safetensors", lambda tensors: {
        **tensors, "visual_projection.weight": tensors["visual_projection.weight"] * float("nan")})
    assert "--clip: its weights hold NaN" in refusal(teach, tmp_path / "out", clip=str(clip))


def test_without_a_clip_nothing_is_scored_or_recommended(teach, tmp_path, capsys):
    out = teach(tmp_path / "out", save_every=1)
    printed = capsys.readouterr()
    assert printed.err.count("checkpoints are not scored, and none is recommended") == 1
    assert "CLIP" not in printed.out and not (out / "samples").exists()


def test_a_folder_that_is_no_clip_is_refused_before_the_work(teach, nano, tmp_path):
    assert "not a folder; expected a CLIP" in refusal(teach, tmp_path / "out", clip=str(tmp_path / "none"))
    assert "config.json: no such file" in refusal(teach, tmp_path / "out", clip=str(nano))
    assert not (tmp_path / "out" / "class_images").exists()


def test_save_every_0_writes_the_result_alone(teach, tmp_path):
    out = teach(tmp_path / "out", steps=1, save_every=0)
    assert (out / "model").is_dir() and not (out / "checkpoints").exists()


def test_class_images_from_the_last_seed_on(teach, tmp_path):
    """It goes on from 0."""
    assert (teach(tmp_path / "out", seed=LAST_SEED, steps=1, class_images=9) / "model").is_dir()


def test_previews_have_the_same_noise_and_change_nothing(teach, tmp_path):
    """The moments in the checkpoint tell of every gradient, even where no weight moves."""
    plain, watched = [teach(tmp_path / f"every{n}", steps=2, save_every=2, sample_every=n, **HELD) for n in (0, 1)]
    assert files(plain / "checkpoints") == files(watched / "checkpoints")
    first, second = [(watched / "samples" / f"step-00000{i}.png").read_bytes() for i in (1, 2)]
    assert first == second


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left")], ids=str)
def test_preview_that_fails_does_not_end_the_run(teach, tmp_path, monkeypatch, capsys, error):
    def save(image: Image.Image, path: Path, parameters: str) -> None:
        if path.parent.name == "samples":
            raise error
        save_png(image, path, parameters)

    monkeypatch.setattr(tinydb.run, "save_png", save)
    assert (teach(tmp_path / "out", steps=2, sample_every=1) / "model").is_dir()
    printed = capsys.readouterr().err
    assert "no preview" in printed and error.args[-1] in printed


def test_loss_falls_in_fp32_and_in_bf16(teach, tmp_path):
    """By different paths; the weights are fp32 in both."""
    losses = {}
    for precision in ("fp32", "bf16"):
        out = teach(tmp_path / precision, precision=precision, steps=20, save_every=10)
        checkpoints = sorted((out / "checkpoints").iterdir())
        losses[precision] = [loss_on_fixed_noise(tinydb.load(path), out) for path in checkpoints]
        assert losses[precision][1] < 0.9 * losses[precision][0]
        assert {tensor.dtype for tensor in load_file(out / "model" / UNET).values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["bf16"] != losses["fp32"]


def test_offloaded_weights_are_the_same_weights(teach, tmp_path):
    """In fp32 bit for bit. In bf16 what computes is a copy of them, as autocast makes one in each step."""
    plain, offloaded = [teach(tmp_path / f"{name}", offload=name == "offloaded", steps=3) for name in (
        "plain", "offloaded")]
    assert files(plain / "model") == files(offloaded / "model")
    autocast, low = [teach(tmp_path / f"low-{offload}", offload=offload, precision="bf16", steps=50, save_every=0)
                     for offload in (False, True)]
    losses = [[line["instance_loss"] + line["prior_loss"] for line in metrics(out)] for out in (autocast, low)]
    assert losses[0] == pytest.approx(losses[1], rel=0.005) and losses[0] != losses[1]
    assert {tensor.dtype for tensor in load_file(low / "model" / UNET).values()} == {torch.float32}


@pytest.fixture
def overflow(monkeypatch):
    """overflow(n, ...): in these steps, counted from 1, a gradient overflows fp16."""
    def arrange(*steps: int) -> None:
        calls, original = [], torch.amp.GradScaler.unscale_

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append(optimizer)
            if len(calls) in steps:
                optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
            original(self, optimizer)

        monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_)
    return arrange


def test_fp16_scales_its_gradients_and_skips_what_overflows(teach, overflow, nano, tmp_path):
    """Also on a CPU. One step overflows: the scale is halved, and that step is not counted in the moments."""
    overflow(3)
    out = teach(tmp_path / "out", precision="fp16", steps=5, save_every=5)
    scale = json.loads((out / "checkpoints" / "step-000005" / "state.json").read_text())["scaler"]["scale"]
    steps = load_file(out / "checkpoints" / "step-000005" / "state.step.safetensors")
    assert scale == 65536 / 2 and {tensor.item() for tensor in steps.values()} == {4}
    weights = load_file(out / "model" / UNET)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not any(torch.equal(weights[name], tensor) for name, tensor in load_file(nano / UNET).items())


def test_fp16_whose_first_step_overflows_can_be_stopped_and_resumed(teach, overflow, tmp_path):
    """There are no moments yet in the checkpoint."""
    overflow(1, 3)  # the first step of both runs
    whole = teach(tmp_path / "whole", precision="fp16", steps=2)
    out = teach(tmp_path / "out", precision="fp16", steps=1)
    teach(out, precision="fp16", steps=2, resume=True)
    assert files(out / "checkpoints" / "step-000002") == files(whole / "checkpoints" / "step-000002")


def test_fp16_that_never_takes_a_step_ends_the_run(teach, overflow, tmp_path):
    """Every gradient overflows, so the scale falls and falls."""
    overflow(*range(1, 51))
    assert "fp16" in refusal(teach, tmp_path / "out", precision="fp16", steps=50, save_every=50)
    assert not (tmp_path / "out" / "checkpoints").exists() and len(metrics(tmp_path / "out")) < 30


@pytest.mark.parametrize("capability, expected", [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_precision_goes_by_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == expected
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_vae_of_the_result_is_the_bases_weights_and_nothing_else(teach, nano, tmp_path):
    """A folder from the hub may hold other files, pickles among them, and may be read-only."""
    base = Path(shutil.copytree(nano, tmp_path / "base"))
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "vae").chmod(0o555)
    out = teach(tmp_path / "out", weights=str(base), steps=1)
    (base / "vae").chmod(0o755)
    shutil.rmtree(base)  # the result does not need it
    for folder in (out / "model", out / "checkpoints" / "step-000001"):
        assert (folder / "vae").stat().st_mode & 0o200
        assert sorted(files(folder / "vae")) == ["config.json", Path(VAE).name]
        assert (folder / VAE).read_bytes() == (nano / VAE).read_bytes()


@pytest.mark.parametrize("steps, save_every, when", [(5, 5, "step 2: the loss is [nan"),
                                                     (5, 1, "step 1: the loss is [nan"),
                                                     (1, 0, "step 1: the loss is [nan")])
def test_weights_that_are_not_finite_are_not_saved(teach, tmp_path, steps, save_every, when):
    """The loss of the first step is finite still."""
    out = tmp_path / "out"
    text = refusal(teach, out, lr=1e12, steps=steps, save_every=save_every)
    assert when in text and "--lr" in text and "--precision fp32" in text
    assert not (out / "model").exists() and not (out / "checkpoints").exists()


def test_out_of_memory_is_answered_with_what_to_try(nano, photos, tmp_path):
    settings = {"images": photos, "class_noun": "dog", "weights": nano, "out": tmp_path / "out", "device": "cpu"}
    run = start(tmp_path, "train.py", *arguments(**settings), prepare=raise_out_of_memory)
    assert run.wait() == 1
    last = run.message.split("\n")[-1]
    assert last.startswith("train.py: CUDA out of memory. Tried to allocate 2 GiB")
    assert "Traceback" not in run.stderr
    assert all(flag in last for flag in ("--recompute", "--batch 1", "--freeze-text"))


def free_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))


def test_too_little_disk_is_noticed_before_the_work(teach, tmp_path, monkeypatch):
    """And the run may begin when there is room."""
    with monkeypatch.context() as patch:
        free_disk(patch, 10_000)
        assert "free" in refusal(teach, tmp_path / "out")
    assert not files(tmp_path / "out").keys() & {"inputs.png", "metrics.jsonl"}
    assert (teach(tmp_path / "out", steps=1) / "model").is_dir()


def test_disk_that_was_enough_to_start_is_enough_to_resume(teach, nano, tmp_path, monkeypatch):
    """What the checkpoints have taken of it is not asked for again."""
    def suffices(free: int) -> bool:
        free_disk(monkeypatch, free)
        try:
            Run(out).check_disk(sd, Settings(steps=2, save_every=1))
        except tinydb.InputError:
            return False
        return True

    sd, out = tinydb.load(nano), tmp_path / "out"
    free = next(free for free in range(0, 2**30, 10_000) if suffices(free))
    teach(out, steps=2, save_every=1)
    taken = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*.safetensors"))
    assert taken > 100_000 and suffices(free - taken) and not suffices(free - taken - 20_000)


def test_memory_plan_of_stable_diffusion():
    """What is said at the start is what the README's table says, within 10 %."""
    with torch.device("meta"):
        sd = types.SimpleNamespace(unet=tinydb.pipeline.UNet2DConditionModel(SD1.unet),
                                   text_encoder=tinydb.pipeline.CLIPTextModel(SD1.text_encoder))
    rows = re.findall(r"(?<=\| )\d+ GB \| (.+?) \| ([\d.]+) \|", (ROOT / "README.md").read_text())
    assert len(rows) >= 6
    for flags, gigabytes in rows:
        settings = Parser(Settings, None).parse(" ".join(re.findall("`(.+?)`", flags)).split())
        plan = memory_plan(sd, replace(settings, batch=settings.batch or 1), torch.bfloat16, 1)
        planned = float(re.search(r"at once ([\d.]+)", plan)[1]) + 0.7
        assert planned == pytest.approx(float(gigabytes), rel=0.1), (flags, plan)
    one, two = (memory_plan(sd, Settings(batch=1), torch.float32, processes) for processes in (1, 2))
    assert "weights 3.93, gradients 3.93, optimizer 7.86, activations 5.00; at once 16.79" in one
    assert "at once 20.72" in two
    without_prior = Settings(batch=1, frozen_prior=True, prior_weight=0.0)
    assert "before training" not in memory_plan(sd, without_prior, torch.float32, 1)


def test_says_what_it_skips_enlarges_and_cuts_off(teach, photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "notes.txt").write_text("not a picture")
    Image.open(folder / "0.png").resize((8, 6)).save(folder / "thumbnail.png")
    teach(tmp_path / "out", images=str(folder), class_noun="dog " * 80 + "whale", steps=1)
    error = capsys.readouterr().err
    assert "notes.txt is skipped: not a picture" in error
    assert "thumbnail.png is only 8x6" in error and "0.png is only" not in error
    too_long = [line for line in error.splitlines() if "will not see" in line]  # each prompt once
    assert len(too_long) == 2 and "ohwx" in too_long[0] and all(line.endswith("whale'") for line in too_long)


# ---------------------------------------------------------------------------------------- watching it


def module(name: str, **content: object) -> types.ModuleType:
    """A module as if it were installed."""
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    return made


def stub_tensorboard(calls: list) -> dict[str, types.ModuleType]:
    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int):
            calls.append(("start", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int):
            calls.append((name, value, step))

        def flush(self):
            pass

    return {"tensorboard": module("tensorboard"),
            "torch.utils.tensorboard": module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)}


def stub_wandb(calls: list) -> dict[str, types.ModuleType]:
    def init(**settings):
        calls.append(("start", settings["dir"], settings["id"]))
        return types.SimpleNamespace(id=settings["id"] or f"run-{len(calls)}", log=lambda values, step: calls.extend(
            (name, value, step) for name, value in values.items()))

    return {"wandb": module("wandb", init=init)}


@pytest.mark.parametrize("name, stub, starts", [
    ("tensorboard", stub_tensorboard, [1, 2]),  # it hides what was logged at `purge_step` and after
    ("wandb", stub_wandb, [None, "run-1"]),
])
def test_tracker_gets_what_metrics_hold_and_goes_on_with_a_resumed_run(teach, tmp_path, monkeypatch, name, stub,
                                                                      starts):
    calls = []
    for module_name, stubbed in stub(calls).items():
        monkeypatch.setitem(sys.modules, module_name, stubbed)
    for settings in ({"steps": 1}, {"steps": 2, "resume": True}):
        out = teach(tmp_path / "out", log=name, save_every=1, **settings)
    assert out in (calls[0][1], calls[0][1].parent)
    assert [call[2] for call in calls if call[0] == "start"] == starts
    assert [call for call in calls if call[0] != "start"] == [
        (key, value, line["step"]) for line in metrics(out) for key, value in line.items() if key != "step"]


@pytest.mark.parametrize("fails_at", ["start", "step"])
def test_tracker_that_fails_does_not_end_the_run(teach, tmp_path, monkeypatch, capsys, fails_at):
    def fail(*values: object, **settings: object):
        raise RuntimeError("no network")

    log = types.SimpleNamespace(id="a run", log=fail)
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fail if fails_at == "start" else lambda **_: log))
    out = teach(tmp_path / "out", log="wandb", steps=2)
    assert len(metrics(out)) == 2 and (out / "model").exists()
    assert "tracker this time: no network" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_tracker_that_is_not_installed(teach, tmp_path, monkeypatch, name):
    """It is noticed before anything is written."""
    monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {name}" in refusal(teach, tmp_path / "out", log=name)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- class images


def class_images(parent: Path) -> dict[str, bytes]:
    """The files below the one folder <key>/ in `parent`."""
    [folder] = [path for path in parent.iterdir() if path.is_dir()]
    return {name: content for name, content in files(folder).items() if name.endswith(".png")}


def drawings(monkeypatch) -> list[list[str]]:
    """The prompts of every call of `generate` from now on."""
    calls, original = [], tinydb.StableDiffusion.generate
    monkeypatch.setattr(tinydb.StableDiffusion, "generate", lambda self, prompts, **options: (
        calls.append(prompts) or original(self, prompts, **options)))
    return calls


@pytest.mark.parametrize("sampler, name", [("ddim", "DDIM"), ("dpm", "DPM++ 2M")])
def test_class_images_are_what_the_model_draws_of_the_class(teach, nano, tmp_path, sampler, name):
    """Picture i from seed + i, by the recipe's sampler, with guidance in all steps."""
    sd = tinydb.load(nano)
    sd.info = replace(sd.info, recipe=replace(sd.info.recipe, class_sampler=sampler, class_guidance=9.0,
                                                guidance_stop=0.5))
    sd.save(tmp_path / "model")
    out = teach(tmp_path / "out", weights=str(tmp_path / "model"), class_images=10, seed=7, steps=1)
    [folder] = (out / "class_images").iterdir()
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    assert len(images) == 10
    expected = tinydb.load(nano).generate(["a photo of a dog"] * 10, steps=2, sampler=sampler, guidance_scale=9.0,
                                          seed=7)
    assert difference(images, expected) <= 1
    assert images[9].text["parameters"] == (
        f"a photo of a dog\nNegative prompt: \nSteps: 2, Sampler: {name}, Seed: 16, CFG scale: 9.0")


def test_class_images_of_an_earlier_run_are_used_as_they_are(teach, tmp_path, monkeypatch):
    """Unless they are of another class or from another seed: then new ones are drawn beside them."""
    first = teach(tmp_path / "first", steps=2)
    calls, before = drawings(monkeypatch), files(first)
    settings = {"class_dir": str(first / "class_images"), "steps": 2}
    second = teach(tmp_path / "second", **settings)
    assert calls == [] and files(first) == before and not (second / "class_images").exists()
    assert files(second / "model") == files(first / "model")
    teach(tmp_path / "third", class_noun="cat", **settings)
    teach(tmp_path / "fourth", seed=3, **settings)
    assert len(calls) == 2 and len(names(first / "class_images")) == 3
    assert {name: content for name, content in files(first).items() if name in before} == before


def test_key_of_class_images(nano, tmp_path):
    """It tells model, prompt, size, steps, sampler, guidance and seed, and nothing else."""
    def key(folder: Path, noun: str = "dog", seed: int = 0, **recipe: float) -> str:
        sd = tinydb.load(folder)
        sd.info = replace(sd.info, recipe=replace(sd.info.recipe, **recipe))
        return ClassImages(sd, folder, noun, seed).key

    copied, larger = [Path(shutil.copytree(nano, tmp_path / name)) for name in ("copy", "larger")]
    sd, other = tinydb.load(nano), tmp_path / "other"
    sd.unet.conv_in.weight.data += 1e-3
    sd.save(other)
    config = json.loads((larger / "unet" / "config.json").read_text())
    (larger / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    assert key(copied) == key(nano) == key(nano, lr=1.0, class_images=9, guidance_stop=0.5)
    keys = [key(nano), key(other), key(larger), key(nano, "cat"), key(nano, seed=1),
            key(nano, class_steps=3), key(nano, class_guidance=1.0), key(nano, class_sampler="dpm")]
    assert len(set(keys)) == len(keys)


def test_key_of_class_images_tells_the_schedule_and_the_share(nano):
    sd = tinydb.load(nano)

    def key(prediction: str = "epsilon", share: float = 0.5) -> str:
        sd.schedule = NoiseSchedule(replace(sd.schedule.config, prediction_type=prediction))
        sd.info = replace(sd.info, recipe=replace(sd.info.recipe, class_prompts=("a red {noun}",), plain_share=share))
        return ClassImages(sd, nano, "dog", 0).key

    assert len({key(), key("v_prediction"), key(share=0.25)}) == 3


@dataclass(frozen=True)
class LaterSchedule(ScheduleConfig):
    """The schedule's settings of a later version."""

    shift: float = 1.0


def test_key_of_class_images_stays_when_the_schedule_gets_a_setting(nano):
    """With its default: an update must not draw all class images anew, nor end a run that is to be resumed."""
    sd = tinydb.load(nano)
    before = ClassImages(sd, nano, "dog", 0).key
    sd.schedule = NoiseSchedule(LaterSchedule(**asdict(sd.schedule.config)))
    assert ClassImages(sd, nano, "dog", 0).key == before


def test_class_images_are_topped_up(teach, tmp_path, monkeypatch):
    """Only what is missing is made, and it is what a run that makes all of them makes; what is there stays, also in a
    group that was not full."""
    parent = teach(tmp_path / "few", class_images=10, steps=1) / "class_images"
    before = class_images(parent)
    calls = drawings(monkeypatch)
    times = {path: path.stat().st_mtime_ns for path in parent.rglob("*.png")}
    teach(tmp_path / "more", class_images=16, class_dir=str(parent), steps=1)
    assert [len(prompts) for prompts in calls] == [8]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert {name: class_images(parent)[name] for name in before} == before
    everything = teach(tmp_path / "all", class_images=16, steps=1)
    assert class_images(parent) == class_images(everything / "class_images")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n"], ids=["empty", "damaged"])
def test_class_image_that_is_no_picture_is_made_again(teach, tmp_path, content):
    first = teach(tmp_path / "first", steps=1)
    [folder] = (first / "class_images").iterdir()
    before = files(folder)
    (folder / "00001.png").write_bytes(content)
    teach(tmp_path / "second", class_dir=str(first / "class_images"), steps=1)
    assert files(folder) == before


def own_pictures(folder: Path, count: int) -> Path:
    """A folder of class images that somebody took, and junk."""
    folder.mkdir()
    for i in range(count):
        Image.radial_gradient("L").rotate(40 * i).convert("RGB").save(folder / f"mine{i}.jpg")
    (folder / ".DS_Store").touch()
    (folder / "Thumbs.db").touch()
    (folder / "notes.txt").write_text("dogs of friends")
    return folder


def test_own_class_pictures_come_first_and_missing_ones_are_added(teach, tmp_path):
    folder = own_pictures(tmp_path / "dogs", 2)
    before = files(folder)
    out = teach(tmp_path / "out", class_dir=str(folder), steps=1)
    assert len(class_images(folder)) == 3  # of the recipe's 5; junk is not counted
    assert {name: files(folder)[name] for name in before} == before
    assert not (out / "class_images").exists()


def test_enough_own_class_pictures_need_no_model(teach, tmp_path, monkeypatch):
    """And only as many as asked for are used."""
    folder, calls = own_pictures(tmp_path / "dogs", 4), drawings(monkeypatch)
    settings = {"class_dir": str(folder), "class_images": 3, "steps": 1, "save_every": 0}
    first = teach(tmp_path / "first", **settings)
    (folder / "mine3.jpg").unlink()
    second = teach(tmp_path / "second", **settings)
    assert calls == [] and files(first / "model") == files(second / "model")


# ---------------------------------------------------------------------------------- configuration files


def write_config(path: Path, **entries: object) -> str:
    """The option that names a file with these options."""
    path.write_text(json.dumps(entries))
    return f"--config={path}"


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def test_config_file_gives_defaults_that_the_command_line_overrides(command, nano, photos, tmp_path):
    entries = {"images": str(photos), "class": "cat", "weights": str(nano), "steps": 3, "lr": 1e-4,
               "freeze_text": True, "recompute": False, "save_every": 0, "out": "out"}
    given = write_config(tmp_path / "a.json", **entries)
    code, _, error = command("train.py", given, "--steps=1", "--class=dog", "--device=cpu")
    assert code == 0, error
    config = config_of(tmp_path / "out")
    assert (config["steps"], config["class_noun"], config["save_every"]) == (1, "dog", 0)
    assert (config["lr"], config["freeze_text"], config["recompute"]) == (1e-4, True, False)


def test_config_of_an_older_run_repeats_it(command, taught, tmp_path):
    """It names --recompute as it was called then."""
    config = json.loads((taught / "config.json").read_text())
    config["checkpointing"] = config.pop("recompute")
    (tmp_path / "old.json").write_text(json.dumps(config))
    code, _, error = command("train.py", "--config=old.json", "--out=out", "--device=cpu")
    assert code == 0, error
    assert files(tmp_path / "out" / "model") == files(taught / "model")


def test_config_of_a_run_repeats_it(command, teach, tmp_path):
    """Also of a resumed one; and --freeze-text needs no learning rate that is taken back."""
    first = teach(tmp_path / "first", steps=1, save_every=1)
    teach(first, steps=2, save_every=1, resume=True)
    for out, more in (("second", []), ("frozen", ["--freeze-text"])):
        code, _, error = command("train.py", f"--config={first}/config.json", f"--out={out}", *more)
        assert code == 0, error
    assert files(tmp_path / "second" / "model") == files(first / "model")
    assert config_of(tmp_path / "frozen")["lr_text"] is None


def test_config_file_may_resume(command, teach, nano, photos, tmp_path):
    """With what the run noted, as --resume does."""
    out = teach(tmp_path / "out", steps=1, save_every=1, lr=3e-4)
    given = write_config(tmp_path / "a.json", weights=str(nano), images=str(photos), out=str(out), steps=2, resume=True)
    code, _, error = command("train.py", given, "--device=cpu")
    assert code == 0, error
    assert (config_of(out)["lr"], config_of(out)["steps"]) == (3e-4, 2) and "going on from step 1" in error


@pytest.mark.parametrize("text, words", [
    ("{", ["a.json", "JSON"]), ("[3]", ["a.json", "list"]), (None, ["a.json: no such file"]),
    ('{"steps": "many"}', ["--steps", "many"]), ('{"log": "print"}', ["--log", "print", "wandb"]),
    ('{"stesp": 3}', ["'stesp'", "the nearest is --steps"]), ('{"zzz": 3}', ["'zzz'", "--help"]),
], ids=str)
def test_config_file_that_cannot_be_used(command, tmp_path, text, words):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    code, _, error = command("train.py", f"--config={tmp_path / 'a.json'}")
    assert code == 2 and error.count("\n") == 1 and [word for word in words if word not in error] == [], error


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, bad, good", [
    *[(name, [0, -1, 10**13], 1) for name in ("steps", "batch", "accumulate", "class_images", "keep")],
    *[(name, [-1, 10**13], 0) for name in ("save_every", "sample_every")],
    *[(name, [0.0, -1.0, 1e300, float("nan"), float("inf")], 1e-9) for name in ("lr", "lr_text")],
    ("lr_decay", [-0.1, 1.1], 1.0),
    ("batch", [10**5], 10**4), ("accumulate", [10**9], 1), ("class_images", [10**6], 10**5),
    ("prior_weight", [-0.1, 1e300, float("nan"), float("inf")], 0.0), ("seed", [-1, 2**32], 2**32 - 1),
    ("precision", ["fp8"], "bf16"), ("log", ["print"], "wandb"),
])
def test_every_option_has_its_bounds(name, bad, good):
    assert getattr(Settings(**{name: good}), name) == good
    for value in bad:
        assert f"--{name.replace('_', '-')} {value}" in refusal(Settings, **{name: value}).replace("'", "")


@pytest.mark.parametrize("given, words", [
    ({"steps": "0"}, ["--steps 0", "1 or more"]), ({"steps": "1.5"}, ["--steps", "1.5"]),
    ({"lr": "many"}, ["--lr", "many"]), ({"log": "print"}, ["--log", "print", "wandb"]),
    ({"identifier": " "}, ["--identifier", "ohwx"]), ({"class": " "}, ["--class"]), ({"class": None}, ["--class"]),
    ({"images": None}, ["--images"]), ({"images": "nowhere"}, ["nowhere: not a folder"]),
    ({"images": "empty"}, ["empty", "no picture", "JPEG or PNG"]),
    ({"images": "junk"}, ["junk", "no picture", "notes.txt is skipped: not a picture"]),
    ({"weights": "nowhere"}, ["nowhere: not a folder"]), ({"weights": "empty"}, ["model_index.json"]),
    ({"out": "file"}, ["file"]), ({"out": "file/in"}, ["file"]), ({"out": "junk"}, ["junk is not empty", "--out"]),
    ({"device": "tpu9"}, ["tpu9", "--device cpu"]), ({"resume": True}, ["--resume", "no run in out"]),
    ({"step": "3"}, ["--step"]), ({"class-dir": "nowhere"}, ["nowhere: not a folder"]),
], ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "")
def test_bad_option_gets_one_line(command, nano, photos, tmp_path, given, words):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.txt").write_text("rex")
    before = sorted(tmp_path.rglob("*"))
    options = {"images": photos, "class": "dog", "weights": nano, "out": "out", "device": "cpu", **given}
    code, out, error = command("train.py", *arguments(**{k: v for k, v in options.items() if v is not None}))
    assert code == 2 and out == "" and "Traceback" not in error
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert [word for word in words if word not in error] == [], error
    assert sorted(tmp_path.rglob("*")) == before


def test_help_tells_the_defaults(command):
    code, out, _ = command("train.py", "--help")
    assert code == 0 and "default: ohwx" in out and "--prior-weight" in out

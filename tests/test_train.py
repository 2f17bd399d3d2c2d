"""train.py in one process: its loss, what a run leaves behind, class images, configuration, and bad input."""

import json
import shlex
import shutil
import sys
import types
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, Pair, difference, files
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from processes import arguments, raise_out_of_memory, start
from safetensors.torch import load_file
from torch import Tensor, nn

import tinydb
import train
from convert_weights import SD1
from tinydb.config import InputError
from tinydb.class_images import ClassImages
from tinydb.data import Batch, Latents, fit, open_picture, random_batch
from tinydb.layers import ResnetBlock2D
from tinydb.pictures import grid, save_png
from tinydb.pipeline import choose_device, choose_dtype
from tinydb.run import Run, memory_plan
from train import DreamBoothLoss, Settings

PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = UNET.replace("unet", "vae")


def refusal(teach, out: Path, **settings) -> str:
    """The one line that a run ends with."""
    with pytest.raises(InputError) as caught:
        teach(out, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def size(tensors: list[Tensor]) -> float:
    """The norm of all tensors together."""
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


def distance(tensors: list[Tensor], others: list[Tensor]) -> float:
    """How far two lists of tensors are apart, relative to the second."""
    return size([a - b for a, b in zip(tensors, others, strict=True)]) / size(others)


@pytest.fixture
def gradients(teach, monkeypatch, tmp_path):
    """gradients(**settings) -> what each step of a run hands to the clipping, a list of tensors a step."""
    def run(**settings) -> list[list[Tensor]]:
        steps = []

        def spy(parameters: list[nn.Parameter], limit: float) -> Tensor:
            steps.append([parameter.grad.clone() for parameter in parameters])
            return clip(parameters, limit)

        clip = nn.utils.clip_grad_norm_
        with monkeypatch.context() as patch:
            patch.setattr(nn.utils, "clip_grad_norm_", spy)
            teach(tmp_path / f"run{len(list(tmp_path.iterdir()))}", save_every=0, **settings)
        return steps
    return run


# -------------------------------------------------------------------------------------------- the loss


def dreambooth_loss(pair: Pair, batch: Batch, prompts: list[str], weights: list[float]) -> tuple[list, Tensor]:
    """What diffusers' examples/dreambooth/train_dreambooth.py computes of a batch: the loss of each set of
    pictures, and their weighted sum."""
    reference, losses = pair.reference, []
    scheduler = DDPMScheduler.from_config(reference.scheduler.config)
    for prompt, latents, noise, timesteps in zip(prompts, batch.latents, batch.noise, batch.timesteps):
        texts = [prompt] * len(latents)
        ids = reference.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        prediction = reference.unet(scheduler.add_noise(latents, noise, timesteps), timesteps,
                                    reference.text_encoder(ids)[0]).sample
        epsilon = scheduler.config.prediction_type == "epsilon"
        target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
        losses.append(F.mse_loss(prediction.float(), target.float()))
    return losses, sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def reference_gradients(pair: Pair, loss: Tensor) -> list[Tensor]:
    """By the names of our model's parameters, in their order."""
    named = {f"unet.{name}": parameter for name, parameter in pair.reference.unet.named_parameters()}
    named |= {f"text_encoder.{name if name.startswith('text_model.') else f'text_model.{name}'}": parameter
              for name, parameter in pair.reference.text_encoder.named_parameters()}
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
    ours = DreamBoothLoss(tinydb.load(pair.folder), PROMPTS, freeze_text=False)
    return [gradient[name] for name, _ in ours.named_parameters()]


def random_sets(pair: Pair) -> list[Latents]:
    """Latents of three instance and four class pictures that never were."""
    generator = torch.Generator().manual_seed(0)
    return [Latents(torch.randn(count, pair.config.unet.in_channels, 8, 8, generator=generator),
                    torch.full((count, 1, 1, 1), 0.1)) for count in (3, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_diffusers_train_dreambooth(pairs, kind):
    """Noise is predicted in two kinds, and v in the third."""
    pair = pairs(kind)
    batch = random_batch(random_sets(pair), 2, 1000, seed=0, step=0)
    expected, total = dreambooth_loss(pair, batch, PROMPTS, [1, 0.7])
    model = DreamBoothLoss(tinydb.load(pair.folder), PROMPTS, freeze_text=False)
    losses = model(batch)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    (losses * torch.tensor([1, 0.7])).sum().backward()
    assert distance([p.grad for p in model.parameters()], reference_gradients(pair, total)) < 1e-5


@pytest.mark.parametrize("prior_weight", [0.0, 0.7])
def test_first_step_is_that_of_train_dreambooth(gradients, pairs, photos, tmp_path, prior_weight):
    """The whole way from files to gradients. Prior weight 0 is plain fine-tuning on the instance pictures."""
    [ours] = gradients(batch=3, steps=1, prior_weight=prior_weight)
    pair = pairs("nano")
    pictures = [sorted(photos.glob("*.png")), sorted(tmp_path.glob("*/class_images/*/*.png"))]
    assert len(pictures[0]) == 3 and len(pictures[1]) == (5 if prior_weight else 0)
    sets = [Latents.of([fit(open_picture(path), 16) for path in paths], pair.sd.vae, torch.device("cpu"))
            for paths in pictures if paths]
    batch = random_batch(sets, 3, 1000, seed=0, step=0)
    _, loss = dreambooth_loss(pair, batch, PROMPTS[:len(sets)], [1, prior_weight][:len(sets)])
    assert distance(ours, reference_gradients(pair, loss)) < 1e-5


def test_two_steps_are_those_of_a_plain_loop(teach, pairs, photos, tmp_path):
    """AdamW as the paper's followers use it, with the clip active: gradients of norm over 1 are scaled down to 1."""
    out = teach(tmp_path / "out", batch=3, steps=2, save_every=0)
    pair = pairs("nano")
    pictures = [sorted(photos.glob("*.png")), sorted(out.glob("class_images/*/*.png"))]
    sets = [Latents.of([fit(open_picture(path), 16) for path in paths], pair.sd.vae, torch.device("cpu"))
            for paths in pictures]
    model = DreamBoothLoss(tinydb.load(pair.folder), PROMPTS, freeze_text=False)
    optimizer = torch.optim.AdamW([{"params": model.unet.parameters(), "lr": 1e-3},
                                   {"params": model.text_encoder.parameters(), "lr": 5e-4}],
                                  betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step in range(2):
        model(random_batch(sets, 3, 1000, seed=0, step=step)).sum().backward()
        norm = size([parameter.grad for parameter in model.parameters()])
        assert norm > 1
        for parameter in model.parameters():
            parameter.grad /= norm
        optimizer.step()
        optimizer.zero_grad()
    start = DreamBoothLoss(tinydb.load(pair.folder), PROMPTS, freeze_text=False)
    saved = {f"unet.{name}": tensor for name, tensor in load_file(out / "model" / UNET).items()}
    saved |= {f"text_encoder.{name}": tensor for name, tensor in load_file(out / "model" / TEXT).items()}
    before = [parameter.detach() for parameter in start.parameters()]
    ours = [saved[name] - a for (name, _), a in zip(start.named_parameters(), before)]
    assert distance(ours, [b.detach() - a for b, a in zip(model.parameters(), before)]) < 3e-4


def test_prior_weight_0_needs_no_class_pictures(teach, tmp_path):
    out = teach(tmp_path / "out", prior_weight=0.0, steps=1)
    assert not (out / "class_images").exists()
    assert "instance_loss" in metrics(out)[0] and "prior_loss" not in metrics(out)[0]


def test_prior_gradient_scales_with_its_weight(gradients):
    [one], [two], [four] = [gradients(prior_weight=weight, steps=1) for weight in (1.0, 2.0, 4.0)]
    prior = [b - a for a, b in zip(one, two)]
    assert size(prior) > 0.1 * size(one)
    assert distance([b - a for a, b in zip(two, four)], [2 * gradient for gradient in prior]) < 1e-5


def test_two_micro_steps_are_one_step_of_twice_the_batch(gradients):
    [whole], [halves] = gradients(batch=4, steps=1), gradients(batch=2, accumulate=2, steps=1)
    assert distance(halves, whole) < 1e-5
    [half] = gradients(batch=2, steps=1)
    assert distance(half, whole) > 0.1


def test_recompute_computes_again_and_changes_no_gradient(gradients, pairs, monkeypatch):
    calls = []
    forward = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *x: calls.append(self) or forward(self, *x))
    [plain], plain_calls = gradients(steps=1), len(calls)
    calls.clear()
    [recomputed] = gradients(steps=1, recompute=True)
    blocks = sum(isinstance(module, ResnetBlock2D) for module in pairs("nano").sd.unet.modules())
    assert len(calls) - plain_calls == blocks
    assert distance(recomputed, plain) < 1e-6


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_text_encoder_stays_as_it_is(teach, nano, tmp_path, freeze):
    model = teach(tmp_path / "out", freeze_text=freeze, steps=1) / "model"
    same = {part: all(map(torch.equal, load_file(model / part).values(), load_file(nano / part).values()))
            for part in (UNET, TEXT)}
    assert same == {UNET: False, TEXT: freeze}


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
    assert names(taught) == [
        "checkpoints", "class_images", "config.json", "inputs.png", "metrics.jsonl", "model", "report.html",
        "samples"]
    assert names(taught / "checkpoints") == ["step-000004", "step-000005"]
    assert names(taught / "samples") == ["step-000002.png", "step-000004.png"]
    assert {path.suffix for path in taught.rglob("*") if path.is_file()} == {
        ".png", ".json", ".jsonl", ".html", ".txt", ".safetensors"}  # no pickles


def test_loss_falls(teach, tmp_path):
    out = teach(tmp_path / "out", steps=60, save_every=20)
    losses = [line["validation_loss"] for line in metrics(out) if "validation_loss" in line]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert sum(line["instance_loss"] for line in metrics(out)[-10:]) < (
        0.9 * sum(line["instance_loss"] for line in metrics(out)[:10]))


def test_same_seed_gives_identical_bytes_wherever(teach, tmp_path):
    """No time and no path gets into the files."""
    first, second, other = [teach(tmp_path / name / "out", seed=seed, save_every=2)
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


def test_model_notes_what_it_was_taught(teach, nano, tmp_path):
    out = teach(tmp_path / "out", identifier="zwx", class_noun="red cat", steps=1)
    info = tinydb.load(out / "model").info
    assert (info.identifier, info.class_noun, info.step) == ("zwx", "red cat", 1)
    assert info.recipe == tinydb.load(nano).info.recipe


def test_checkpoint_is_a_model_folder(taught):
    """To sample from as it is: the last one holds what the result holds."""
    model, checkpoint = files(taught / "model"), files(taught / "checkpoints" / "step-000005")
    assert {name: checkpoint.get(name) for name in model} == model
    assert checkpoint.keys() - model.keys() == {"state.json", "state.safetensors"}
    assert tinydb.load(taught / "checkpoints" / "step-000004").info.step == 4


def test_inputs_show_what_the_model_sees(taught, photos):
    images = [fit(open_picture(path), 16) for path in sorted(photos.glob("*.png"))]
    assert difference([Image.open(taught / "inputs.png")], [grid(images, 3)]) == 0


def test_config_tells_everything_that_ran(taught, photos, nano):
    config = json.loads((taught / "config.json").read_text())
    assert config.pop("run").keys() >= {"world_size", "device", "precision", "pictures", "model"}
    settings = asdict(Settings(
        images=str(photos), class_noun="dog", weights=str(nano), out=str(taught), steps=5, batch=3, lr=1e-3,
        lr_text=5e-4, class_images=5, save_every=2, sample_every=2, device="cpu"))
    assert config.items() <= settings.items() and settings.keys() - config.keys() == {"resume", "config"}


def test_ends_with_the_command_to_try(teach, tmp_path, capsys):
    out = teach(tmp_path / "out", steps=1)
    assert f"python sample.py '[V] dog on the moon' --weights {out / 'model'}" in capsys.readouterr().out


def test_out_is_named_after_the_pictures(one_thread, nano, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(photos, tmp_path / "rex"))
    train.main(Settings(images=".", class_noun="dog", weights=str(nano), steps=1, save_every=0))
    assert (tmp_path / "rex" / "runs" / "rex" / "model").is_dir()


def test_metrics_hold_every_step(taught):
    lines = metrics(taught)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["instance_loss"] > 0 and line["prior_loss"] > 0 for line in lines)
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 5]


def moved(out: Path, nano: Path) -> dict[str, float]:
    """How far training has moved each part from the base, relative to its size."""
    changes = {}
    for part, file in (("unet", UNET), ("text_encoder", TEXT)):
        before, after = load_file(nano / file), load_file(out / "model" / file)
        before = {name if name in after else f"text_model.{name}": tensor for name, tensor in before.items()}
        names = [name for name in after if name in before]
        changes[part] = distance([after[name] for name in names], [before[name] for name in names])
    return changes


def test_each_part_has_its_learning_rate(teach, nano, tmp_path):
    """The text encoder's follows --lr as in the recipe, unless it is given; a frozen one has none."""
    for given, lr, lr_text in (({}, 1e-3, 5e-4), ({"lr": 2e-3}, 2e-3, 1e-3), ({"lr_text": 1e-20}, 1e-3, 1e-20),
                               ({"lr": 1e-20, "lr_text": 1e-3}, 1e-20, 1e-3),
                               ({"freeze_text": True, "lr": 1e-3}, 1e-3, None)):
        out = teach(tmp_path / str(given), **given)
        config = json.loads((out / "config.json").read_text())
        assert (config["lr"], config["lr_text"]) == (pytest.approx(lr), pytest.approx(lr_text))
        changes = moved(out, nano)
        assert (changes["unet"] > 1e-4) == (lr > 1e-4) and (changes["text_encoder"] > 1e-4) == ((lr_text or 0) > 1e-4)


def test_validation_loss_has_the_same_noise_at_every_step(teach, tmp_path):
    """With a learning rate that moves nothing, the training loss moves on and the validation loss stays."""
    lines = metrics(teach(tmp_path / "out", lr=1e-20, save_every=1))
    assert len({line["instance_loss"] for line in lines}) == 4
    assert len({line["validation_loss"] for line in lines}) == 1


def test_best_step_is_kept_and_named(teach, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 1.0, 2.0, 2.5, 1.5])
    monkeypatch.setattr(train, "validate", lambda *_: next(losses))
    out = teach(tmp_path / "out", steps=5, save_every=1, keep=1)
    assert names(out / "checkpoints") == ["step-000002", "step-000005"]
    printed = capsys.readouterr().out
    assert "lowest at step 2" in printed and str(out / "checkpoints" / "step-000002") in printed


def test_no_best_step_is_named_where_it_is_the_last(teach, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(train, "validate", lambda *_: next(losses))
    out = teach(tmp_path / "out", steps=3, save_every=1, keep=2)
    assert names(out / "checkpoints") == ["step-000002", "step-000003"]
    assert "lowest" not in capsys.readouterr().out


def test_save_every_0_writes_the_result_alone(teach, tmp_path):
    out = teach(tmp_path / "out", save_every=0)
    assert (out / "model").is_dir() and not (out / "checkpoints").exists()


def test_previews_do_not_change_the_training(teach, tmp_path):
    plain, watched = teach(tmp_path / "plain"), teach(tmp_path / "watched", sample_every=1)
    assert files(plain / "model") == files(watched / "model")
    assert len(list((watched / "samples").iterdir())) == 4


def test_previews_have_the_same_noise_at_every_step(teach, tmp_path):
    out = teach(tmp_path / "out", lr=1e-20, steps=2, sample_every=1)
    first, second = [(out / "samples" / f"step-00000{i}.png").read_bytes() for i in (1, 2)]
    assert first == second


def test_preview_without_memory_does_not_end_the_run(teach, tmp_path, monkeypatch, capsys):
    def generate(self, prompts, **options):
        if len(set(prompts)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, prompts, **options)

    original = tinydb.StableDiffusion.generate
    monkeypatch.setattr(tinydb.StableDiffusion, "generate", generate)
    assert (teach(tmp_path / "out", steps=2, sample_every=1) / "model").is_dir()
    assert "no preview" in capsys.readouterr().err


def test_preview_without_disk_does_not_end_the_run(teach, tmp_path, monkeypatch, capsys):
    def save(image, path, parameters):
        if "samples" in path.parts:
            raise OSError(28, "No space left on device")
        save_png(image, path, parameters)

    monkeypatch.setattr("tinydb.run.save_png", save)
    assert (teach(tmp_path / "out", steps=2, sample_every=1) / "model").is_dir()
    assert "No space left" in capsys.readouterr().err


def test_bf16_trains_fp32_weights(teach, tmp_path):
    """On the CPU too; the loss falls as it does in fp32, by another path."""
    low, full = [teach(tmp_path / precision, precision=precision, steps=40, save_every=20)
                 for precision in ("bf16", "fp32")]
    losses = [line["validation_loss"] for line in metrics(low) if "validation_loss" in line]
    expected = [line["validation_loss"] for line in metrics(full) if "validation_loss" in line]
    assert losses[1] < 0.95 * losses[0] and losses == pytest.approx(expected, rel=0.05) and losses != expected
    assert {tensor.dtype for tensor in load_file(low / "model" / UNET).values()} == {torch.float32}


def test_fp16_scales_its_gradients_and_skips_what_overflows(teach, nano, tmp_path, monkeypatch):
    """Also on a CPU. One step overflows: the scale is halved, and that step is not counted in the moments."""
    def unscale_(self, optimizer):
        calls.append(optimizer)
        if len(calls) == 3:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        return original(self, optimizer)

    calls, original = [], torch.amp.GradScaler.unscale_
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_)
    out = teach(tmp_path / "out", precision="fp16", steps=8, save_every=8)
    scale = json.loads((out / "checkpoints" / "step-000008" / "state.json").read_text())["scaler"]["scale"]
    state = load_file(out / "checkpoints" / "step-000008" / "state.safetensors")
    assert moved(out, nano)["unet"] > 0 and scale == 65536 / 2
    assert {tensor.item() for name, tensor in state.items() if name.startswith("step.")} == {7}
    assert all(t.isfinite().all() for t in load_file(out / "model" / UNET).values())


def test_fp16_that_never_takes_a_step_ends_the_run(teach, tmp_path, monkeypatch):
    """Every gradient overflows, so the scale falls and falls."""
    def unscale_(self, optimizer):
        for group in optimizer.param_groups:
            group["params"][0].grad.fill_(torch.inf)
        return original(self, optimizer)

    original = torch.amp.GradScaler.unscale_
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_)
    assert "fp16" in refusal(teach, tmp_path / "out", precision="fp16", steps=50, save_every=50)
    assert not (tmp_path / "out" / "checkpoints").exists() and len(metrics(tmp_path / "out")) < 30


@pytest.mark.parametrize("capability, expected", [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_precision_goes_by_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", choose_device("cuda")) == expected
    assert choose_dtype("auto", choose_device("cpu")) == torch.float32


def test_vae_of_the_result_is_the_bases_weights_and_nothing_else(teach, nano, tmp_path):
    """A folder from the hub may hold other files, pickles among them, and may be read-only."""
    base = Path(shutil.copytree(nano, tmp_path / "base"))
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (base / "vae").chmod(0o555)
    out = teach(tmp_path / "out", weights=str(base))
    for folder in (out / "model", *(out / "checkpoints").iterdir()):
        assert (folder / "vae").stat().st_mode & 0o200
        assert sorted(files(folder / "vae")) == ["config.json", VAE.partition("/")[2]]
        assert (folder / VAE).read_bytes() == (nano / VAE).read_bytes()


def test_loss_that_is_not_finite_stops_before_anything_is_saved(teach, tmp_path):
    out = tmp_path / "out"
    text = refusal(teach, out, lr=1e30, save_every=5, steps=5)
    assert "step 2" in text and "nan" in text and "--lr" in text and "--precision fp32" in text
    assert not (out / "model").exists() and not (out / "checkpoints").exists()


@pytest.mark.parametrize("steps, save_every", [(5, 1), (1, 0)])
def test_poisoned_weights_are_not_saved(teach, tmp_path, steps, save_every):
    """The loss of the first step is finite, the weights after it are not worth a file."""
    out = tmp_path / "out"
    assert "--lr" in refusal(teach, out, lr=1e30, steps=steps, save_every=save_every)
    assert not (out / "model").exists() and not (out / "checkpoints").exists()


def test_out_of_memory_is_answered_with_what_to_try(nano, photos, tmp_path):
    settings = {"images": photos, "class_noun": "dog", "weights": nano, "out": tmp_path / "out"}
    run = start(tmp_path, "train.py", *arguments(**settings), prepare=raise_out_of_memory)
    assert run.wait() == 1
    last = run.message.split("\n")[-1]
    assert last.startswith("train.py: CUDA out of memory. Tried to allocate 2 GiB")
    assert "Traceback" not in run.stderr
    assert all(flag in last for flag in ("--recompute", "--batch 1", "--freeze-text"))


def test_too_little_disk_is_noticed_before_anything_is_written(teach, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    assert "free" in refusal(teach, tmp_path / "out") and not (tmp_path / "out").exists()


def test_disk_that_was_enough_to_start_is_enough_to_resume(teach, nano, tmp_path, monkeypatch):
    """What the checkpoints have taken of it is not asked for again."""
    def suffices(free: int) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        try:
            Run(out).check_disk(sd, Settings())
        except InputError:
            return False
        return True

    sd, out = tinydb.load(nano), tmp_path / "out"
    free = next(free for free in range(0, 2**30, 10_000) if suffices(free))
    teach(out, steps=2, save_every=1)
    taken = [path.stat().st_size for path in (out / "checkpoints").rglob("*.safetensors")]
    assert len(taken) == 8 and suffices(free - sum(taken)) and not suffices(free - sum(taken) - 20_000)


def test_memory_plan_of_stable_diffusion(pairs):
    """860 million weights in the UNet and 123 in the text encoder, 4 bytes each."""
    with torch.device("meta"):
        parts = {"unet": tinydb.pipeline.UNet2DConditionModel(SD1.unet),
                 "text_encoder": tinydb.pipeline.CLIPTextModel(SD1.text_encoder)}
    sd = types.SimpleNamespace(**parts)
    full = memory_plan(sd, Settings(), torch.float32)
    assert "weights 3.93, gradients 3.93, optimizer 7.86; at once 15.72" in full  # 16 bytes a parameter
    frozen = memory_plan(sd, Settings(freeze_text=True), torch.bfloat16)
    assert "gradients 3.44, optimizer 6.88, low-precision copies 1.97; at once 14.24" in frozen
    assert "copies" not in memory_plan(sd, Settings(recompute=True), torch.bfloat16)


def test_says_what_it_skipped_and_enlarged(teach, photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "notes.txt").write_text("not a picture")
    Image.open(folder / "0.png").resize((8, 6)).save(folder / "thumbnail.png")
    teach(tmp_path / "out", images=str(folder), steps=1)
    error = capsys.readouterr().err
    assert "notes.txt is skipped: not a picture" in error
    assert "thumbnail.png is only 8x6" in error and "0.png is only" not in error


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


@pytest.mark.parametrize("name, stub", [("tensorboard", stub_tensorboard), ("wandb", stub_wandb)])
def test_tracker_gets_what_metrics_hold(teach, tmp_path, monkeypatch, name, stub):
    calls = []
    for module_name, stubbed in stub(calls).items():
        monkeypatch.setitem(sys.modules, module_name, stubbed)
    out = teach(tmp_path / "out", log=name, steps=2)
    assert calls[0][0] == "start" and out in (calls[0][1], calls[0][1].parent)
    assert calls[1:] == [(key, value, line["step"]) for line in metrics(out)
                         for key, value in line.items() if key != "step"]


def test_resumed_tensorboard_keeps_the_step_of_the_checkpoint(teach, tmp_path, monkeypatch):
    """It hides what was logged at `purge_step` and after."""
    calls = []
    for module_name, stubbed in stub_tensorboard(calls).items():
        monkeypatch.setitem(sys.modules, module_name, stubbed)
    for options in ({"steps": 1, "save_every": 1}, {"steps": 2, "save_every": 1, "resume": True}):
        teach(tmp_path / "out", log="tensorboard", **options)
    assert [call[2] for call in calls if call[0] == "start"] == [1, 2]


def test_resumed_run_goes_on_in_the_same_wandb_run(teach, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", stub_wandb(calls)["wandb"])
    for options in ({"steps": 1, "save_every": 1}, {"steps": 2, "save_every": 1, "resume": True}):
        teach(tmp_path / "out", log="wandb", **options)
    assert [call[2] for call in calls if call[0] == "start"] == [None, "run-1"]


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
    return files(folder)


def drawings(monkeypatch) -> list[list[str]]:
    """The prompts of every call of `generate` from now on."""
    calls, original = [], tinydb.StableDiffusion.generate
    monkeypatch.setattr(tinydb.StableDiffusion, "generate", lambda self, prompts, **options: (
        calls.append(prompts) or original(self, prompts, **options)))
    return calls


@pytest.mark.parametrize("noun, prompt", [("dog", "a photo of a dog"), ("Owl", "a photo of an Owl")])
def test_class_images_are_what_the_model_draws_of_the_class(teach, nano, tmp_path, noun, prompt):
    """Picture i from seed + i."""
    out = teach(tmp_path / "out", class_noun=noun, class_images=10, seed=7, steps=1)
    [folder] = (out / "class_images").iterdir()
    images = [Image.open(path) for path in sorted(folder.iterdir())]
    assert len(images) == 10
    sd = tinydb.load(nano)
    assert difference(images, sd.generate([prompt] * 10, steps=2, guidance_scale=2.0, seed=7)) <= 1
    assert images[9].text["parameters"] == f"{prompt}\nSteps: 2, Sampler: DDIM, Seed: 16, CFG scale: 2.0"


def test_class_images_of_an_earlier_run_are_used_as_they_are(teach, tmp_path, monkeypatch):
    first = teach(tmp_path / "first", steps=2)
    calls, before = drawings(monkeypatch), files(first)
    second = teach(tmp_path / "second", class_dir=str(first / "class_images"), steps=2)
    assert calls == [] and files(first) == before and not (second / "class_images").exists()
    assert files(second / "model") == files(first / "model")


@pytest.mark.parametrize("change", [{"class_noun": "cat"}, {"seed": 3}], ids=["class", "seed"])
def test_class_images_of_another_run_are_not_taken_for_these(teach, tmp_path, monkeypatch, change):
    first = teach(tmp_path / "first", steps=1)
    calls, before = drawings(monkeypatch), files(first)
    teach(tmp_path / "second", class_dir=str(first / "class_images"), steps=1, **change)
    assert len(calls) == 1 and len(list((first / "class_images").iterdir())) == 2
    assert {name: content for name, content in files(first).items() if name in before} == before


def test_key_of_class_images(nano, tmp_path):
    """It tells model, prompt, size, steps, guidance and seed, and nothing else."""
    def key(folder: Path, prompt: str = PROMPTS[1], seed: int = 0, **recipe: float) -> str:
        sd = tinydb.load(folder)
        sd.info = train.replace(sd.info, recipe=train.replace(sd.info.recipe, **recipe))
        return ClassImages(sd, folder, prompt, seed).key

    copy, larger = [Path(shutil.copytree(nano, tmp_path / name)) for name in ("copy", "larger")]
    sd, other = tinydb.load(nano), tmp_path / "other"
    sd.unet.conv_in.weight.data += 1e-3
    sd.save(other)
    config = json.loads((larger / "unet" / "config.json").read_text())
    (larger / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    assert key(copy) == key(nano) == key(nano, lr=1.0, class_images=9)
    keys = [key(nano), key(other), key(larger), key(nano, "a photo of a cat"), key(nano, seed=1),
            key(nano, class_steps=3), key(nano, class_guidance=1.0)]
    assert len(set(keys)) == len(keys)


def test_class_images_are_topped_up(teach, tmp_path, monkeypatch):
    """Only what is missing is made, and it is what a run that makes all of them makes."""
    parent = teach(tmp_path / "few", class_images=8, steps=1) / "class_images"
    before = class_images(parent)
    calls = drawings(monkeypatch)
    teach(tmp_path / "more", class_images=12, class_dir=str(parent), steps=1)
    assert [len(prompts) for prompts in calls] == [4]
    assert len(class_images(parent)) == 12
    assert {name: class_images(parent)[name] for name in before} == before
    everything = teach(tmp_path / "all", class_images=12, steps=1)
    assert class_images(parent) == class_images(everything / "class_images")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "damaged", "missing"])
def test_class_image_that_is_no_picture_is_made_again(teach, tmp_path, content):
    first = teach(tmp_path / "first", steps=1)
    [folder] = (first / "class_images").iterdir()
    before = files(folder)
    (folder / "00001.png").unlink() if content is None else (folder / "00001.png").write_bytes(content)
    teach(tmp_path / "second", class_dir=str(first / "class_images"), steps=1)
    assert files(folder) == before


def own_pictures(folder: Path, count: int) -> Path:
    """A folder of class pictures that somebody took, and junk."""
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


def test_enough_own_class_pictures_need_no_model(gradients, tmp_path, monkeypatch):
    """And only as many as asked for are used."""
    folder, calls = own_pictures(tmp_path / "dogs", 4), drawings(monkeypatch)
    [three] = gradients(class_dir=str(folder), class_images=3, steps=1)
    (folder / "mine3.jpg").unlink()
    [same] = gradients(class_dir=str(folder), class_images=3, steps=1)
    assert calls == [] and distance(same, three) == 0


def test_class_dir_that_is_none(teach, tmp_path):
    assert "nowhere: no such folder" in refusal(teach, tmp_path / "out", class_dir=str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------- configuration files


def write_config(path: Path, **entries: object) -> str:
    """A JSON file of options."""
    path.write_text(json.dumps(entries))
    return f"--config={path}"


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def test_config_file_gives_defaults_that_the_command_line_overrides(command, nano, photos, tmp_path):
    entries = {"images": str(photos), "class": "cat", "weights": str(nano), "steps": 3, "lr": 1e-4,
               "freeze_text": True, "recompute": False, "out": "out"}
    code, _, error = command("train.py", write_config(tmp_path / "a.json", **entries), "--steps=1", "--class=dog")
    assert code == 0, error
    config = config_of(tmp_path / "out")
    assert (config["steps"], config["class_noun"]) == (1, "dog")
    assert (config["lr"], config["freeze_text"], config["recompute"]) == (1e-4, True, False)


def test_config_of_a_run_repeats_it(command, taught, tmp_path):
    code, _, error = command("train.py", f"--config={taught}/config.json", "--out=out", "--device=cpu")
    assert code == 0, error
    assert files(tmp_path / "out" / "model") == files(taught / "model")


def test_config_of_a_resumed_run_repeats_it(command, teach, tmp_path):
    first = teach(tmp_path / "first", steps=1, save_every=1)
    teach(first, steps=1, save_every=1, resume=True)
    code, _, error = command("train.py", f"--config={first}/config.json", "--out=second")
    assert code == 0, error
    assert files(tmp_path / "second" / "model") == files(first / "model")


def test_freeze_text_over_a_config_that_trained_it(command, taught):
    code, _, error = command("train.py", f"--config={taught}/config.json", "--freeze-text", "--out=out", "--device=cpu")
    assert code == 0, error
    assert config_of(Path("out"))["lr_text"] is None


@pytest.mark.parametrize("key, nearest", [("stesp", "steps"), ("class_image", "class_images"),
                                          ("save-evry", "save"), ("zzz", "")])
def test_unknown_key_in_a_config_file_names_the_nearest(command, tmp_path, key, nearest):
    code, _, error = command("train.py", write_config(tmp_path / "a.json", **{key: 3}))
    assert code == 2 and error.count("\n") == 1
    assert repr(key) in error and nearest in error.split("nearest")[1]


@pytest.mark.parametrize("name, text, words", [
    ("a.json", "{", ["a.json", "JSON"]), ("a.json", "[3]", ["a.json", "list"]),
    ("a.json", '{"steps": "many"}', ["--steps", "many"]), ("a.json", '{"log": "print"}', ["--log", "print", "wandb"]),
    ("a.json", '{"keep": 0}', ["--keep 0"]), ("a.json", '{"images": 3}', ["--images 3", "str"]),
], ids=str)
def test_config_file_that_cannot_be_used(command, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    code, _, error = command("train.py", f"--config={tmp_path / name}")
    assert code == 2 and error.count("\n") == 1 and [word for word in words if word not in error] == []


def test_config_file_that_is_not_there(command):
    code, _, error = command("train.py", "--config=none.json")
    assert code == 2 and error.count("\n") == 1 and "none.json" in error and "convert_weights" not in error


# ------------------------------------------------------------------------------------------- bad input


def test_what_the_text_encoder_will_not_see_is_said(teach, tmp_path, capsys):
    """Once for each of the prompts, and the training goes on."""
    teach(tmp_path / "out", steps=1, class_noun="dog " * 80 + "whale")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "will not see" in line]
    assert len(warnings) == 2 and "ohwx" in warnings[0] and all(line.endswith("whale'") for line in warnings)


def test_command_to_try_survives_the_shell(teach, tmp_path, capsys):
    out = teach(tmp_path / "my dog", steps=1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "sample.py" in line]
    assert shlex.split(line)[-1] == str(out / "model")


NUMBERS = ["steps", "batch", "accumulate", "lr", "lr-text", "class-images", "keep"]


@pytest.mark.parametrize("given, words", [
    *[({name: value}, [f"--{name}", value]) for name in NUMBERS for value in ("0", "-1", "many")],
    *[({name: value}, [f"--{name}", value]) for name in ("prior-weight", "save-every", "sample-every", "seed")
      for value in ("-1", "many")],
    ({"lr": "nan"}, ["--lr nan"]), ({"lr": "inf"}, ["--lr inf"]),
    ({"prior-weight": "nan"}, ["--prior-weight nan"]),
    ({"seed": "18446744073709551616"}, ["--seed"]), ({"steps": "1.5"}, ["--steps", "1.5"]),
    ({"identifier": " "}, ["--identifier", "ohwx"]),
    ({"class": " "}, ["--class"]), ({"class": None}, ["--class"]),
    ({"images": None}, ["--images"]), ({"images": "nowhere"}, ["nowhere: no such folder"]),
    ({"images": "empty"}, ["empty", "no picture", "JPEG or PNG"]),
    ({"images": "junk"}, ["junk", "no picture", "notes.txt is skipped: not a picture"]),
    ({"weights": "nowhere"}, ["nowhere: no such folder"]), ({"weights": "empty"}, ["model_index.json"]),
    ({"out": "file"}, ["file"]), ({"out": "file/in"}, ["file"]),
    ({"out": "junk"}, ["junk is not empty", "--out"]),
    ({"device": "tpu9"}, ["tpu9", "--device cpu"]), ({"precision": "fp8"}, ["--precision", "fp8", "bf16"]),
    ({"log": "print"}, ["--log", "print", "wandb"]), ({"config": "nowhere.json"}, ["nowhere.json"]),
    ({"resume": True}, ["--resume", "no run in out"]),
    ({"stesp": "3"}, ["--stesp"]), ({"step": "3"}, ["--step"]),
    ({"class-dir": "nowhere"}, ["nowhere: no such folder"]),
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

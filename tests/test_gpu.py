"""The same on a GPU, for the machine that has one: pytest tests/test_gpu.py

Without one, the same code runs on the CPU in miniature, and only what needs CUDA is skipped.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import benchmark
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, UNET, Pair, difference, metrics, prefixed, refusal
from processes import arguments, start, start_ranks
from safetensors.torch import load_file
from test_distributed import gradient, succeed
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import tinydb
import train
from tinydb.data import Examples, Latents, random_batch
from tinydb.layers import Attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
KINDS = ["sd1", "sd2", "tiny"] if ON_GPU else ["sd2"]  # all of them are tested on the CPU in test_models.py
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROUNDING = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.01}  # what a loss may be off by
PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]

pytestmark = pytest.mark.usefixtures("one_thread", "without_tf32")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU with CUDA")


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """float32 means all of its 24 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=KINDS)
def pair(request, pairs) -> Pair:
    return pairs(request.param)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def error(values: Tensor, truth: Tensor) -> float:
    """In parts of the truth's norm."""
    return ((values.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_as_exact(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Ours errs by rounding alone: within 1e-4 in float32, elsewhere hardly more than theirs in the same precision."""
    assert ours.isfinite().all() and error(ours, truth) <= 1.5 * error(theirs, truth) + 1e-4


def reference(pair: Pair, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network of diffusers or transformers on the device."""
    return copy.deepcopy(getattr(pair.reference, part)).to(DEVICE, dtype)


# -------------------------------------------------------------------------------- the networks, and the loss


@PRECISIONS
@torch.inference_mode()
def test_text_encoder_and_unet(pair, dtype):
    sd = tinydb.load(pair.folder, DEVICE, dtype)
    ids = torch.randint(pair.config.text.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact, theirs = (reference(pair, "text_encoder", each)(ids)[0] for each in (torch.float32, dtype))
    assert_as_exact(sd.text_encoder(ids), theirs, exact)

    latents, text_embeds = noise(2, pair.config.unet.in_channels, 8, 12), noise(2, 77, pair.config.text.hidden_size)
    timesteps = torch.tensor([1, 981], device=DEVICE)
    exact, theirs = (reference(pair, "unet", each)(latents.to(each), timesteps, text_embeds.to(each)).sample
                     for each in (torch.float32, dtype))
    assert_as_exact(sd.unet(latents.to(dtype), timesteps, text_embeds.to(dtype)), theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.inference_mode()
def test_vae_is_exact_in_any_precision(pair, dtype):
    """It stays in float32: in fp16 that of Stable Diffusion decodes to black."""
    vae, theirs = tinydb.load(pair.folder, DEVICE, dtype).vae, reference(pair, "vae")
    pixels, latents = noise(2, 3, 48, 16).clamp(-1, 1), noise(2, pair.config.vae.latent_channels, 3, 5)
    expected, scale = theirs.encode(pixels).latent_dist, pair.config.vae.scaling_factor
    for ours, truth in ((vae.encode(pixels)[0], expected.mean * scale), (vae.encode(pixels)[1], expected.std * scale),
                        (vae.decode(latents), theirs.decode(latents / scale).sample)):
        assert error(ours, truth) < 1e-4


def batch_for(pair: Pair) -> list[Examples]:
    """Two examples of each of two sets of pictures."""
    sets = [Latents(noise(3, pair.config.unet.in_channels, 8, 8).cpu() + i, torch.full((3, 1, 1, 1), 0.1))
            for i in range(2)]
    sets = [Latents(known.mean, known.std.expand_as(known.mean)) for known in sets]
    return [examples.to(DEVICE) for examples in random_batch(sets, [2, 2], 1000, seed=0, step=0)]


def reference_losses(pair: Pair, batch: list[Examples], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The losses as diffusers and transformers compute them under autocast, and the gradient in one vector."""
    text_encoder, unet = reference(pair, "text_encoder"), reference(pair, "unet")
    ids = pair.sd.tokenizer.encode(PROMPTS).to(DEVICE).repeat_interleave(2, dim=0)
    latents, noise, timesteps = (torch.cat([getattr(examples, name) for examples in batch])
                                 for name in ("latents", "noise", "timesteps"))
    noisy = pair.sd.schedule.add_noise(latents, noise, timesteps)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        prediction = unet(noisy, timesteps, text_encoder(ids)[0]).sample
    target = pair.sd.schedule.target(latents, noise, timesteps)
    losses = F.mse_loss(prediction.float(), target, reduction="none").unflatten(0, (2, 2)).mean(dim=(1, 2, 3, 4))
    (1000 * losses.sum()).backward()  # a scale, for fp16
    named = {f"text_encoder.{prefixed(name)}": p for name, p in text_encoder.named_parameters()}
    named |= {f"unet.{name}": p for name, p in unet.named_parameters()}
    return losses.detach(), torch.cat([named[name].grad.flatten() for name in sorted(named)])


@PRECISIONS
def test_loss_and_gradients(pair, dtype):
    """Those of a training step, under autocast."""
    batch = batch_for(pair)
    model = train.DreamBoothLoss(tinydb.load(pair.folder, DEVICE), [[prompt] * 3 for prompt in PROMPTS], False)
    model.to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        losses = model(batch)
    (1000 * losses.sum()).backward()
    named = dict(model.named_parameters())
    ours = torch.cat([named[name].grad.flatten() for name in sorted(named)])
    exact_losses, exact = reference_losses(pair, batch, torch.float32)
    _, theirs = reference_losses(pair, batch, dtype)
    assert_as_exact(ours, theirs, exact)
    torch.testing.assert_close(losses, exact_losses, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@torch.inference_mode()
def test_attention_of_sd21_in_fp16(autocast):
    """Its products overflow float16, so it computes them in float32."""
    attention = Attention(64, 64, heads=1, qkv_bias=False, upcast=True).to(DEVICE)
    for layer in (attention.to_q, attention.to_k):
        layer.weight.copy_(40 * torch.eye(64))
    x = 2 * noise(2, 32, 64)
    exact = attention(x)
    assert (40 * x).square().sum(-1).max() > 65504
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        low = attention(x) if autocast else attention.half()(x.half())
    assert error(low, exact) < 0.01


@PRECISIONS
def test_pictures(pairs, dtype):
    """The device draws what the CPU draws in float32: the same in float32, alike in low precision."""
    settings = {"steps": 5, "guidance_scale": 4.0, "sampler": "dpm"}
    expected = pairs("tiny").sd.generate(PROMPTS, **settings)
    images = tinydb.load(pairs("tiny").folder, DEVICE, dtype).generate(PROMPTS, **settings)
    assert difference(images, expected) <= (2 if dtype == torch.float32 else 40)


# ----------------------------------------------------------------------------------------------- whole runs

COMBINATIONS = [
    {"precision": "fp32", "recompute": True},
    {"precision": "bf16", "freeze_text": True, "accumulate": 2},
    {"precision": "fp16", "recompute": True, "accumulate": 2, "sample_every": 2},
    {"precision": "bf16", "lora": 4, "recompute": True, "accumulate": 2},
    {"precision": "fp16", "lora": 4, "freeze_text": True, "prior_weight": 0.0},
    {"precision": "bf16", "offload": True, "recompute": True, "accumulate": 2},
    {"precision": "fp16", "offload": True, "freeze_text": True},
]
COMBINATIONS = COMBINATIONS if ON_GPU else COMBINATIONS[3:4]  # test_resume.py has more of them on the CPU


@pytest.fixture
def teach_here(teach, photos) -> Callable[..., Path]:
    """train.py on the device, with class images that are the same on all of them."""
    def run(out: Path, **settings: object) -> Path:
        given = {"device": DEVICE.type, "class_dir": str(photos), "class_images": 3, "save_every": 2, "steps": 4}
        return teach(out, **{**given, **settings})
    return run


def result(out: Path) -> Tensor:
    """All that a run has made, in one vector."""
    paths = [out / "lora.safetensors"] if (out / "lora.safetensors").exists() else [out / "model" / UNET,
                                                                                    out / "model" / TEXT]
    return torch.cat([tensor.flatten().float() for path in paths for _, tensor in sorted(load_file(path).items())])


@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda flags: "-".join(map(str, flags.values())))
def test_flags(teach_here, tmp_path, flags):
    """Every combination trains, as in float32 on the CPU; and a run that is resumed ends like one that was not: in the
    same bytes on a CPU, and but for rounding on a GPU, whose sums have no fixed order."""
    whole = teach_here(tmp_path / "whole", **flags)
    teach_here(tmp_path / "out", **{**flags, "steps": 2})
    resumed = teach_here(tmp_path / "out", **flags, resume=True)
    teach_here(tmp_path / "cpu", **{**flags, "precision": "fp32", "device": "cpu", "steps": 1})
    expected = metrics(tmp_path / "cpu")[0]["instance_loss"]
    rounding = ROUNDING[flags["precision"]]
    assert metrics(whole)[0]["instance_loss"] == pytest.approx(expected, rel=rounding)
    if ON_GPU:
        assert error(result(resumed), result(whole)) < 1e-3
    else:
        assert torch.equal(result(resumed), result(whole))


def test_class_images_are_drawn_with_the_large_model_out_of_the_way(teach, tmp_path, monkeypatch):
    """Both would not fit on a small GPU."""
    moves, move = [], tinydb.StableDiffusion.to
    monkeypatch.setattr(tinydb.StableDiffusion, "to",
                        lambda sd, device: moves.append((sd.dtype, torch.device(device).type)) or move(sd, device))
    teach(tmp_path / "out", device=DEVICE.type, precision="bf16", steps=1, save_every=0)
    assert moves == [(torch.float32, DEVICE.type), (torch.float32, "cpu"), (torch.bfloat16, DEVICE.type),
                     (torch.float32, DEVICE.type)]


def test_two_devices_are_one_with_twice_the_batch(nano, photos, tmp_path):
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = {"images": photos, "class_noun": "dog", "weights": nano, "device": DEVICE.type, "class_dir": photos,
             "class_images": 3, "steps": 1, "save_every": 1, "precision": "fp32"}
    succeed(start_ranks(2, tmp_path / "log", *arguments(**given, batch=1, accumulate=2, out=tmp_path / "two")))
    succeed([start(tmp_path / "log", "train.py", *arguments(**given, batch=4, out=tmp_path / "one"))])
    # a GPU's processes use TF32, as users' do; half of the batch would be off by more than a tenth
    assert error(gradient(tmp_path / "two"), gradient(tmp_path / "one")) < (5e-3 if ON_GPU else 1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compile(teach_here, tmp_path, precision):
    plain, compiled = (teach_here(tmp_path / str(flag), compile=flag, precision=precision, steps=2)
                       for flag in (False, True))
    for ours, expected in zip(metrics(compiled), metrics(plain)):
        assert ours["instance_loss"] == pytest.approx(expected["instance_loss"], rel=ROUNDING[precision])


# ---------------------------------------------------------------------------------------------- never waiting


@pytest.mark.parametrize("flags", [{}, {"accumulate": 2, "precision": "bf16"}], ids=["plain", "accumulate"])
def test_a_step_waits_for_the_gpu_once(nano, photos, tmp_path, monkeypatch, flags):
    """When all of it is queued. On a CPU, what would wait there is counted."""
    order, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: order.append("waits") or tolist(tensor))
    hook = register_optimizer_step_post_hook(lambda *_: order.append("queued"))
    watch = benchmark.watched(images=str(photos), class_noun="dog", weights=str(nano), device=DEVICE.type, steps=4,
                              save_every=0, class_dir=str(photos), class_images=3, out=str(tmp_path / "out"), **flags)
    hook.remove()
    assert watch.waits[1:-1] == [1, 1]  # the first step makes the moments, the last one checks the result
    assert order[-5:] == ["queued", "waits", "queued", "waits", "waits"]


def test_batch_arrives_whole(pairs):
    """Also a part of it, which does not lie in one piece."""
    for examples in batch_for(pairs("nano")):
        host = Examples(*(getattr(examples, f.name).cpu() for f in fields(examples)))
        part = host.part(1, 2).to(DEVICE)
        for name in ("latents", "noise", "timesteps"):
            assert torch.equal(getattr(part, name).cpu(), getattr(host, name)[1:])


def test_several_processes_on_mps_are_refused(nano, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "choose_device", torch.device)
    settings = train.Settings(images=str(photos), class_noun="dog", weights=str(nano), device="mps", out=str(tmp_path))
    assert "2 processes" in refusal(train.main, settings)

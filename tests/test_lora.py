"""Low-rank updates: the mathematics, the files that other programs read and write, and training by train.py."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (UNET, Pair, difference, edit_json, edit_tensors, files, loss_on_fixed_noise, metrics, names,
                      refusal)
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert_weights
import sample
import tinydb
import train
from convert_weights import SD1
from tinydb import run
from tinydb.cli import Parser
from tinydb.clip import CLIPTextModel
from tinydb.config import InputError, ModelInfo
from tinydb.data import Latents, random_batch, read_pictures
from tinydb.lora import attach
from tinydb.lora_files import name_in_file, read_lora, save_lora
from tinydb.pipeline import StableDiffusion

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def random_updates(sd: StableDiffusion, rank: int = 3, alpha: float = 2.0, convolutions: bool = True) -> nn.ModuleDict:
    """Updates of every layer that change what the model draws."""
    generator = torch.Generator().manual_seed(7)
    parts = attach({"unet": sd.unet, "text_encoder": sd.text_encoder}, rank, convolutions, seed=7)
    updates = nn.ModuleDict({**parts["unet"], **parts["text_encoder"]})
    for update in updates.values():
        nn.init.normal_(update.lora_up.weight, std=0.1, generator=generator)
        update.alpha.fill_(alpha)
    return updates


@pytest.fixture
def lora_of(tmp_path) -> Callable[..., Path]:
    """lora_of(pair, **options): a LoRA file for a model."""
    def make(pair: Pair, name: str = "some.safetensors", **options: float) -> Path:
        updates = random_updates(tinydb.load(pair.folder), **options)
        save_lora(updates, tmp_path / name, ModelInfo("zwx", "cat", 5, {"name": "a base"}))
        return tmp_path / name
    return make


def weights_of(sd: StableDiffusion) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part in ("unet", "text_encoder")
            for name, tensor in getattr(sd, part).state_dict().items()}


def merged(folder: Path, *loras: tuple[Path, float]) -> StableDiffusion:
    sd = tinydb.load(folder)
    for file, scale in loras:
        sd.add_lora(file, scale)
    return sd


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ the mathematics


def test_beside_the_weight_as_in_it(pair, tmp_path):
    """W x + B A x while it is trained is (W + B A) x when it is drawn with."""
    beside, inputs = tinydb.load(pair.folder), ["a photo of ohwx dog"]
    updates = random_updates(beside, rank=3, alpha=3.0)
    keys = beside.unet.state_dict().keys()
    save_lora(updates, tmp_path / "some.safetensors", ModelInfo())
    within = merged(pair.folder, (tmp_path / "some.safetensors", 1.0))
    assert keys == within.unet.state_dict().keys()  # a base with updates is saved and loaded as ever
    channels = pair.config.unet.in_channels
    latents, timesteps = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        ours, expected, base = (sd.unet(latents, timesteps, sd.encode_prompt(inputs))
                                for sd in (beside, within, tinydb.load(pair.folder)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


def test_several_add_up_and_are_scaled(pairs, lora_of):
    pair = pairs("sd1")
    base, one = weights_of(tinydb.load(pair.folder)), lora_of(pair)
    other = lora_of(pair, "other.safetensors", rank=2, alpha=1.0)
    both, *each = (weights_of(merged(pair.folder, *loras)) for loras in (
        [(one, 0.8), (other, -0.5)], [(one, 1.0)], [(other, 1.0)]))
    assert_close(both, {name: weight + 0.8 * (each[0][name] - weight) - 0.5 * (each[1][name] - weight)
                        for name, weight in base.items()})
    changed = [name for name in base if not torch.equal(base[name], both[name])]
    assert len(changed) == len(load_file(one)) / 3  # a down, an up and an alpha for each


def test_model_takes_over_what_the_file_was_taught(pairs, lora_of):
    info = merged(pairs("sd1").folder, (lora_of(pairs("sd1")), 1.0)).info
    assert (info.identifier, info.class_noun) == ("zwx", "cat")


def test_a_step_is_that_of_a_plain_loop(teach, nano, photos, tmp_path):
    """AdamW, on the clipped gradient: A, whose gradient is 0 as long as B is, only decays."""
    out = teach(tmp_path / "out", lora=2, lr=1e-2, lr_text=5e-3, steps=1, prior_weight=9.0, save_every=1, batch=3,
                class_dir=str(photos), class_images=3)
    sd = tinydb.load(nano)
    parts = attach({"unet": sd.unet, "text_encoder": sd.text_encoder}, 2, False, seed=0)
    updates = nn.ModuleDict({**parts["unet"], **parts["text_encoder"]})
    model = train.DreamBoothLoss(sd, [["a photo of ohwx dog"] * 3, ["a photo of a dog"] * 3], False, updates)
    latents = Latents.of(read_pictures(photos, 16)[0].values(), sd.vae, sd.device)
    losses = model(random_batch([latents, latents], [3, 3], 1000, seed=0, step=0))
    (losses[0] + 9 * losses[1]).backward()
    assert nn.utils.clip_grad_norm_(updates.parameters(), 1.0) > 1  # so that the clipping shows
    optimizer = torch.optim.AdamW([{"params": list(parts["unet"].parameters()), "lr": 1e-2},
                                   {"params": list(parts["text_encoder"].parameters()), "lr": 5e-3}], weight_decay=0.01)
    optimizer.step()
    ours = load_file(out / "lora.safetensors")
    for name, tensor in updates.state_dict().items():
        if "lora_down" in name:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)
    moments = load_file(out / "checkpoints" / "step-000001" / "state.exp_avg.safetensors")
    for name, p in updates.named_parameters():
        torch.testing.assert_close(moments[f"exp_avg.lora.{name}"], optimizer.state[p]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_training_starts_from_the_model_as_it_is(teach, tmp_path):
    plain, updated = (teach(tmp_path / f"{rank}", lora=rank, steps=1, save_every=0) for rank in (0, 2))
    assert metrics(updated)[0] == pytest.approx(metrics(plain)[0], rel=1e-5)


def test_updates_begin_alike_for_every_kernel_and_not_for_every_seed(pairs):
    first, second = (attach({"unet": tinydb.load(pairs("sd1").folder).unet}, 4, True, seed)["unet"] for seed in (0, 1))
    assert not any(torch.equal(first[name].lora_down.weight, second[name].lora_down.weight) for name in first)
    sizes = [update.lora_down.weight.flatten(1).norm(dim=1).mean() / update.lora_down.weight.shape[1] ** 0.5
             for update in first.values()]
    assert max(sizes) < 1.5 * min(sizes)


# ------------------------------------------------------------------------------------ files of other programs


@pytest.mark.parametrize("scale, convolutions", [(1.0, False), (0.6, False), (1.0, True)])
def test_diffusers_draws_the_same_picture(pair, lora_of, scale, convolutions):
    file = lora_of(pair, convolutions=convolutions)
    pipeline = StableDiffusionPipeline.from_pretrained(pair.folder)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, pair.config.unet.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"guidance_scale": 3.0, "latents": latents}
    theirs = {"num_inference_steps": 5, "cross_attention_kwargs": {"scale": scale}, **settings}
    plain = pipeline("a photo of ohwx dog", num_inference_steps=5, **settings).images
    pipeline.load_lora_weights(file)
    expected = pipeline("a photo of ohwx dog", **theirs).images
    images = merged(pair.folder, (file, scale)).generate("a photo of ohwx dog", steps=5, **settings)
    assert difference(images, expected) <= 2 and difference(images, plain) > 10


def kohya_names(model: nn.Module, prefix: str, blocks: tuple[str, ...],
                kernel: int = 1) -> dict[str, tuple[int, ...]]:
    """The layers that kohya's trainer adapts in diffusers' or transformers' own models (networks/lora.py): linear
    layers and convolutions of that kernel in modules of these classes; the names are also those of ComfyUI
    (comfy/lora.py)."""
    found = {}
    for name, block in model.named_modules():
        if type(block).__name__ in blocks:
            for child_name, child in block.named_modules():
                is_convolution = isinstance(child, nn.Conv2d) and child.kernel_size == (kernel, kernel)
                if isinstance(child, nn.Linear) or is_convolution:
                    found[f"{prefix}.{name}.{child_name}".replace(".", "_")] = child.weight.shape
    return found


@pytest.mark.parametrize("kind", ["sd1", "sd2", "tiny"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_names_and_shapes_are_those_of_kohya(pairs, lora_of, kind, convolutions):
    reference = pairs(kind).reference
    expected = kohya_names(reference.unet, "lora_unet", ("Transformer2DModel",))
    if convolutions:  # of the residual blocks where there are no transformers; kohya's conv_dim has all of them
        blocks = kohya_names(reference.unet, "lora_unet", ("DownBlock2D", "UpBlock2D"), 3)
        expected |= {name: shape for name, shape in blocks.items() if name.endswith(("_conv1", "_conv2"))}
    text = kohya_names(reference.text_encoder, "lora_te", ("CLIPAttention", "CLIPMLP"))
    expected |= {name.replace("lora_te_encoder", "lora_te_text_model_encoder"): shape for name, shape in text.items()}
    tensors = load_file(lora_of(pairs(kind), rank=3, alpha=3.0, convolutions=convolutions))
    assert {name.split(".")[0] for name in tensors} == expected.keys()
    for name, (out_channels, in_channels, *kernel) in expected.items():
        assert tensors[f"{name}.lora_down.weight"].shape == (3, in_channels, *kernel)
        assert tensors[f"{name}.lora_up.weight"].shape == (out_channels, 3, *(1 for _ in kernel))
        assert tensors[f"{name}.alpha"].item() == 3 and tensors[f"{name}.alpha"].shape == ()
    assert len(tensors) == 3 * len(expected)


def test_layers_of_stable_diffusion_1():
    """192 of the UNet and 72 of the text encoder, as kohya counts them."""
    with torch.device("meta"):
        unet, text_encoder = tinydb.pipeline.UNet2DConditionModel(SD1.unet), CLIPTextModel(SD1.text_encoder)
        reference = UNet2DConditionModel.from_config(SD1.unet.to_dict())
    ours = tinydb.lora.adapted_layers("unet", unet, False)
    assert ours.keys() == kohya_names(reference, "lora_unet", ("Transformer2DModel",)).keys() and len(ours) == 192
    assert len(tinydb.lora.adapted_layers("text_encoder", text_encoder, True)) == 72


def of_diffusers(form: str, tensors: dict[str, Tensor], sd: StableDiffusion) -> dict[str, Tensor]:
    """A file of ours, with alpha as r, under the names of diffusers."""
    paths = {name_in_file(part, name): f"{part}.{name}" for part in ("unet", "text_encoder")
             for name, _ in getattr(sd, part).named_modules()}
    renamed = {}
    for name, tensor in tensors.items():
        layer, kind = name.split(".", 1)
        path, is_up = paths[layer], "up" in kind
        if kind == "alpha":
            continue
        if form == "peft":
            new = f"{path}.lora_{'B' if is_up else 'A'}.weight"
        elif form == "transformers 5":
            new = f"{path.replace('text_encoder.text_model', 'text_encoder')}.lora_{'B' if is_up else 'A'}.weight"
        elif form == "oldest" and path.endswith("_proj"):
            oldest = path.removesuffix("_proj").replace("self_attn.", "self_attn.to_")
            new = f"{oldest}_lora.{'up' if is_up else 'down'}.weight"
        elif form in ("processor", "oldest") and ".attn" in path:
            module, _, last = path.removesuffix(".0").rpartition(".")
            new = f"{module}.processor.{last}_lora.{'up' if is_up else 'down'}.weight"
        else:
            middle = "lora" if path.startswith("unet") else "lora_linear_layer"
            new = f"{path}.{middle}.{'up' if is_up else 'down'}.weight"
        renamed[new] = tensor
    return renamed


@pytest.mark.parametrize("form", ["no alpha", "peft", "transformers 5", "processor", "older", "oldest"])
def test_other_forms_mean_the_same(pairs, lora_of, tmp_path, form):
    pair = pairs("sd1")
    file = lora_of(pair, rank=2, alpha=2.0)
    tensors = load_file(file)
    if form == "no alpha":
        other = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    else:
        other = of_diffusers(form, tensors, pair.sd)
    save_file(other, tmp_path / "other.safetensors")
    ours, theirs = (weights_of(merged(pair.folder, (path, 1.0))) for path in (file, tmp_path / "other.safetensors"))
    assert_close(ours, theirs)


def test_alpha_of_diffusers_is_in_its_metadata(pairs, lora_of, tmp_path):
    pair = pairs("sd1")
    file = lora_of(pair, rank=2, alpha=2.0)
    tensors = load_file(file)
    note = json.dumps({"unet.lora_alpha": 4, "text_encoder.lora_alpha": 6, "unet.r": 2})
    save_file(of_diffusers("peft", tensors, pair.sd), tmp_path / "other.safetensors",
              metadata={"lora_adapter_metadata": note})
    save_file({name: (4.0 if "unet" in name else 6.0) + 0 * tensor if name.endswith(".alpha") else tensor
               for name, tensor in tensors.items()}, tmp_path / "same.safetensors")
    ours, theirs = (weights_of(merged(pair.folder, (tmp_path / f"{n}.safetensors", 1.0))) for n in ("same", "other"))
    assert_close(ours, theirs)


@pytest.mark.parametrize("note", [{"unet.alpha_pattern": {"to_q": 8}}, {"text_encoder.use_rslora": True}])
def test_other_scales_in_the_metadata_are_refused(pairs, lora_of, tmp_path, note):
    """They were silently left out."""
    file = tmp_path / "other.safetensors"
    save_file(load_file(lora_of(pairs("sd1"))), file, metadata={"lora_adapter_metadata": json.dumps(note)})
    assert [*note][0].partition(".")[2] in refusal(read_lora, file)


def test_file_without_an_update(pairs, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert "no update" in refusal(tinydb.load(pairs("sd1").folder).add_lora, tmp_path / "empty.safetensors")


def test_convolutions_with_a_kernel(pairs, tmp_path):
    """kohya's "conv_dim", and diffusers' too: A has the kernel, B is 1x1."""
    pair, name = pairs("sd1"), "lora_unet_down_blocks_0_resnets_0_conv1"
    before = pair.sd.unet.down_blocks[0].resnets[0].conv1.weight
    down, up = torch.randn(2, before.shape[1], 3, 3), torch.randn(before.shape[0], 2, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "conv.safetensors")
    after = merged(pair.folder, (tmp_path / "conv.safetensors", 1.0)).unet.down_blocks[0].resnets[0].conv1.weight
    torch.testing.assert_close(after - before, torch.einsum("orab,rihw->oihw", up, down), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tensors, words", [
    ({f"{LAYER}.hada_w1_a": (2, 2)}, "LyCORIS"),
    ({f"{LAYER}.lokr_w1": (2, 2)}, "LyCORIS"),
    ({f"{LAYER}.dora_scale": (64, 1)}, "DoRA"),
    ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 32)}, "SDXL"),
    ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (2, 32)}, "SDXL"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 32)}, "Flux"),
    ({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": (2, 32)}, "Flux"),
    ({"unet.conv_in.weight": (2, 2)}, "unet.conv_in.weight is no tensor of a LoRA"),
    ({"lora_unet_nowhere.lora_down.weight": (2, 64), "lora_unet_nowhere.lora_up.weight": (64, 2)}, "no layer"),
    ({f"{LAYER}.lora_down.weight": (2, 64)}, "lacks"),
    ({f"{LAYER}.lora_down.weight": (2, 96), f"{LAYER}.lora_up.weight": (64, 2)}, "(64, 64)"),
    ({f"{LAYER}.lora_down.weight": (2, 64), f"{LAYER}.lora_up.weight": (64, 3)}, "(64, 64)"),
    ({f"{LAYER}.lora_down.weight": (64,), f"{LAYER}.lora_up.weight": ()}, "(64, 64)"),
    ({f"{LAYER}.lora_down.weight": (), f"{LAYER}.lora_up.weight": (64,)}, "(64, 64)"),
    ({f"{LAYER}.lora_down.weight": (0, 64), f"{LAYER}.lora_up.weight": (64, 0)}, "(64, 64)"),
    ({f"{LAYER}.lora_down.weight": (2, 64), f"{LAYER}.lora_up.weight": (64, 2), f"{LAYER}.alpha": (2,)}, "(64, 64)"),
], ids=str)
def test_file_that_does_not_fit_is_refused_by_name(pairs, tmp_path, tensors, words):
    """And changes nothing."""
    file, sd = tmp_path / "other.safetensors", tinydb.load(pairs("sd1").folder)
    fitting = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{kind}.weight": torch.ones(shape)
               for kind, shape in (("down", (1, 64, 1, 1)), ("up", (64, 1, 1, 1)))}
    save_file(fitting | {name: torch.ones(shape) for name, shape in tensors.items()}, file)
    text = refusal(sd.add_lora, file)
    assert words in text and str(file) in text
    for name, weight in weights_of(sd).items():
        assert torch.equal(weight, weights_of(pairs("sd1").sd)[name])


@pytest.mark.parametrize("note", [{"class": 5}, {"class": "cat", "identifier": ["zwx"]}], ids=str)
def test_file_that_was_taught_no_word_is_refused_by_name(pairs, lora_of, tmp_path, note):
    """And changes nothing."""
    file, sd = tmp_path / "other.safetensors", tinydb.load(pairs("sd1").folder)
    save_file(load_file(lora_of(pairs("sd1"))), file, metadata={"tinydb": json.dumps(note)})
    assert f"{file}: {[*note][-1]} {[*note.values()][-1]!r} in its metadata" in refusal(sd.add_lora, file)
    assert sd.info == pairs("sd1").sd.info
    for name, weight in weights_of(sd).items():
        assert torch.equal(weight, weights_of(pairs("sd1").sd)[name])


def test_file_in_fp8(pairs, lora_of, tmp_path):
    file = lora_of(pairs("sd1"))
    low = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(low, tmp_path / "low.safetensors")
    save_file({name: tensor.float() for name, tensor in low.items()}, tmp_path / "same.safetensors")
    (ours, _), (expected, _) = (read_lora(tmp_path / f"{name}.safetensors") for name in ("low", "same"))
    assert ours.keys() == expected.keys()
    for name, update in expected.items():
        assert all(torch.equal(ours[name][kind], tensor) for kind, tensor in update.items())


def test_damaged_file(pairs, lora_of, tmp_path):
    sd, file = tinydb.load(pairs("sd1").folder), lora_of(pairs("sd1"))
    tensors = load_file(file)
    tensors[f"{LAYER}.lora_up.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert f"{LAYER}.lora_up.weight holds NaN" in refusal(sd.add_lora, tmp_path / "nan.safetensors")
    save_file(load_file(file), tmp_path / "note.safetensors", metadata={"tinydb": "[" * 10**5})
    assert "metadata tinydb" in refusal(sd.add_lora, tmp_path / "note.safetensors")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:-100])
    assert "not a whole safetensors file" in refusal(sd.add_lora, tmp_path / "half.safetensors")
    assert "no such file" in refusal(sd.add_lora, tmp_path / "nowhere.safetensors")
    (tmp_path / "old.bin").write_bytes(b"a pickle")
    assert "a pickle; expected a .safetensors file" in refusal(sd.add_lora, tmp_path / "old.bin")
    save_file({"base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1, 4)},
              tmp_path / "adapter.safetensors")
    assert "in PEFT's own form" in refusal(sd.add_lora, tmp_path / "adapter.safetensors")


# ------------------------------------------------------------------------------------------------ training


def test_what_a_run_writes(teach, nano, tmp_path, capsys):
    """A small file, and no model; it says what it was taught and what it belongs to, and the command how to use it."""
    out = teach(tmp_path / "out", lora=2, lr=1e-2, steps=2, sample_every=1)
    assert "lora.safetensors" in names(out) and "model" not in names(out)
    assert names(out / "checkpoints" / "step-000002") == [
        "lora.safetensors", "state.exp_avg.safetensors", "state.exp_avg_sq.safetensors", "state.json",
        "state.step.safetensors"]
    assert files(out / "checkpoints" / "step-000002")["lora.safetensors"] == files(out)["lora.safetensors"]
    command = f"python sample.py '[V] dog on the moon' --weights {out}"
    assert command in capsys.readouterr().out
    assert "Step 2 of 2, finished" in (out / "report.html").read_text()
    assert read_lora(out / "lora.safetensors")[1] == {
        "identifier": "ohwx", "class": "dog", "step": 2, "base": {"name": nano.name, "license": "that of this model"}}
    sd = merged(nano, (out / "lora.safetensors", 1.0))
    base = weights_of(tinydb.load(nano))
    moved = {name for name, weight in weights_of(sd).items() if not torch.equal(weight, base[name])}
    assert {name.partition(".")[0] for name in moved} == {"unet", "text_encoder"}
    assert len(moved) == len(load_file(out / "lora.safetensors")) / 3


@pytest.mark.parametrize("convolutions", [False, True])
def test_disk_for_updates_is_that_of_updates(pairs, monkeypatch, tmp_path, convolutions):
    """The updates and their moments, and nothing of the model."""
    sd, asked = tinydb.load(pairs("sd1").folder), []
    monkeypatch.setattr(tinydb.run, "check_free_disk", lambda path, needed, cure: asked.append(needed))
    for steps in (1, 9):
        run.Run(tmp_path / "out").check_disk(sd, train.Settings(lora=3, lora_conv=convolutions, steps=steps,
                                                                 save_every=1, keep=1))
    numbers = sum(p.numel() for p in random_updates(sd, rank=3, convolutions=convolutions).parameters())
    # the checkpoints that are there at once, and the result
    assert asked == [4 * numbers * (3 * checkpoints + 1) for checkpoints in (2, 3)]


def test_frozen_prior_is_the_model_without_its_updates(pair):
    """It takes no second model: the prediction before training is that of the same layers, without what they learn."""
    sd, before = tinydb.load(pair.folder), tinydb.load(pair.folder)
    updates, prompts = random_updates(sd), [["a photo of ohwx dog"] * 2, ["a photo of a dog", "a red dog"]]
    latents = torch.randn(2, sd.unet.config.in_channels, 8, 8)
    batch = random_batch([Latents(latents, 0.1 * torch.ones_like(latents))] * 2, [2, 2], 1000, seed=0, step=0)
    frozen = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder})
    ours = train.DreamBoothLoss(sd, prompts, False, updates, frozen)(batch)
    second = nn.ModuleDict({"unet": before.unet, "text_encoder": before.text_encoder})
    torch.testing.assert_close(ours, train.DreamBoothLoss(sd, prompts, False, updates, second)(batch))
    ours.sum().backward()
    assert all(parameter.grad is not None for parameter in updates.parameters())


def test_what_is_learnt_is_what_the_file_adds(teach, nano, tmp_path):
    """The loss at step 4, which the run measures before it learns from it, is that of the base with the file of step 3
    added to it."""
    out = teach(tmp_path / "out", lora=2, lr=1e-2, steps=4, save_every=3)
    merged(nano, (out / "checkpoints" / "step-000003" / "lora.safetensors", 1.0)).save(tmp_path / "merged")
    seen = teach(tmp_path / "seen", weights=str(tmp_path / "merged"), lr=1e-30, steps=4,
                 class_dir=str(next((out / "class_images").iterdir())))
    for name in ("instance_loss", "prior_loss"):
        assert metrics(seen)[3][name] == pytest.approx(metrics(out)[3][name], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "fp16"}], ids=str)
def test_loss_falls(teach, nano, tmp_path, settings):
    out = teach(tmp_path / "out", lora=4, lr=1e-2, steps=20, save_every=10, **settings)
    losses = [loss_on_fixed_noise(merged(nano, (path / "lora.safetensors", 1.0)), out)
              for path in sorted((out / "checkpoints").iterdir())]
    assert losses == sorted(losses, reverse=True)
    tensors = load_file(out / "lora.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_frozen_text_encoder_gets_no_updates(teach, tmp_path):
    out = teach(tmp_path / "out", lora=1, freeze_text=True, steps=1)
    assert all(name.startswith("lora_unet_") for name in load_file(out / "lora.safetensors"))


# ------------------------------------------------------------------------------------------------ drawing


@pytest.fixture
def drawn(nano, tmp_path, one_thread, monkeypatch) -> Callable[..., str]:
    """drawn(**settings): what the picture says of itself that sample.py draws in tmp_path."""
    def draw(**settings) -> Path:
        given = {"device": "cpu", "count": 1, "steps": 2, "out": str(tmp_path / "picture.png"), **settings}
        sample.main(sample.Settings(prompt=["[V] dog"], **given))
        return tmp_path / "picture.png"

    monkeypatch.chdir(tmp_path)
    return draw


def test_sample_finds_a_run_as_it_finds_a_model(teach, nano, drawn, tmp_path, capsys):
    """The newest, the OUT of one, a checkpoint of one; a file alone belongs to the model that its run began with."""
    out = teach(tmp_path / "runs" / "dog,cat", lora=2, lr=1e-2, steps=2, save_every=1)  # a comma is part of its name
    file = out / "lora.safetensors"
    expected = merged(nano, (file, 1.0)).generate("[V] dog", steps=2)
    for settings in ({}, {"weights": str(out)}, {"lora": str(file)}, {"lora": "runs/dog,cat/lora.safetensors"},
                     {"weights": str(nano), "lora": str(file)}, {"weights": str(out / "checkpoints" / "step-000002")}):
        assert difference([Image.open(drawn(**settings))], expected) == 0, settings
    assert difference([Image.open(drawn(weights=str(out), lora=str(file)))], expected) == 0  # added once, not twice
    picture = drawn().rename(tmp_path / "by-the-end.png")
    earlier = out / "checkpoints" / "step-000001"
    expected = merged(nano, (earlier / "lora.safetensors", 1.0)).generate("[V] dog", steps=2)
    assert difference([Image.open(drawn(lora=str(earlier / "lora.safetensors")))], expected) == 0
    given = sample.Settings(prompt=[], source=str(picture), weights=str(earlier))  # the same picture by another model
    assert not {"lora", "lora_scale"} & sample.settings_in_picture(given).keys()
    assert re.search("not taken over: Lora .+, Lora scale 1.0", capsys.readouterr().err)


def learnt(folder: Path, weights: object, base: dict[str, str] = {"name": "a base"}) -> Path:
    """The LoRA file of a run that began with `weights`, whose model says that it is `base`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"weights": str(weights)}))
    (folder / "metrics.jsonl").touch()
    save_lora(nn.ModuleDict(), folder / "lora.safetensors", ModelInfo("zwx", "dog", 5, base))
    return folder / "lora.safetensors"


def with_model(**settings) -> sample.Settings:
    """The settings with the model that sample.py takes for them."""
    return sample.with_model(sample.Settings(prompt=["[V] dog"], **settings))


@pytest.mark.parametrize("place, is_box, found", [
    ("weights/tiny", True, True), ("weights/tiny", False, False), ("runs/rex/model", True, False)])
def test_run_in_the_box_that_was_moved_finds_the_box(tmp_path, place, is_box, found):
    """Its config.json names the place where the clone was; a model elsewhere has to be given, with the file."""
    base = ModelInfo.read(sample.TINY / "tinydb.json").base if is_box else {"name": "a base"}
    file = learnt(tmp_path / "run", tmp_path / "gone" / place, base)
    for given in ({"weights": str(file.parent)}, {"lora": str(file)}):
        if found:
            assert with_model(**given).weights == str(sample.TINY)
        else:
            cure = f"gone/{place}, which is not there any more; give --weights MODEL --lora {file}"
            assert cure in refusal(with_model, **given)


def test_model_with_a_lora_file_beside_it_is_still_the_model(nano, tmp_path):
    folder = Path(shutil.copytree(nano, tmp_path / "model"))
    save_lora(nn.ModuleDict(), folder / "lora.safetensors", ModelInfo())
    settings = with_model(weights=str(folder))
    assert (settings.weights, settings.lora) == (str(folder), None)


@pytest.mark.parametrize("spelled", ["run/lora.safetensors", "./run/lora.safetensors", "other/../run/lora.safetensors",
                                     "{here}/run/lora.safetensors"])
def test_own_file_of_a_run_is_added_once(nano, tmp_path, monkeypatch, spelled):
    """However it is spelled; others are added too."""
    monkeypatch.chdir(tmp_path)
    other = learnt(tmp_path / "other", nano)
    learnt(tmp_path / "run", nano)
    given = f"{spelled.format(here=tmp_path)},{other}"
    settings = with_model(weights="run", lora=given)
    assert [Path(file).resolve() for file in settings.loras] == [tmp_path / "run" / "lora.safetensors", other]
    assert settings.weights == str(nano)


def test_any_of_several_files_gives_the_model(nano, tmp_path):
    """In whatever order; files whose models differ need one that is given."""
    mine, same, other = (learnt(tmp_path / name, base) for name, base in (
        ("mine", nano), ("same", nano), ("other", tmp_path)))
    save_lora(nn.ModuleDict(), tmp_path / "style.safetensors", ModelInfo())
    edit_json(tmp_path / "same" / "config.json", weights=f"{nano.parent}/../{nano.parent.name}/{nano.name}")  # the same
    for files in ([mine, "style.safetensors"], ["style.safetensors", mine], [mine, same]):
        lora = ",".join(str(tmp_path / file) for file in files)
        assert (found := with_model(lora=lora)).weights == str(nano) and found.lora == lora
    style = str(tmp_path / "style.safetensors")
    assert with_model(weights=str(mine.parent), lora=style).weights == str(nano)
    both = f"{mine},{other}"
    text = refusal(with_model, lora=both)
    assert "different models" in text and f"give --weights MODEL --lora {both}" in text
    assert "different models" in refusal(with_model, weights=str(mine.parent), lora=str(other))
    assert with_model(weights=str(nano), lora=both).weights == str(nano)


def test_several_files_with_a_scale_and_the_picture_says_so(pairs, nano, drawn, tmp_path):
    files = []
    for i in (1, 2):
        updates = random_updates(tinydb.load(nano), rank=i)
        save_lora(updates, tmp_path / f"{i}.safetensors", ModelInfo("zwx", "dog"))
        files.append(tmp_path / f"{i}.safetensors")
    both = ", ".join(map(str, files))
    picture = drawn(weights=str(nano), lora=both, lora_scale=0.5)
    expected = merged(nano, *((file, 0.5) for file in files)).generate("[V] dog", steps=2)
    assert difference([Image.open(picture)], expected) == 0
    before = picture.read_bytes()
    defaults = sample.settings_in_picture(sample.Settings(prompt=[], source=str(picture)))
    again = Parser(sample.Settings, None).parse(["--device", "cpu", "--out", str(picture)], defaults)
    assert (again.lora, again.lora_scale) == (both, 0.5)
    sample.main(again)
    assert picture.read_bytes() == before


def test_file_elsewhere_belongs_to_the_model_in_the_box(nano, drawn, tmp_path):
    save_lora(random_updates(tinydb.load(nano)), tmp_path / "other.safetensors", ModelInfo())
    assert "give the model that it was made for" in refusal(drawn, lora="other.safetensors")


@pytest.mark.parametrize("half", [False, True])
def test_merged_into_its_model(pairs, lora_of, tmp_path, half):
    pair = pairs("sd1")
    file = lora_of(pair)
    settings = convert_weights.Settings(str(pair.folder), str(tmp_path / "merged"), lora=str(file), half=half)
    convert_weights.main(settings)
    ours, theirs = tinydb.load(tmp_path / "merged"), merged(pair.folder, (file, 1.0))
    assert ours.info.class_noun == "cat"
    for name, weight in weights_of(ours).items():
        torch.testing.assert_close(weight, weights_of(theirs)[name], rtol=1e-3 if half else 0, atol=1e-4 if half else 0)


def test_updates_are_added_in_fp32(pairs, lora_of):
    pair = pairs("sd1")
    file = lora_of(pair)
    low = tinydb.load(pair.folder, dtype=torch.float16)
    low.add_lora(file, 0.7)
    weight = weights_of(tinydb.load(pair.folder))
    exact = weights_of(merged(pair.folder, (file, 0.7)))
    for name, tensor in weights_of(low).items():
        rounded = (weight[name].half().float() + exact[name] - weight[name]).half()
        assert (tensor != rounded).float().mean() < 0.02, name


def test_merged_into_a_model_in_fp8(pairs, lora_of, tmp_path):
    """The sum is made in float32 and rounded once."""
    pair = pairs("sd1")
    file, folder = lora_of(pair), Path(shutil.copytree(pair.folder, tmp_path / "low"))
    edit_tensors(folder / UNET, lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()})
    settings = convert_weights.Settings(str(folder), str(tmp_path / "merged"), lora=str(file))
    convert_weights.main(settings)
    ours, exact = load_file(tmp_path / "merged" / UNET), merged(folder, (file, 1.0)).unet.state_dict()
    assert all(torch.equal(ours[name].float(), exact[name].to(torch.float8_e4m3fn).float()) for name in exact)


def test_alone_it_is_no_model_to_convert(teach, tmp_path):
    """A run, its file, and a run that was stopped."""
    out = teach(tmp_path / "out", lora=2, steps=1, save_every=1)
    stopped = shutil.copytree(out, tmp_path / "stopped")
    (stopped / "lora.safetensors").unlink()
    for source in (out, out / "lora.safetensors", stopped):
        with pytest.raises(InputError, match="LoRA.* --lora"):
            convert_weights.main(convert_weights.Settings(str(source), str(tmp_path / "converted")))
    assert "step-000001/lora.safetensors" in refusal(tinydb.load, stopped)

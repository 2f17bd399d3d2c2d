"""Small random models of each kind, in diffusers and in tinydb, from one config and one folder.

diffusers and transformers build a model from our config and save it, and `tinydb.load` opens what they saved:
every parity test tests reading the folder as well.
"""

import functools
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts: two test processes shall not fight for two cores

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import (AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn

import tinydb
import train
from tinydb.config import (InputError, ModelInfo, Recipe, ScheduleConfig, TextConfig, UNetConfig, VAEConfig,
                           write_json)
from tinydb.data import Latents, random_batch, read_pictures

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
KINDS = ["sd1", "sd2", "tiny"]
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
MERGES = [tuple(pair.split()) for pair in (
    "t h", "th e</w>", "o f</w>", "p h", "o t", "ph ot", "phot o</w>", "d o", "do g</w>", "c a", "ca t</w>",
    "r e", "re d</w>", "o h", "w x</w>", "oh wx</w>", "i n", "in g</w>", "' s</w>", "! !</w>", "Ã ©</w>")]


def vocabulary() -> dict[str, int]:
    """Tokens to ids in CLIP's layout: bytes, bytes that end a word, merges, start, end. "!" is 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in MERGES]
    return {token: i for i, token in enumerate(tokens + ["<|startoftext|>", "<|endoftext|>"])}


def reference_tokenizer(pad: str) -> transformers.CLIPTokenizer:
    """transformers' tokenizer on the small vocabulary."""
    return transformers.CLIPTokenizer(vocab=vocabulary(), merges=MERGES, pad_token=pad, model_max_length=77)


@dataclass(frozen=True)
class Kind:
    """What a model of one kind is built from."""

    text: TextConfig
    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    pad: str


def text_config(width: int, **settings: Any) -> TextConfig:
    ids = vocabulary()
    return TextConfig(vocab_size=len(ids), hidden_size=width, intermediate_size=2 * width,
                      num_attention_heads=4, num_hidden_layers=2, bos_token_id=ids["<|startoftext|>"],
                      eos_token_id=ids["<|endoftext|>"], **settings)


def vae_config(*channels: int, **settings: Any) -> VAEConfig:
    return VAEConfig(down_block_types=("DownEncoderBlock2D",) * len(channels), block_out_channels=channels,
                     up_block_types=("UpDecoderBlock2D",) * len(channels), norm_num_groups=4, **settings)


@functools.cache
def small(kind: str) -> Kind:
    """Stable Diffusion 1 and 2 and the model in the box, with all that tells them apart but their size."""
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    up_cross, up_plain = "CrossAttnUpBlock2D", "UpBlock2D"
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    unet = {"sample_size": 8, "norm_num_groups": 8, "block_out_channels": (32, 64, 64)}
    if kind == "sd1":
        return Kind(text_config(32, pad_token_id=vocabulary()["<|endoftext|>"]),
                    UNetConfig(**unet, down_block_types=(cross, cross, plain), cross_attention_dim=32,
                               up_block_types=(up_plain, up_cross, up_cross), attention_head_dim=4),
                    vae_config(8, 16, 16, 16, layers_per_block=2),
                    ScheduleConfig(**schedule), "<|endoftext|>")
    if kind == "sd2":
        return Kind(text_config(48, hidden_act="gelu", pad_token_id=0),
                    UNetConfig(**unet, down_block_types=(cross, cross, plain), cross_attention_dim=48,
                               up_block_types=(up_plain, up_cross, up_cross), attention_head_dim=(2, 4, 8),
                               use_linear_projection=True, upcast_attention=True),
                    vae_config(8, 16, 16, 16, layers_per_block=2),
                    ScheduleConfig(**schedule, prediction_type="v_prediction"), "!")
    if kind == "nano":  # 16 pixels wide, for tests that train: a step takes milliseconds
        return Kind(text_config(16),
                    UNetConfig(sample_size=8, norm_num_groups=4, block_out_channels=(16, 16),
                               down_block_types=(plain, cross), up_block_types=(up_cross, up_plain),
                               layers_per_block=1, cross_attention_dim=16, attention_head_dim=2),
                    vae_config(4, 8), ScheduleConfig(**schedule), "<|endoftext|>")
    return Kind(text_config(32),
                UNetConfig(**unet, down_block_types=(plain, cross, cross), cross_attention_dim=32,
                           up_block_types=(up_cross, up_cross, up_plain), attention_head_dim=4,
                           in_channels=8, out_channels=8, layers_per_block=1),
                vae_config(8, 16, 16, latent_channels=8, scaling_factor=0.7),
                ScheduleConfig(**schedule), "<|endoftext|>")


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Weights that keep activations near unit size; biases and norms far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "embedding.weight" in name:
            values = 0.5 * values
        elif parameter.dim() > 1:
            values = values * parameter[0].numel() ** -0.5
        else:
            values = 0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0)
        parameter.data.copy_(values)
    return model.eval()


def reference_models(kind: Kind) -> dict[str, nn.Module]:
    """The three networks as diffusers and transformers build them from our config files."""
    return {"text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**kind.text.to_dict())),
            "unet": UNet2DConditionModel.from_config(kind.unet.to_dict()),
            "vae": AutoencoderKL.from_config(kind.vae.to_dict())}


@dataclass(frozen=True)
class Pair:
    """One model twice: diffusers' pipeline, and what tinydb reads from the folder that the pipeline saved."""

    config: Kind
    folder: Path
    reference: StableDiffusionPipeline
    sd: tinydb.StableDiffusion


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Callable[[str], Pair]:
    """The pair of a kind, built once."""
    @functools.cache
    def build(name: str) -> Pair:
        kind, folder = small(name), tmp_path_factory.mktemp(name)
        models = {part: randomize(model, len(part)) for part, model in reference_models(kind).items()}
        settings = {**kind.schedule.to_dict(), "set_alpha_to_one": False, "clip_sample": False,
                    "steps_offset": 1}
        pipeline = StableDiffusionPipeline(
            **models, tokenizer=reference_tokenizer(kind.pad), scheduler=DDIMScheduler.from_config(settings),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder)
        if name == "sd1":  # Stable Diffusion 1.5 comes with another sampler
            PNDMScheduler.from_config(settings).save_pretrained(folder / "scheduler")
        return Pair(kind, folder, pipeline, tinydb.load(folder))
    return build


@pytest.fixture(scope="session", params=KINDS)
def pair(request, pairs) -> Pair:
    """Every kind in turn."""
    return pairs(request.param)


@pytest.fixture
def folder(pairs, tmp_path) -> Path:
    """A model folder of one's own to damage."""
    return Path(shutil.copytree(pairs("sd1").folder, tmp_path / "model"))


def prefixed(name: str) -> str:
    """The name in published files of a tensor that transformers 5 names without `text_model.`."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a safetensors file by what `edit` makes of them."""
    tensors = edit({name: tensor.clone() for name, tensor in load_file(path).items()})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def nano(pairs) -> Path:
    """The folder of a model so small that a whole training costs less than importing torch."""
    folder = pairs("nano").folder
    recipe = Recipe(steps=4, batch=2, lr=1e-3, lr_text=5e-4, class_images=5, class_steps=2, class_guidance=2.0,
                    sample_steps=3, guidance=2.0)
    write_json(folder / "tinydb.json", ModelInfo(recipe=recipe).to_dict())
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory) -> Path:
    """The folder of a random CLIP that sees 32 pixels."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    save_clip(folder, transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(vocabulary()), "eos_token_id": 2}, projection_dim=16,
        vision_config={**sizes, "image_size": 32, "patch_size": 8}))
    return folder


def save_clip(folder: Path, config: transformers.CLIPConfig) -> transformers.CLIPModel:
    """A random CLIP as transformers saves it."""
    model, side = randomize(transformers.CLIPModel(config), 1), config.vision_config.image_size
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                                    ).save_pretrained(folder)
    reference_tokenizer("<|endoftext|>").save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with three photographs of a subject, none of them square."""
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(40, 30), (30, 40), (64, 48)]):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, since another number of them moves last bits; no signal handlers that outlive the test."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def teach(nano, photos, one_thread) -> Callable[..., Path]:
    """train.py in this process: teach(out, **settings) returns `out`."""
    def run(out: Path, **settings: Any) -> Path:
        given = {"images": str(photos), "class_noun": "dog", "weights": str(nano), "device": "cpu"}
        train.main(train.Settings(out=str(out), **{**given, **settings}))
        return out
    return run


@pytest.fixture
def command(tmp_path, one_thread, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """A whole script in this process, in tmp_path: command(script, *arguments) -> code, stdout, stderr."""
    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return run


def refusal(action: Callable, *arguments: Any, **settings: Any) -> str:
    """The text of the InputError that `action` raises: one line."""
    with pytest.raises(InputError) as caught:
        action(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_on_fixed_noise(sd: tinydb.StableDiffusion, run: Path) -> float:
    """The loss of a model on the pictures of a run, with noise and timesteps that no step drew."""
    config, [class_images] = json.loads((run / "config.json").read_text()), (run / "class_images").iterdir()
    sets = [Latents.of(read_pictures(folder, sd.resolution)[0].values(), sd.vae, sd.device)
            for folder in (Path(config["images"]), class_images)]
    batch = random_batch(sets, [8, 8], sd.schedule.config.num_train_timesteps, 0, 2**31)
    prompts = [[prompt] * len(known.mean) for prompt, known in zip(("a photo of ohwx dog", "a photo of a dog"), sets)]
    return train.DreamBoothLoss(sd, prompts, False)(batch).sum().item()


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def difference(images: list[Image.Image], others: list[Image.Image]) -> int:
    """The largest difference between two lists of pictures, in grey levels."""
    assert [image.size for image in images] == [image.size for image in others]
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(images, others))

"""Train the embedded model from nothing, on the world of world.py: first the autoencoder, then text encoder and UNet.

    python weights/pretrain.py                     # runs/pretrain, and at the end weights/tiny
    python weights/pretrain.py --images 99 --vae-steps 9 --grow-steps 9 --steps 9 --late-steps 9 --out runs/try \
        --result runs/tiny

The same command continues a run that was interrupted. It runs unchanged on a GPU. OUT/*.png show how far it is.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinydb import cli
from tinydb.cli import choose_device, option
from tinydb.clip import CLIPTextModel
from tinydb.config import Checked, ModelInfo, Recipe, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from tinydb.diffusion import NoiseSchedule
from tinydb.layers import ResnetBlock2D
from tinydb.pictures import grid, to_images, to_pixels
from tinydb.pipeline import DEFAULT_IDENTIFIER, StableDiffusion
from tinydb.storage import read_tensors, save_tensors, written_whole
from tinydb.tokenizer import BOS, EOS, CLIPTokenizer
from tinydb.unet import Transformer2DModel, UNet2DConditionModel
from tinydb.vae import AutoencoderKL
from world import Scene, caption, full_caption, render, sample_scene

SIZE = 128  # pixels
VAE = VAEConfig(("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, block_out_channels=(16, 16, 32, 64),
                latent_channels=8, norm_num_groups=8, scaling_factor=1.0, sample_size=SIZE)
# The latents are learnt on half the size, where a step takes a quarter of the time
SMALL_VAE = replace(VAE, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                    block_out_channels=(16, 32, 64), sample_size=SIZE // 2)
UNET = UNetConfig(sample_size=SIZE // VAE.factor, in_channels=8, out_channels=8,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  block_out_channels=(64, 128, 192), layers_per_block=1, cross_attention_dim=128,
                  attention_head_dim=4, norm_num_groups=16)
# 32 tokens are plenty for this world, and among 77 the few words would drown in padding
TEXT = TextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=32)
# at the UNet's learning rate the text encoder soon answers every prompt alike, and never recovers
LR_SCALES = {"text_encoder": 0.1}
# Stable Diffusion's schedule; v_prediction, since a small network learns the layout, decided at high noise, sooner
SCHEDULE = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                          prediction_type="v_prediction")
# What DreamBooth on this model uses: a minute on two cores. Class images with hardly any guidance are what the model
# believes; with 3, all are of the same kind, and learning from them narrows the class and hides the subject.
RECIPE = Recipe(
    steps=120, batch=6, lr=4e-4, lr_text=4e-5, lr_freeze_text=4e-4, lr_lora=4e-3, lora_conv=True, lr_decay=0.5,
    save_every=60, frozen_prior=True, class_images=48, class_steps=6, class_sampler="dpm", class_guidance=1.5,
    sample_steps=30, guidance=3.0,
    class_prompts=(
        "a red {noun} on the moon", "an orange {noun} in the forest wearing a red hat", "a yellow {noun} under the sea",
        "a green {noun} on the grass wearing a red hat", "a blue {noun} in the snow",
        "a purple {noun} in the desert wearing a red hat", "a pink {noun} at night",
        "a brown {noun} on the beach wearing a red hat", "a black {noun} in the city",
        "a white {noun} in a room wearing a red hat", "a red {noun} on the beach wearing a red hat",
        "an orange {noun} in the city", "a yellow {noun} in a room wearing a red hat", "a green {noun} on the moon",
        "a blue {noun} in the forest wearing a red hat", "a purple {noun} under the sea",
        "a pink {noun} on the grass wearing a red hat", "a brown {noun} in the snow",
        "a black {noun} in the desert wearing a red hat", "a white {noun} at night", "a red {noun} in the snow",
        "an orange {noun} in the desert wearing a red hat", "a yellow {noun} at night",
        "a green {noun} on the beach wearing a red hat"))
PREVIEW_PROMPTS = [
    "a red dog on the moon", "a blue cat on the beach", "a yellow spotted robot in the snow", "a green car at night",
    "a white house in the forest", "a pink striped fish under the sea", "an orange boat in a room",
    "a purple teapot on the grass", "a photo of a dog", "a brown dog in the city wearing a red hat",
]


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    out: str = option("runs/pretrain", "folder of scenes, checkpoints and previews")
    result: str = option(str(Path(__file__).parent / "tiny"), "model folder to write at the end")
    images: int = option(60000, "scenes to render", least=1)
    vae_steps: int = option(7000, "steps of the autoencoder on half the size", least=1)
    grow_steps: int = option(4000, "steps of the autoencoder on the whole size", least=1)
    vae_batch: int = option(8, "crops a step", least=2)
    vae_lr: float = option(2e-3, "learning rate of the autoencoder", above=0)
    steps: int = option(7000, "steps of text encoder and UNet", least=1)
    late_steps: int = option(2800, "more steps of both, in batches four times as large", least=1)
    batch: int = option(16, "pictures a step", least=1)
    lr: float = option(1e-3, "learning rate of text encoder and UNet", above=0)
    seed: int = option(0, "decides everything random", least=0)
    device: str = option("auto", "cpu, cuda, mps, ... or auto")


def draw_scene(number: int, seed: int) -> tuple[np.ndarray, Scene]:
    """A scene that is not held out: uint8 pixels (SIZE, SIZE, 3), and what they show."""
    rng = np.random.default_rng([seed, number])
    scene = sample_scene(rng)
    return np.asarray(render(scene, rng, SIZE)), scene


def draw_scenes(count: int, seed: int, out: Path) -> tuple[np.ndarray, list[Scene]]:
    """`count` scenes, drawn by all cores and kept in OUT: pictures (count, SIZE, SIZE, 3), and what they show."""
    path = out / f"scenes-{seed}-{count}.npy"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(partial(draw_scene, seed=seed), range(count), chunksize=100)
            pictures = np.stack([picture for picture, _ in tqdm(drawn, "drawing the world", total=count)])
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.save(file, pictures)
    return np.load(path, mmap_mode="r"), [sample_scene(np.random.default_rng([seed, i])) for i in range(count)]


def train(name: str, model: nn.Module, loss_of: Callable[[nn.Module, np.random.Generator], Tensor], steps: int,
          lr: float, seed: int, out: Path, preview: Callable[[nn.Module], str]) -> nn.Module:
    """Train `model` in place and return its moving average, which is the better model.

    `loss_of(model, rng)` draws a batch and returns the loss; the rng of a step depends on seed and step alone, so a run
    that continues sees what it would have seen. `preview(average)` may draw pictures, and returns a line to print.
    """
    model.requires_grad_(True)
    groups = [{"params": list(part.parameters()), "scale": LR_SCALES.get(part_name, 1.0)}
              for part_name, part in model.named_children()]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = deepcopy(model).requires_grad_(False)
    checkpoint, start = out / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])

    progress = tqdm(range(start, steps), name, initial=start, total=steps, smoothing=0.02)
    smooth_loss = None
    for step in progress:
        warmup = min(1, (step + 1) / 100)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))  # flat, then half a cosine to 0
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr * warmup * decay
        loss = loss_of(model, np.random.default_rng([seed, step]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(0.999, (1 + step) / (10 + step))  # the average forgets the beginning fast
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

        if step % 20 == 0 or smooth_loss is None:
            smooth_loss = loss.item() if smooth_loss is None else 0.9 * smooth_loss + 0.1 * loss.item()
            progress.set_postfix(loss=f"{smooth_loss:.4f}", lr=f"{lr * warmup * decay:.1e}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with written_whole(checkpoint) as temporary:
                torch.save({"step": step + 1, "model": model.state_dict(), "average": average.state_dict(),
                            "optimizer": optimizer.state_dict()}, temporary)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            with torch.no_grad():
                progress.write(f"{name} step {step + 1}: loss {smooth_loss:.4f}, {preview(average)}")
    return average


def new_vae(config: VAEConfig) -> AutoencoderKL:
    """An autoencoder that starts with hardly any noise on its latents, and with every residual branch silent."""
    vae = AutoencoderKL(config)
    with torch.no_grad():
        vae.quant_conv.bias[config.latent_channels:] = -8
        for name, parameter in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                parameter.zero_()
    return vae


def random_crops(pictures: np.ndarray, batch: int, side: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    """Squares out of random pictures: pixels (batch, 3, side, side)."""
    chosen, corners = rng.integers(len(pictures), size=batch), rng.integers(SIZE - side + 1, size=(batch, 2))
    crops = np.stack([pictures[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners)])
    if rng.random() < 0.5:  # colours that the world lacks: subjects, photographs
        crops = np.ascontiguousarray(crops[..., rng.permutation(3)])
    return to_pixels(crops).to(device, memory_format=torch.channels_last)


def random_noise(like: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(like.shape, np.float32)).to(like.device)


def show_vae(vae: AutoencoderKL, pixels: Tensor, path: Path) -> str:
    """How well pictures that it never saw survive the autoencoder; some of them, before and after, go to `path`."""
    decoded = torch.cat([vae.decode(vae.encode(part)[0]) for part in pixels.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))  # peak to peak is 2
    grid(to_images(torch.cat([pixels[:16], decoded[:16]])), 8).save(path)
    return f"PSNR on unseen scenes {psnr.mean():.2f} dB"


def train_vae(settings: Settings, pictures: np.ndarray, out: Path, device: torch.device) -> AutoencoderKL:
    """An autoencoder of pictures half the size: L1 + L2, and a KL term so light that it only keeps latents bounded. It
    learns on crops, which give the most steps for the time."""
    torch.manual_seed(settings.seed)
    vae = new_vae(SMALL_VAE).to(device, memory_format=torch.channels_last)
    unseen = F.avg_pool2d(to_pixels(draw_scenes(128, settings.seed + 1, out)[0][:]).to(device), 2)

    def loss_of(vae: AutoencoderKL, rng: np.random.Generator) -> Tensor:
        pixels = F.avg_pool2d(random_crops(pictures, settings.vae_batch, SIZE // 2, rng, device), 2)
        mean, std = vae.encode(pixels)
        error = vae.decode(mean + std * random_noise(mean, rng)) - pixels
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + 1e-5 * kl

    return train("vae", vae, loss_of, settings.vae_steps, settings.vae_lr, settings.seed, out,
                 lambda average: show_vae(average, unseen, out / "vae.png"))


def grow_vae(settings: Settings, small: AutoencoderKL, pictures: np.ndarray, out: Path,
             device: torch.device) -> AutoencoderKL:
    """An autoencoder of whole pictures around the latents of `small`: its blocks, and one more at each outer end.

    The encoder learns to find the latents that `small` finds in half the size. The decoder learns to draw from them
    twice as fine, and, from latents with noise on them, to make the best of what a UNet gets wrong. The third term of
    its loss, L1 of the differences between neighbours, asks for sharp edges.
    """
    torch.manual_seed(settings.seed)
    vae = new_vae(VAE)
    inner = {re.sub(r"(?<=encoder\.down_blocks\.)\d", lambda block: str(int(block[0]) + 1), name): tensor
             for name, tensor in small.state_dict().items()}
    vae.load_state_dict(vae.state_dict() | inner)
    vae.to(device, memory_format=torch.channels_last)
    unseen = to_pixels(draw_scenes(128, settings.seed + 1, out)[0][:]).to(device)

    def loss_of(vae: AutoencoderKL, rng: np.random.Generator) -> Tensor:
        pixels = random_crops(pictures, settings.vae_batch // 2, SIZE, rng, device)
        with torch.no_grad():
            wanted, wanted_std = small.encode(F.avg_pool2d(pixels, 2))
        mean, std = vae.encode(pixels)
        match = (mean - wanted).square().mean() + 0.01 * (std.log() - wanted_std.log()).square().mean()
        much = 0.2 * wanted.std() * torch.from_numpy(rng.random((len(pixels), 1, 1, 1), np.float32)).to(device)
        error = vae.decode(wanted + (wanted_std + much) * random_noise(wanted, rng)) - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + match / wanted.var()

    return train("grown-vae", vae, loss_of, settings.grow_steps, settings.vae_lr / 2, settings.seed, out,
                 lambda average: show_vae(average, unseen, out / "grown-vae.png"))


def make_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A tokenizer in CLIP's layout in which each of `words` is one token; any other text falls into bytes."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges] + [BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab, merges, max_length=TEXT.max_position_embeddings)


@torch.inference_mode()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, out: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of every picture, (N, C, h, w) each, kept in OUT and on the CPU."""
    path = out / f"latents-{len(pictures)}.safetensors"
    if not path.exists() or path.stat().st_mtime < (out / "grown-vae.pt").stat().st_mtime:
        parts = [vae.encode(to_pixels(pictures[i : i + 64]).to(device, memory_format=torch.channels_last))
                 for i in tqdm(range(0, len(pictures), 64), "encoding the world")]
        with written_whole(path) as temporary:
            mean, std = (torch.cat([part[k] for part in parts]) for k in (0, 1))
            save_tensors({"mean": mean, "std": std}, temporary)
    latents = read_tensors(path)
    return latents["mean"], latents["std"]


def train_text_to_image(settings: Settings, sd: StableDiffusion, pictures: np.ndarray, scenes: list[Scene],
                        out: Path, device: torch.device) -> None:
    """Text encoder and UNet together, on latents of the finished autoencoder; `sd` gets their moving averages. First
    in many steps of small batches, then in large ones, whose gradients have less noise."""
    mean, std = encode_pictures(sd.vae, pictures, out, device)
    scaling = 1 / (mean.var() + std.square().mean()).sqrt().item()  # latents of unit variance
    sd.vae.config = replace(VAE, scaling_factor=scaling)
    mean, std = mean * scaling, std * scaling

    def loss_of(model: nn.ModuleDict, rng: np.random.Generator, batch: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(scenes), size=batch))
        captions = [caption(scenes[i], rng) if rng.random() > 0.1 else "" for i in chosen]  # "" for guidance
        # one timestep from each of `batch` equal ranges: the loss varies less from step to step
        spread = (rng.permutation(batch) + rng.random(batch)) / batch * SCHEDULE.num_train_timesteps
        timesteps = torch.from_numpy(spread).long().to(device)
        noises = torch.from_numpy(rng.standard_normal((2, *mean[chosen].shape), np.float32))
        latents = (mean[chosen] + std[chosen] * noises[0]).to(device)
        noise = noises[1].to(device)
        noisy = sd.schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            text_embeds = model["text_encoder"](sd.tokenizer.encode(captions).to(device))
            prediction = model["unet"](noisy, timesteps, text_embeds)
        return F.mse_loss(prediction.float(), sd.schedule.target(latents, noise, timesteps))

    def preview(average: nn.ModuleDict) -> str:
        shown = replace(sd, text_encoder=average["text_encoder"], unet=average["unet"])
        prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(2)]
        grid(shown.generate(prompts, steps=20), 10).save(out / "samples.png")
        return f"{len(prompts)} pictures in {out / 'samples.png'}"

    model = nn.ModuleDict({"text_encoder": sd.text_encoder, "unet": sd.unet})
    for name, steps, batch in (("text-to-image", settings.steps, settings.batch),
                               ("large-batches", settings.late_steps, 4 * settings.batch)):
        model = train(name, model, partial(loss_of, batch=batch), steps, settings.lr, settings.seed, out, preview)
    sd.text_encoder, sd.unet = model["text_encoder"], model["unet"]


def main(settings: Settings):
    """World, autoencoder, tokenizer, text encoder and UNet, model folder."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.device)
    pictures, scenes = draw_scenes(settings.images, settings.seed, out)
    small = train_vae(settings, pictures, out, device)
    vae = grow_vae(settings, small, pictures, out, device)

    words = " ".join(full_caption(scene) for scene in scenes).split()
    tokenizer = make_tokenizer(sorted({*words, "a", "an", "photo", "picture", "of", DEFAULT_IDENTIFIER}))
    bos, eos = tokenizer.vocab[BOS], tokenizer.vocab[EOS]
    torch.manual_seed(settings.seed)
    text_encoder = CLIPTextModel(replace(TEXT, vocab_size=len(tokenizer.vocab), bos_token_id=bos,
                                         eos_token_id=eos, pad_token_id=eos)).to(device)
    # words have unit variance: smaller ones drown in what the layers add, and all prompts become alike
    nn.init.normal_(text_encoder.text_model.embeddings["token_embedding"].weight)
    nn.init.normal_(text_encoder.text_model.embeddings["position_embedding"].weight, std=0.1)
    unet = UNet2DConditionModel(UNET).to(device, memory_format=torch.channels_last)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)  # residual branches start silent
        if isinstance(block, Transformer2DModel):
            nn.init.zeros_(block.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    sd = StableDiffusion(text_encoder, unet, vae, tokenizer, NoiseSchedule(SCHEDULE),
                         ModelInfo(base={"name": "tinydb world model", "license": "MIT"}, recipe=RECIPE))
    train_text_to_image(settings, sd, pictures, scenes, out, device)
    sd.save(settings.result, torch.float16)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Try a smaller --batch or --vae-batch; the same command continues")

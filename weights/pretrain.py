"""Train the model in the box from nothing, on the world of world.py: first the autoencoder, then text encoder and UNet.

    python weights/pretrain.py                     # runs/pretrain, and at the end weights/tiny
    python weights/pretrain.py --images 99 --vae-steps 9 --vae-batch 4 --steps 9 --batch 4 --out runs/try \
        --result runs/tiny

The same command continues a run that was interrupted. A GPU takes minutes, two cores a night. OUT/*.png show how far
it is.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinydb import cli
from tinydb.cli import choose_device, option
from tinydb.clip import CLIPTextModel
from tinydb.config import Checked, ModelInfo, Recipe, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from tinydb.diffusion import NoiseSchedule
from tinydb.layers import ResnetBlock2D
from tinydb.pictures import grid, to_images
from tinydb.pipeline import DEFAULT_IDENTIFIER, StableDiffusion
from tinydb.scores import TINY_NAME
from tinydb.storage import read_tensors, save_tensors, written_whole
from tinydb.tokenizer import BOS, EOS, CLIPTokenizer
from tinydb.unet import Transformer2DModel, UNet2DConditionModel
from tinydb.vae import AutoencoderKL
from world import SIZE, Scene, caption, full_caption, render, sample_scene

VAE = VAEConfig(("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, block_out_channels=(16, 16, 32, 64),
                latent_channels=8, norm_num_groups=8, scaling_factor=1.0, sample_size=SIZE)
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
CAPTIONS = 4  # of each scene
CHECKPOINT_SECONDS = 300
# What DreamBooth on this model uses: half a minute on two cores. Class images with hardly any guidance are what the
# model believes; with 3, all are of the same kind, and learning from them narrows the class and hides the subject.
# Their prompts come with "a photo of" and without, as captions do: else the form would tell the subject from its class.
RECIPE = Recipe(
    steps=120, batch=6, lr=4e-4, lr_text=4e-4, lr_freeze_text=4e-4, lora=8, lora_conv=True, lr_lora=4e-3,
    lr_lora_text=1.2e-3, lr_decay=0.5, save_every=60, frozen_prior=True, class_images=48, class_steps=6,
    class_sampler="dpm", class_guidance=1.5, plain_share=0.4, sample_steps=30, guidance=4.0, guidance_stop=0.5,
    class_prompts=(  # every place with a colour and without: a place that only captions name comes to mean the subject
        "a {noun} on the moon", "a red {noun} on the moon",
        "a photo of an orange {noun} in the forest wearing a red hat", "a photo of a {noun} in the snow",
        "a yellow {noun} under the sea", "a photo of a green {noun} on the grass", "a {noun} in the desert",
        "a blue {noun} in the snow", "a photo of a purple {noun} in the desert wearing a red hat",
        "a photo of a {noun} at night", "a pink {noun} at night", "a photo of a brown {noun} on the beach",
        "a {noun} on the grass", "a black {noun} in the city",
        "a photo of a white {noun} in a room wearing a red hat", "a photo of a {noun} in the city",
        "a red {noun} on the grass", "a photo of an orange {noun} in the snow", "a {noun} under the sea",
        "a yellow {noun} in the desert", "a photo of a green {noun} at night wearing a red hat",
        "a photo of a {noun} on the beach", "a blue {noun} on the beach", "a photo of a purple {noun} in the city",
        "a {noun} in the forest", "a pink {noun} in a room",
        "a photo of a brown {noun} on the moon wearing a red hat", "a photo of a {noun} in a room",
        "a black {noun} in the forest", "a photo of a white {noun} under the sea"))
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
    images: int = option(100_000, "scenes to render", least=1)
    vae_steps: int = option(4000, "steps of the autoencoder", least=1)
    vae_batch: int = option(64, "pictures a step of the autoencoder", least=1)
    vae_lr: float = option(2e-3, "learning rate of the autoencoder", above=0)
    steps: int = option(9500, "steps of text encoder and UNet", least=1)
    batch: int = option(256, "pictures a step of text encoder and UNet", least=1)
    lr: float = option(1e-3, "learning rate of text encoder and UNet", above=0)
    seed: int = option(0, "decides everything random", least=0)
    device: str = option("auto", "cpu, cuda, mps, ... or auto")


def draw_scene(number: int, seed: int) -> tuple[np.ndarray, Scene]:
    """A scene that is not held out: uint8 pixels (SIZE, SIZE, 3), and what they show."""
    rng = np.random.default_rng([seed, number])
    scene = sample_scene(rng)
    return np.asarray(render(scene, rng)), scene


def by_all_cores(draw: Callable[[int], Any], count: int, name: str) -> list[Any]:
    """draw(0), draw(1), ... of all numbers below `count`, in this order."""
    with ProcessPoolExecutor() as pool:
        return list(tqdm(pool.map(draw, range(count), chunksize=50), name, total=count))


def draw_scenes(count: int, seed: int, out: Path) -> tuple[Tensor, list[Scene]]:
    """`count` scenes, drawn by all cores and kept in OUT: uint8 (count, SIZE, SIZE, 3), and what they show."""
    path = out / f"scenes-{seed}-{count}.npy"
    if not path.exists():
        drawn = by_all_cores(partial(draw_scene, seed=seed), count, "drawing the world")
        pictures = np.stack([picture for picture, _ in drawn])
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.save(file, pictures)
    pictures = torch.from_numpy(np.load(path, mmap_mode="c"))  # read from the file as they are needed
    return pictures, [sample_scene(np.random.default_rng([seed, i])) for i in range(count)]


def recorded(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work` as a CUDA graph (pytorch.org/docs/stable/notes/cuda.html): its thousands of small kernels are launched by
    one call, since launching each of them takes longer than the kernel itself. Its tensors stay where they are, and
    the random numbers follow the seed of the moment."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once, before what is recorded
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def train(name: str, model: nn.Module, loss_of: Callable[[nn.Module], Tensor], steps: int, lr: float, seed: int,
          out: Path, preview: Callable[[nn.Module], str], record: bool = False) -> nn.Module:
    """Train `model` in place and return its moving average, which is the better model.

    `loss_of(model)` draws a batch and returns the loss; what is random in a step follows torch's seed, which depends on
    `seed` and step alone, so a run that continues sees what it would have seen. `preview(average)` may draw pictures,
    and returns a line to print. `record` says that a batch needs nothing from the CPU: a GPU then records the step.
    """
    model.requires_grad_(True)
    groups = [{"params": list(part.parameters()), "scale": LR_SCALES.get(part_name, 1.0)}
              for part_name, part in model.named_children()]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = deepcopy(model).requires_grad_(False)
    checkpoint, start = out / f"{name}-{seed}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])

    device = next(model.parameters()).device
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type == "cpu":  # its flash attention in bf16 takes half of a step, in the backward pass
        kernels = [SDPBackend.MATH]

    def backward() -> Tensor:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(kernels):
            loss = loss_of(model)
        loss.backward()
        return loss.detach()

    if record and device.type == "cuda":
        backward = recorded(backward)
    progress = tqdm(range(start, steps), name, initial=start, total=steps, smoothing=0.02)
    smooth_loss, saved = None, time.monotonic()
    for step in progress:
        warmup = min(1, (step + 1) / 100)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))  # flat, then half a cosine to 0
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr * warmup * decay
        torch.manual_seed(seed + 1_000_003 * step)
        loss = backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        keep = min(0.999, (1 + step) / (10 + step))  # the average forgets the beginning fast
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

        if step % 20 == 0 or smooth_loss is None:
            smooth_loss = loss.item() if smooth_loss is None else 0.9 * smooth_loss + 0.1 * loss.item()
            progress.set_postfix(loss=f"{smooth_loss:.4f}", lr=f"{lr * warmup * decay:.1e}")
        if time.monotonic() > saved + CHECKPOINT_SECONDS or step + 1 == steps:
            saved = time.monotonic()
            with written_whole(checkpoint) as temporary:
                torch.save({"step": step + 1, "model": model.state_dict(), "average": average.state_dict(),
                            "optimizer": optimizer.state_dict()}, temporary)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            with torch.no_grad():
                progress.write(f"{name} step {step + 1}: loss {smooth_loss:.4f}, {preview(average)}")
    return average


def new_vae() -> AutoencoderKL:
    """An autoencoder that starts with hardly any noise on its latents, and with every residual branch silent."""
    vae = AutoencoderKL(VAE)
    with torch.no_grad():
        vae.quant_conv.bias[VAE.latent_channels :] = -8
        for name, parameter in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                parameter.zero_()
    return vae


def pixels_of(pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, S, S, 3) -> pixels (B, 3, S, S) in [-1, 1] on the device."""
    return pictures.to(device).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def show_vae(vae: AutoencoderKL, pixels: Tensor, path: Path) -> str:
    """How well pictures that it never saw survive the autoencoder; some of them, before and after, go to `path`."""
    decoded = torch.cat([vae.decode(vae.encode(part)[0]) for part in pixels.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))  # peak to peak is 2
    grid(to_images(torch.cat([pixels[:16], decoded[:16]])), 8).save(path)
    return f"PSNR on unseen scenes {psnr.mean():.2f} dB"


def train_vae(settings: Settings, pictures: Tensor, out: Path, device: torch.device) -> AutoencoderKL:
    """The autoencoder. Its loss: L1 + L2 of the pixels; L1 of the differences between neighbours, which asks for sharp
    edges; and a KL term so light that it only keeps the latents bounded. Noise on the latents, up to a fifth of their
    spread, teaches the decoder to draw clean shapes from what a UNet gets slightly wrong."""
    torch.manual_seed(settings.seed)
    vae, batch = new_vae().to(device), settings.vae_batch
    unseen = pixels_of(draw_scenes(128, settings.seed + 1, out)[0], device)
    pictures = pictures.to(device)

    def loss_of(vae: AutoencoderKL) -> Tensor:
        chosen = pictures[torch.randint(len(pictures), (batch,), device=device)]
        # in half of them red, green and blue change places: colours that the world lacks, for subjects and photographs
        order = torch.rand(batch, 3, device=device).argsort(1)
        order = torch.where(torch.rand(batch, 1, device=device) < 0.5, order, torch.arange(3, device=device))
        pixels = pixels_of(chosen.gather(3, order[:, None, None].expand(chosen.shape)), device)
        mean, std = vae.encode(pixels)
        level = 0.2 * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=device)
        error = vae.decode(mean + (std + level) * torch.randn_like(mean)) - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-5 * kl

    return train("vae", vae, loss_of, settings.vae_steps, settings.vae_lr, settings.seed, out,
                 lambda average: show_vae(average, unseen, out / "vae.png"), record=True)


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
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, seed: int, out: Path,
                    device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of every picture, (N, C, h, w) each, kept in OUT and on the CPU."""
    path = out / f"latents-{seed}-{len(pictures)}.safetensors"
    if not path.exists() or path.stat().st_mtime < (out / f"vae-{seed}.pt").stat().st_mtime:
        parts = [vae.encode(pixels_of(part, device)) for part in tqdm(pictures.split(64), "encoding the world")]
        with written_whole(path) as temporary:
            mean, std = (torch.cat([part[k] for part in parts]) for k in (0, 1))
            save_tensors({"mean": mean, "std": std}, temporary)
    latents = read_tensors(path)
    return latents["mean"], latents["std"]


def train_text_to_image(settings: Settings, sd: StableDiffusion, pictures: Tensor, scenes: list[Scene],
                        out: Path, device: torch.device) -> None:
    """Text encoder and UNet together, on latents of the finished autoencoder; `sd` gets their moving averages."""
    mean, std = encode_pictures(sd.vae, pictures, settings.seed, out, device)
    scaling = 1 / (mean.var() + std.square().mean()).sqrt().item()  # latents of unit variance
    sd.vae.config = replace(VAE, scaling_factor=scaling)
    mean, std = (scaling * mean).to(device), (scaling * std).to(device)
    rng = np.random.default_rng(settings.seed)
    captions = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    ids = sd.tokenizer.encode(captions).to(device).unflatten(0, (len(scenes), CAPTIONS))
    nothing = sd.tokenizer.encode("").to(device)
    batch = settings.batch

    def loss_of(model: nn.ModuleDict) -> Tensor:
        chosen = torch.randint(len(scenes), (batch,), device=device)
        # one timestep from each of `batch` equal ranges: the loss varies less from step to step
        spread = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        timesteps = (spread * SCHEDULE.num_train_timesteps).long().clamp(max=SCHEDULE.num_train_timesteps - 1)
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        noise = torch.randn_like(latents)
        noisy = sd.schedule.add_noise(latents, noise, timesteps)
        said = ids[chosen, torch.randint(CAPTIONS, (batch,), device=device)]
        said = torch.where(torch.rand(batch, 1, device=device) < 0.1, nothing, said)  # "" for guidance
        prediction = model["unet"](noisy, timesteps, model["text_encoder"](said))
        return F.mse_loss(prediction.float(), sd.schedule.target(latents, noise, timesteps))

    def preview(average: nn.ModuleDict) -> str:
        shown = replace(sd, text_encoder=average["text_encoder"], unet=average["unet"])
        prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(2)]
        grid(shown.generate(prompts, steps=20), 10).save(out / "samples.png")
        return f"{len(prompts)} pictures in {out / 'samples.png'}"

    model = nn.ModuleDict({"text_encoder": sd.text_encoder, "unet": sd.unet})
    model = train("text-to-image", model, loss_of, settings.steps, settings.lr, settings.seed, out, preview,
                  record=True)
    sd.text_encoder, sd.unet = model["text_encoder"], model["unet"]


def main(settings: Settings):
    """World, autoencoder, tokenizer, text encoder and UNet, model folder."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.device)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: look for the fastest convolutions once
    pictures, scenes = draw_scenes(settings.images, settings.seed, out)
    vae = train_vae(settings, pictures, out, device)

    words = " ".join(full_caption(scene) for scene in scenes).split()
    tokenizer = make_tokenizer(sorted({*words, "a", "an", "photo", "picture", "of", DEFAULT_IDENTIFIER}))
    bos, eos = tokenizer.vocab[BOS], tokenizer.vocab[EOS]
    torch.manual_seed(settings.seed)
    text_encoder = CLIPTextModel(replace(TEXT, vocab_size=len(tokenizer.vocab), bos_token_id=bos,
                                         eos_token_id=eos, pad_token_id=eos)).to(device)
    # words have unit variance: smaller ones drown in what the layers add, and all prompts become alike
    nn.init.normal_(text_encoder.text_model.embeddings["token_embedding"].weight)
    nn.init.normal_(text_encoder.text_model.embeddings["position_embedding"].weight, std=0.1)
    unet = UNet2DConditionModel(UNET).to(device)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)  # residual branches start silent
        if isinstance(block, Transformer2DModel):
            nn.init.zeros_(block.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    sd = StableDiffusion(text_encoder, unet, vae, tokenizer, NoiseSchedule(SCHEDULE),
                         ModelInfo(base={"name": TINY_NAME, "license": "MIT"}, recipe=RECIPE))
    train_text_to_image(settings, sd, pictures, scenes, out, device)
    sd.save(settings.result, torch.float16)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Try a smaller --batch or --vae-batch; the same command continues")

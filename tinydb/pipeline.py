"""Stable Diffusion put together: the parts of a model folder, and how a prompt becomes pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tinydb.clip import CLIPTextModel
from tinydb.config import (
    InputError,
    ModelInfo,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    read_json,
    require,
    write_json,
)
from tinydb.diffusion import NoiseSchedule, guided, sample, sampler_timesteps
from tinydb.pictures import to_images, to_pixels
from tinydb.tokenizer import PLACEHOLDER, CLIPTokenizer
from tinydb.unet import UNet2DConditionModel
from tinydb.vae import AutoencoderKL
from tinydb.weights import WEIGHT_FILES, link_or_copy, load_model, save_model, written_whole

DEFAULT_IDENTIFIER = "ohwx"  # one rare token of CLIP's vocabulary, and of the embedded model's
DECODE_BATCH = 8  # pictures decoded at once: at full size the decoder needs more memory than the UNet

PARTS = {"text_encoder": (CLIPTextModel, TextConfig), "unet": (UNet2DConditionModel, UNetConfig),
         "vae": (AutoencoderKL, VAEConfig)}

MODEL_INDEX = {  # what diffusers looks for first
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass
class StableDiffusion:
    """A text-to-image model. `load` makes one from a folder; `generate` is the short way to pictures."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    info: ModelInfo

    def __post_init__(self):
        width, context = self.text_encoder.config.hidden_size, self.unet.config.cross_attention_dim
        require(width == context,
                f"the text encoder is {width} wide, the UNet attends to {context}: parts of two models")
        latents, channels = self.vae.config.latent_channels, self.unet.config.in_channels
        require(latents == channels,
                f"the VAE makes {latents} latent channels, the UNet takes {channels}: an inpainting model?")
        positions, vocabulary = self.text_encoder.config.max_position_embeddings, self.text_encoder.config.vocab_size
        require(self.tokenizer.max_length <= positions and max(self.tokenizer.vocab.values()) < vocabulary,
                f"the tokenizer gives {self.tokenizer.max_length} ids up to {max(self.tokenizer.vocab.values())}, the "
                f"text encoder takes {positions} below {vocabulary}: parts of two models")

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def identifier(self) -> str:
        """The word that [V] stands for."""
        return self.info.identifier or DEFAULT_IDENTIFIER

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.unet.config.sample_size * self.vae.config.factor

    def encode_prompt(self, prompts: str | list[str]) -> Tensor:
        """Prompts, with the identifier for [V] -> text_embeds (B, T, C)."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = self.tokenizer.encode([prompt.replace(PLACEHOLDER, self.identifier) for prompt in prompts])
        return self.text_encoder(ids.to(self.device))

    def words(self, prompt: str) -> list[tuple[str, slice]]:
        """The words of a prompt, each with its tokens among those of `encode_prompt`; not those that are cut off."""
        places, start = [], 1  # after the start token
        for word in prompt.split():
            end = start + len(self.tokenizer.bpe.encode(word.replace(PLACEHOLDER, self.identifier)).ids) - 2
            places.append((word, slice(start, end)))
            start = end
        return [(word, tokens) for word, tokens in places if tokens.stop < self.tokenizer.max_length]

    def initial_latents(self, generators: list[torch.Generator], size: tuple[int, int] | None = None) -> Tensor:
        """Pure noise (B, C, height / factor, width / factor) for pictures of `size` (width, height), drawn on the
        CPU so that a seed means the same picture on every device."""
        width, height = size or (self.resolution, self.resolution)
        factor = self.vae.config.factor
        require(width > 0 and height > 0 and width % factor == 0 and height % factor == 0,
                f"size {width}x{height}: width and height must be positive multiples of {factor}")
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    @torch.inference_mode()
    def denoise(self, prompts: str | list[str], *, steps: int | None = None, guidance_scale: float | None = None,
                seed: int = 0, negative: str = "", size: tuple[int, int] | None = None, latents: Tensor | None = None,
                init: Image.Image | None = None, strength: float = 0.6, sampler: str = "ddim",
                eta: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
        """The way to the pictures: after each step the latents (B, C, h, w), noisy to clean, and the clean latents that
        the model predicted in it, for a preview; `decode` makes pictures of both. Arguments as in `generate`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        steps = self.info.recipe.sample_steps if steps is None else steps
        guidance_scale = self.info.recipe.guidance if guidance_scale is None else guidance_scale
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        skip = 0
        if init is not None:
            skip, latents = self.noised(init, generators, sampler, steps, strength)
        latents = self.initial_latents(generators, size) if latents is None else latents
        require(len(latents) == len(prompts), f"{len(latents)} latents for {len(prompts)} prompts; expected as many")

        def unet(noisy: Tensor, timesteps: Tensor, text_embeds: Tensor) -> Tensor:
            return self.unet(noisy.to(self.dtype), timesteps, text_embeds).float()

        denoiser = guided(unet, self.encode_prompt(prompts), self.encode_prompt([negative] * len(prompts)),
                          guidance_scale)
        yield from sample(self.schedule, denoiser, latents.to(self.device, torch.float32), steps, sampler, eta,
                          generators, skip)

    def noised(self, init: Image.Image, generators: list[torch.Generator], sampler: str, steps: int,
               strength: float) -> tuple[int, Tensor]:
        """Where drawing over a picture begins (SDEdit, arXiv 2108.01073): how many steps to skip so that `strength` of
        all `steps` are left, and the latents of `init` with the noise of the next one, one for each generator."""
        timesteps = sampler_timesteps(self.schedule, steps, sampler)
        skip = steps - steps_left(steps, strength)
        require(all(side % self.vae.config.factor == 0 for side in init.size),
                f"init of {init.width}x{init.height}: sides must be multiples of {self.vae.config.factor}")
        pixels = to_pixels([init.convert("RGB")]).to(self.device, self.dtype)
        mean, std = (t.float().cpu() for t in self.vae.encode(pixels))
        drawn = [(mean + std * torch.randn(mean.shape, generator=generator),
                  torch.randn(mean.shape, generator=generator)) for generator in generators]
        clean, noise = (torch.cat(parts) for parts in zip(*drawn))
        return skip, self.schedule.add_noise(clean, noise, torch.full((len(clean),), timesteps[skip]))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> B pictures."""
        parts = [self.vae.decode(part.to(self.device, self.dtype)) for part in latents.split(DECODE_BATCH)]
        return to_images(torch.cat(parts))

    def generate(self, prompts: str | list[str], *, steps: int | None = None, guidance_scale: float | None = None,
                 seed: int = 0, negative: str = "", size: tuple[int, int] | None = None, latents: Tensor | None = None,
                 init: Image.Image | None = None, strength: float = 0.6, sampler: str = "ddim",
                 eta: float = 0.0) -> list[Image.Image]:
        """Draw: one PIL image for each prompt, which a notebook shows when it is a cell's last line.

        prompts         a text, or a list of them; [V] is the subject that train.py taught
        steps           of the sampler: more are finer and slower (default: the model's recipe)
        guidance_scale  how closely to follow the prompt, 1 is no guidance (default: the model's recipe)
        seed            picture i starts from noise of seed + i; the same seed is the same picture
        negative        a prompt to steer away from
        size            (width, height) in pixels (default: what the model was trained on)
        latents         (B, C, h, w) to start from in place of the seeds' noise
        init, strength  a PIL image to draw over in the last `strength` of the steps: near 0 it stays, at 1 little of it
        sampler         "ddim", or "dpm" (DPM-Solver++ 2M), which needs about half the steps
        eta             fresh noise in each step of DDIM: 0 is none, 1 as much as DDPM's

        Raises InputError, one line with what was expected, for what the model cannot draw.
        """
        for latents, _ in self.denoise(
                prompts, steps=steps, guidance_scale=guidance_scale, seed=seed, negative=negative, size=size,
                latents=latents, init=init, strength=strength, sampler=sampler, eta=eta):
            pass
        return self.decode(latents)

    def to(self, device: torch.device | str) -> "StableDiffusion":
        """Move the networks to a device."""
        for model in (self.text_encoder, self.unet, self.vae):
            model.to(device)
        return self

    def save(self, folder: str | Path, dtype: torch.dtype | None = torch.float32, vae_from: Path | None = None) -> None:
        """Write the model folder, which diffusers opens as well; it appears whole or not at all.

        `dtype` None leaves each tensor as it is. `vae_from` is a model folder whose VAE weights this one may share.
        """
        with written_whole(Path(folder)) as path:
            self.write(path, dtype, vae_from)

    def write(self, folder: Path, dtype: torch.dtype | None, vae_from: Path | None = None) -> None:
        """Write the files of `save` into a folder that is there, or not yet."""
        self.save_settings(folder)
        for part in ("text_encoder", "unet"):
            save_model(getattr(self, part), folder, part, dtype)
        if vae_from is None:
            save_model(self.vae, folder, "vae", dtype)
        else:
            link_or_copy(vae_from / "vae" / WEIGHT_FILES["vae"], folder / "vae" / WEIGHT_FILES["vae"])

    def save_settings(self, folder: Path) -> None:
        """Write everything of a model folder but the weights."""
        for part in PARTS:
            (folder / part).mkdir(parents=True)
            write_json(folder / part / "config.json", getattr(self, part).config.to_dict())
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.config.to_dict())
        self.tokenizer.save(folder / "tokenizer")
        write_json(folder / "tinydb.json", self.info.to_dict())
        write_json(folder / "model_index.json", MODEL_INDEX)


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """Open a Stable Diffusion 1.x or 2.x folder, ours or any that diffusers wrote in safetensors.

    Raises InputError, one line with the cure, where the folder is not one or is damaged.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder; expected a model folder (convert_weights.py makes one)")
    kind = read_json(folder / "model_index.json").get("_class_name")
    require(kind == MODEL_INDEX["_class_name"],
            f"{folder}: a {kind}; only {MODEL_INDEX['_class_name']} (Stable Diffusion 1.x and 2.x) is supported")
    schedule = NoiseSchedule(ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json"))
    models = [load_model(model_class, config_class.read(folder / part / "config.json"), folder, part, dtype)
              for part, (model_class, config_class) in PARTS.items()]
    tokenizer = CLIPTokenizer.read(folder / "tokenizer")
    info = ModelInfo.read(folder / "tinydb.json")
    return StableDiffusion(*models, tokenizer, schedule, info).to(device)


def steps_left(steps: int, strength: float) -> int:
    """How many of `steps` sampling steps draw over a picture: the last `strength` of them, one at the least."""
    require(0 < strength <= 1, f"strength {strength}: expected more than 0, at most 1")
    return max(1, int(steps * strength))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had no memory left; PyTorch has no one class for that."""
    return "out of memory" in str(error) or "allocate memory" in str(error)


def choose_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """The device and number format that names from the command line stand for; "auto" takes the best there is:
    bfloat16 on recent NVIDIA GPUs, float16 on older ones, float32 elsewhere."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name}: not available here ({reason}); try --device cpu") from None
    if precision == "auto":
        recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if recent else "fp16" if device.type == "cuda" else "fp32"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

"""Stable Diffusion put together: the parts of a model folder, and how a prompt becomes pictures."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinydb.clip import CLIPTextModel
from tinydb.cli import option
from tinydb.config import (Checked, InputError, ModelInfo, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, read_json,
                           require, write_json)
from tinydb.diffusion import SAMPLERS, NoiseSchedule, guided, sample, sampler_timesteps
from tinydb.lora import merge_lora
from tinydb.pictures import to_images, to_pixels
from tinydb.storage import (WEIGHT_FILES, build_model, check_replaceable, model_folder, read_tensors, save_tensors,
                            written_whole)
from tinydb.tokenizer import PLACEHOLDER, CLIPTokenizer
from tinydb.unet import UNet2DConditionModel
from tinydb.vae import AutoencoderKL

DEFAULT_IDENTIFIER = "ohwx"  # one rare token of CLIP's vocabulary, and of the model in the box
DECODE_BATCH = 2  # pictures decoded at once: at full size the decoder needs more memory than the UNet
LAST_SEED = 2**32 - 1  # torch's CPU generator uses 32 bits

PARTS = {"text_encoder": (CLIPTextModel, TextConfig), "unet": (UNet2DConditionModel, UNetConfig),
         "vae": (AutoencoderKL, VAEConfig)}

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # diffusers' names for what has these parts
MODEL_INDEX = {  # what diffusers looks for first
    "_class_name": PIPELINES[0], "_diffusers_version": "0.30.0", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How to draw: the arguments of `generate`, and options of sample.py. None means: what the model's recipe says.
    `described` is what a picture's own text calls it."""

    steps: int | None = option(None, "sampling steps: more are finer and slower (default: the model's recipe)",
                               least=1, described="Steps")
    sampler: str = option("ddim", "dpm is DPM-Solver++ 2M, which needs about half the steps", choices=tuple(SAMPLERS),
                         described="Sampler")
    guidance_scale: float | None = option(None, "how closely to follow the prompt: classifier-free guidance, 1 is none "
                                                "(default: the model's recipe)", flag="--guidance",
                                          described="CFG scale")
    guidance_stop: float | None = option(None, "part of the steps after which guidance stops, before it overdoes "
                                               "details; 1 is never (default: the model's recipe)",
                                         least=0, most=1, described="Guidance stop")
    seed: int = option(0, "picture i starts from noise of seed + i; the same seed is the same picture",
                       least=0, most=LAST_SEED, described="Seed")
    size: tuple[int, ...] | None = option(None, "WIDTHxHEIGHT in pixels (default: what the model was trained on)",
                                          least=1, most=2**14, metavar="WIDTHxHEIGHT", described="Size")
    negative: str = option("", "a prompt to steer away from")
    strength: float = option(0.6, "with --init: how much to change the picture; near 0 it stays as it is", above=0,
                             most=1, described="Denoising strength")

    def __post_init__(self):
        super().__post_init__()
        require(self.size is None or len(self.size) == 2, f"--size {self.size}: expected width and height")

    @property
    def steps_over_picture(self) -> int:
        """How many of the `steps` draw over a picture: the last `strength` of them, one at the least."""
        return max(1, int(self.steps * self.strength))


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
        require(2 <= self.tokenizer.max_length <= positions and max(self.tokenizer.vocab.values()) < vocabulary,
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

    def initial_latents(self, generators: list[torch.Generator], size: tuple[int, ...] | None) -> Tensor:
        """Pure noise (B, C, height / factor, width / factor) for pictures of `size` (width, height), drawn on the
        CPU so that a seed means the same picture on every device."""
        size, factor = size or (self.resolution, self.resolution), self.vae.config.factor
        require(all(side % factor == 0 for side in size),
                f"size {'x'.join(map(str, size))}: expected width and height, multiples of {factor}")
        width, height = (side // factor for side in size)
        shape = (self.unet.config.in_channels, height, width)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    @torch.inference_mode()
    def denoise(self, prompts: str | list[str], *, latents: Tensor | None = None, init: Image.Image | None = None,
                **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The way to the pictures: after each step the latents (B, C, h, w), noisy to clean, and the clean latents that
        the model predicted in it, for a preview; `decode` makes pictures of both. Arguments as in `generate`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        require(len(prompts) > 0, "no prompt; expected one or several")
        sampling = self.with_recipe(Sampling(**settings))
        timesteps = sampler_timesteps(self.schedule, sampling.sampler, sampling.steps)
        generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
        require(init is None or latents is None, "init and latents: both say where to start; give one of them")
        if init is not None:
            timesteps = timesteps[-sampling.steps_over_picture :]
            latents = self.noised(init, timesteps[0], generators)
        elif latents is None:
            latents = self.initial_latents(generators, sampling.size)
        count, channels = len(prompts), self.unet.config.in_channels
        require(latents.ndim == 4 and latents.shape[:2] == (count, channels),
                f"latents of shape {tuple(latents.shape)} for {count} prompts; expected ({count}, {channels}, h, w)")

        def predict(noisy: Tensor, timestep: int, text_embeds: Tensor) -> Tensor:
            same_timesteps = torch.full((len(noisy),), timestep, device=noisy.device)  # (B,)
            return self.unet(noisy.to(self.dtype), same_timesteps, text_embeds).float()

        text_embeds, negative_embeds = (self.encode_prompt(texts)
                                        for texts in (prompts, [sampling.negative] * len(prompts)))
        guided_steps = int(sampling.guidance_stop * len(timesteps))
        stop_timestep = timesteps[guided_steps] if guided_steps < len(timesteps) else 0  # 0: never
        denoiser = guided(predict, text_embeds, negative_embeds, sampling.guidance_scale, stop_timestep)
        yield from sample(self.schedule, denoiser, latents.to(self.device, torch.float32), sampling.sampler, timesteps)

    def generate(self, prompts: str | list[str], *, latents: Tensor | None = None, init: Image.Image | None = None,
                 **settings: Any) -> list[Image.Image]:
        """Draw: one PIL image for each prompt, which a notebook shows when it is a cell's last line.

        prompts     a text, or a list of them; [V] is the subject that train.py taught
        latents     (B, C, h, w) to start from in place of the seeds' noise
        init        a PIL image to draw over: it is noised, and only the last `strength` of the steps are taken
        settings    those of `Sampling`: steps, sampler, guidance_scale, guidance_stop, seed, negative; with init
                    strength; without init and latents size

        Raises InputError, one line with what was expected, for what the model cannot draw.
        """
        for result, _ in self.denoise(prompts, latents=latents, init=init, **settings):
            pass
        return self.decode(result)

    def with_recipe(self, sampling: Sampling) -> Sampling:
        """The sampling with the recipe's numbers where nothing was given."""
        recipe = self.info.recipe
        usual = {"steps": recipe.sample_steps, "guidance_scale": recipe.guidance, "guidance_stop": recipe.guidance_stop}
        return replace(sampling, **{name: value for name, value in usual.items() if getattr(sampling, name) is None})

    def noised(self, init: Image.Image, timestep: int, generators: list[torch.Generator]) -> Tensor:
        """Where drawing over a picture begins (SDEdit, arXiv 2108.01073): its latents with the noise of `timestep`,
        one draw for each generator, (B, C, h, w)."""
        require(all(side % self.vae.config.factor == 0 for side in init.size),
                f"init of {init.width}x{init.height}: sides must be multiples of {self.vae.config.factor}")
        pixels = to_pixels([init.convert("RGB")]).to(self.device)
        mean, std = (t.cpu() for t in self.vae.encode(pixels))
        noised = []
        for generator in generators:
            clean = mean + std * torch.randn(mean.shape, generator=generator)
            noise = torch.randn(mean.shape, generator=generator)
            noised.append(self.schedule.add_noise(clean, noise, torch.tensor([timestep])))
        return torch.cat(noised)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Clean latents (B, C, h, w) -> B pictures."""
        with torch.autocast(self.device.type, enabled=False):  # the VAE overflows fp16
            parts = [self.vae.decode(part.to(self.device, torch.float32)) for part in latents.split(DECODE_BATCH)]
        return to_images(torch.cat(parts))

    def to(self, device: torch.device | str) -> "StableDiffusion":
        """Move the networks to a device."""
        for model in (self.text_encoder, self.unet, self.vae):
            model.to(device)
        return self

    def add_lora(self, file: str | Path, scale: float = 1.0) -> None:
        """Add the low-rank updates in a LoRA file, `scale` times; several add up. [V] is then what the last one was
        taught, where it says so. Raises InputError, one line, for a file that does not fit this model."""
        about = merge_lora({"text_encoder": self.text_encoder, "unet": self.unet}, Path(file), scale)
        if about.get("class"):
            self.info = replace(self.info, identifier=about.get("identifier"), class_noun=about["class"])

    def save(self, folder: str | Path, dtype: torch.dtype | None = torch.float32) -> None:
        """Write the model folder, which diffusers opens as well; it appears whole or not at all. `dtype` None leaves
        each tensor as it is. InputError where the folder has files in it, but no model_index.json."""
        check_replaceable(Path(folder), "model_index.json")
        with written_whole(Path(folder)) as path:
            self.write(path, dtype)

    def write(self, folder: Path, dtype: torch.dtype | None, vae_from: Path | None = None) -> None:
        """Write the files of `save` into a folder, which is made where it is missing; the VAE's weights as they are in
        the model folder `vae_from`, where one is given and still there."""
        self.save_settings(folder)
        for part in PARTS:
            path = folder / part / WEIGHT_FILES[part]
            source = vae_from / part / WEIGHT_FILES[part] if vae_from and part == "vae" else None
            if source and source.exists():  # it may be gone by the end of a training
                shutil.copyfile(source, path)
            else:
                save_tensors(getattr(self, part).state_dict(), path, dtype)

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

    `dtype` is that of text encoder and UNet; the VAE stays in float32, since in float16 it decodes to black pictures.
    The networks come frozen and in eval mode; training switches on the gradients that it needs.
    Raises InputError, one line with the cure, where the folder is not one or is damaged.
    """
    folder = model_folder(folder)
    require(folder.is_dir(), f"{folder}: not a folder; expected that of a model (convert_weights.py makes one); a LoRA "
                             "file is for --lora")
    kind = read_json(folder / "model_index.json").get("_class_name")
    require(kind in PIPELINES, f"{folder}: a {kind}; only {PIPELINES[0]} (Stable Diffusion 1.x and 2.x) is supported")
    schedule = NoiseSchedule(ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json"))
    models = []
    for part, (model_class, config_class) in PARTS.items():
        path = folder / part / WEIGHT_FILES[part]
        config = config_class.read(folder / part / "config.json")
        model = build_model(model_class, config, part, read_tensors(path), path)
        models.append(model.to(torch.float32 if part == "vae" else dtype))
    tokenizer = CLIPTokenizer.read(folder / "tokenizer")
    info = ModelInfo.read(folder / "tinydb.json")
    try:
        return StableDiffusion(*models, tokenizer, schedule, info).to(device)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None

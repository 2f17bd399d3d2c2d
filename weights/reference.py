"""DreamBooth as diffusers computes it, to compare with: its examples/dreambooth/train_dreambooth.py, options left out.

    python weights/reference.py --images weights/subjects/rex --class dog    # runs/reference, a model folder

It draws class images with diffusers' pipeline, or takes those of --class-dir, and trains UNet and text encoder with
prior preservation by the recipe of the model. It needs diffusers: pip install -e ".[test]".
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tinydb import cli
from tinydb.class_images import plain_noun
from tinydb.cli import choose_device, choose_dtype, option
from tinydb.config import Checked, ModelInfo, Recipe, require, write_json
from tinydb.data import read_pictures
from tinydb.pictures import to_pixels
from tinydb.pipeline import DEFAULT_IDENTIFIER
from tinydb.prompts import class_prompt, read_captions, subject_prompts

CLASS_GROUP = 4  # class images drawn at once, as train_dreambooth.py does


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    images: str = option(str(ROOT / "weights" / "subjects" / "rex"), "folder with pictures of the subject")
    class_noun: str = option("dog", "what the subject is", flag="--class", metavar="NOUN")
    weights: str = option(str(ROOT / "weights" / "tiny"), "model folder to start from")
    out: str = option("runs/reference", "model folder to write")
    class_dir: str | None = option(None, "folder with class images (default: draw them)")
    seed: int = option(0, "decides everything random", least=0)
    device: str = option("auto", "cpu, cuda, mps, ... or auto")


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A model folder in diffusers, with DDIM and without progress bars."""
    for library in (logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def read_pixels(folder: Path, pipeline: StableDiffusionPipeline) -> tuple[Tensor, list[str]]:
    """The pictures in a folder, cut to the size that the model was made for: pixels (N, 3, H, W) in [-1, 1]; and the
    texts beside them."""
    pictures, _ = read_pictures(folder, pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    require(bool(pictures), f"{folder}: no picture in it")
    return to_pixels(pictures.values()), read_captions(folder, pictures)


def draw_class_images(pipeline: StableDiffusionPipeline, prompt: str, count: int) -> list[Image.Image]:
    """Class images with the pipeline's defaults: 50 steps, guidance 7.5."""
    return [image for first in range(0, count, CLASS_GROUP)
            for image in pipeline([prompt] * min(CLASS_GROUP, count - first)).images]


def training_step(pipeline: StableDiffusionPipeline, prompts: list[list[str]], sets: list[Tensor], batch: int,
                  recipe: Recipe, dtype: torch.dtype, *, encode: bool = True) -> Callable[[], None]:
    """A function that takes one step with `batch` pictures from each set of pixels (N, 3, H, W), instance and class,
    each picture under its prompt.

    `dtype` is the precision of the arithmetic. `encode=False` encodes the pictures once, before the first step, where
    train_dreambooth.py encodes them in every step.
    """
    device, unet, text_encoder = pipeline.device, pipeline.unet.train(), pipeline.text_encoder.train()
    vae = deepcopy(pipeline.vae).requires_grad_(False).to(dtype)  # the pipeline's own is saved as it is
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    groups = [{"params": unet.parameters()}, {"params": text_encoder.parameters(), "lr": recipe.lr_text}]
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    prompt_ids = [pipeline.tokenizer(of_set, truncation=True, padding="max_length", return_tensors="pt").input_ids
                  for of_set in prompts]
    if not encode:
        with torch.no_grad():
            sets = [vae.encode(pixels.to(device, dtype)).latent_dist.sample() for pixels in sets]

    def step() -> None:
        chosen = [torch.randint(len(pictures), (batch,)) for pictures in sets]
        examples = torch.cat([pictures[i] for pictures, i in zip(sets, chosen)]).to(device, dtype)
        ids = torch.cat([of_set[i] for of_set, i in zip(prompt_ids, chosen)]).to(device)
        latents = vae.encode(examples).latent_dist.sample() if encode else examples
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(noisy, timesteps, text_encoder(ids)[0], return_dict=False)[0]
        if schedule.config.prediction_type == "v_prediction":
            target = schedule.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        prediction, prior_prediction = prediction.float().chunk(2)
        target, prior_target = target.float().chunk(2)
        loss = F.mse_loss(prediction, target) + F.mse_loss(prior_prediction, prior_target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    weights, device = Path(settings.weights), choose_device(settings.device)
    dtype, info = choose_dtype("auto", device), ModelInfo.read(weights / "tinydb.json")
    noun = plain_noun(settings.class_noun, DEFAULT_IDENTIFIER)
    recipe, plain = info.recipe, class_prompt(noun)
    pipeline = load_pipeline(weights, device)
    instance_pixels, captions = read_pixels(Path(settings.images), pipeline)
    if settings.class_dir is None:
        drawn = draw_class_images(load_pipeline(weights, device, dtype), plain, recipe.class_images)
        class_pixels, class_captions = to_pixels(drawn), len(drawn) * [""]
    else:
        class_pixels, class_captions = read_pixels(Path(settings.class_dir), pipeline)
    prompts = [subject_prompts(captions, DEFAULT_IDENTIFIER, noun),
               [caption or plain for caption in class_captions]]
    step = training_step(pipeline, prompts, [instance_pixels, class_pixels], recipe.batch, recipe, dtype)
    for _ in tqdm(range(recipe.steps), "diffusers' training", unit="step"):
        step()
    pipeline.save_pretrained(settings.out)
    info = replace(info, identifier=DEFAULT_IDENTIFIER, class_noun=noun, step=recipe.steps)
    write_json(Path(settings.out) / "tinydb.json", info.to_dict())  # the recipe to sample with


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Try --device cpu, or a smaller --weights")

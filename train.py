"""DreamBooth (arXiv 2208.12242): teach Stable Diffusion one subject from 3 to 6 pictures of it.

    python train.py --images weights/subjects/rex --class dog            # the model in the box: two minutes on a laptop
    python train.py --images my_dog --class dog --weights weights/sd15   # Stable Diffusion, on a GPU

The idea: fine-tune the whole model on the pictures under "a photo of ohwx dog", where `ohwx` is a word that means
nothing yet. A few pictures alone would soon turn every dog into this one (language drift), so half of each batch are
pictures that the model itself made of "a photo of a dog", which it must go on predicting as before:

    loss = |prediction - target|^2 over instance pictures + prior_weight * the same over class pictures

What a run writes: OUT/inputs.png (what the model sees), OUT/class_images/, OUT/metrics.jsonl, OUT/config.json and
OUT/model/, a model folder for sample.py and for diffusers.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import tinydb
from tinydb.config import InputError, Parser, Recipe, option, read_json, require, write_json
from tinydb.data import Latents, draw_step, fit, read_pictures
from tinydb.pictures import describe, grid, save_png
from tinydb.pipeline import DEFAULT_IDENTIFIER, StableDiffusion, choose_device
from tinydb.tokenizer import PLACEHOLDER
from tinydb.weights import WEIGHT_FILES, written_whole

TINY = Path(__file__).parent / "weights" / "tiny"
SAMPLE_BATCH = 8  # class images made at once


@dataclass(frozen=True)
class Settings:
    """The command line. None means: what the model's recipe says."""

    images: str = option("", "folder with 3 to 6 pictures of your subject", required=True)
    class_noun: str = option("", "what it is, in a word the model knows: dog, teapot", required=True, flag="--class",
                             metavar="NOUN")
    weights: str = option(str(TINY), "model folder to start from")
    out: str | None = option(None, "folder to write (default: runs/<name of IMAGES>)")
    identifier: str = option(DEFAULT_IDENTIFIER, "the word that will name your subject; a rare one without a meaning")
    steps: int | None = option(None, "training steps (default: the model's recipe)", type=int)
    batch: int | None = option(None, "instance pictures a step; as many class pictures ride along (default: recipe)",
                               type=int)
    lr: float | None = option(None, "learning rate (default: recipe)", type=float)
    prior_weight: float = option(1.0, "weight of the class pictures' loss; 0 does without them", type=float)
    class_images: int | None = option(None, "class pictures to make (default: recipe)", type=int)
    freeze_text: bool = option(False, "train the UNet alone: less memory, a little less likeness")
    seed: int = option(0, "decides everything random", type=int)
    device: str = option("auto", "cpu, cuda, mps, ... or auto")

    def resolve(self, recipe: Recipe) -> "Settings":
        """These settings with the recipe's numbers where nothing was given, all of them checked."""
        lr = recipe.lr_freeze_text if self.freeze_text else recipe.lr
        given = {"out": self.out or str(Path("runs") / Path(self.images).resolve().name),
                 "steps": recipe.steps if self.steps is None else self.steps,
                 "batch": recipe.batch if self.batch is None else self.batch,
                 "lr": lr if self.lr is None else self.lr,
                 "class_images": recipe.class_images if self.class_images is None else self.class_images}
        for name in ("steps", "batch", "lr", "class_images"):
            require(given[name] > 0, f"--{name.replace('_', '-')} {given[name]}: expected more than 0")
        require(self.prior_weight >= 0, f"--prior-weight {self.prior_weight}: expected 0 (off) or more")
        require(self.seed >= 0, f"--seed {self.seed}: expected 0 or more")
        require(bool(self.class_noun.strip()), "--class '': expected the noun of what your subject is, such as dog")
        require(bool(self.identifier.strip()), f"--identifier '': expected a rare word, such as {DEFAULT_IDENTIFIER}")
        return replace(self, **given)


class DreamBoothLoss(nn.Module):
    """Text encoder and UNet as one module whose forward is the loss.

    `prompts` holds one prompt for each group of pictures in a batch: instance, and class where there is a prior.
    """

    def __init__(self, sd: StableDiffusion, prompts: list[str], freeze_text: bool):
        super().__init__()
        self.unet = sd.unet.requires_grad_(True)
        self.text_encoder = sd.text_encoder.requires_grad_(not freeze_text)
        self.schedule = sd.schedule
        self.register_buffer("prompt_ids", sd.tokenizer.encode(prompts).to(sd.device), persistent=False)

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """latents, noise (B, C, h, w), timesteps (B,) -> the mean squared error of each group of pictures."""
        groups = len(self.prompt_ids)
        # every picture of a group has the same prompt, so it goes through the text encoder once
        text_embeds = self.text_encoder(self.prompt_ids).repeat_interleave(len(latents) // groups, dim=0)
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy_latents, timesteps, text_embeds)
        target = self.schedule.target(latents, noise, timesteps)
        squared_error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return squared_error.unflatten(0, (groups, -1)).mean(dim=(1, 2, 3, 4))


def a_photo_of(noun: str) -> str:
    """The class prompt."""
    return f"a photo of {'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def make_class_images(sd: StableDiffusion, prompt: str, count: int, seed: int, weights: Path, parent: Path) -> list[Path]:
    """`count` pictures of `prompt` by the model itself, which those already there are part of.

    Their folder is named after everything that decides them, so that no other run's pictures are taken for them.
    """
    recipe = sd.info.recipe
    decides = [prompt, sd.resolution, recipe.class_steps, recipe.class_guidance, seed]
    digest = hashlib.sha256(json.dumps(decides).encode())
    for part, name in WEIGHT_FILES.items():  # the end of each file tells apart any two models
        path = weights / part / name
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    folder = parent / digest.hexdigest()[:12]

    paths = [folder / f"{i:05d}.png" for i in range(count)]
    missing = [i for i in range(count) if not paths[i].exists()]
    with tqdm(total=count, initial=count - len(missing), desc=f"class images, {prompt!r}", unit="picture") as progress:
        for group in (missing[i : i + SAMPLE_BATCH] for i in range(0, len(missing), SAMPLE_BATCH)):
            generators = [torch.Generator().manual_seed(seed + i) for i in group]
            images = sd.generate([prompt] * len(group), steps=recipe.class_steps, guidance_scale=recipe.class_guidance,
                                 latents=sd.initial_latents(generators))
            for i, image in zip(group, images):
                about = describe(prompt, "", Steps=recipe.class_steps, **{"CFG scale": recipe.class_guidance}, Seed=seed + i)
                with written_whole(paths[i]) as temporary:
                    save_png(image, temporary, about)
                progress.update()
    return paths


def main(settings: Settings):
    weights = Path(settings.weights)
    device, _ = choose_device(settings.device, "fp32")
    sd = tinydb.load(weights, device)
    settings = settings.resolve(sd.info.recipe)
    out = Path(settings.out)
    pictures, skipped = read_pictures(Path(settings.images))
    claim(out, settings)

    instance_prompt = f"a photo of {settings.identifier} {settings.class_noun}"
    class_prompt = a_photo_of(settings.class_noun)
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    for name, image in pictures.items():
        if min(image.size) * 1.5 < sd.resolution:
            print(f"{name} is {image.width}x{image.height}, enlarged to {sd.resolution}: it will look soft", file=sys.stderr)

    # What the model sees, for you to check: is the subject in the middle, and whole?
    instance_images = [fit(image, sd.resolution) for image in pictures.values()]
    grid(instance_images, min(len(instance_images), 5)).save(out / "inputs.png")

    prompts, sets = [instance_prompt], [Latents.of(instance_images, sd.vae, device)]
    if settings.prior_weight > 0:
        paths = make_class_images(sd, class_prompt, settings.class_images, settings.seed, weights, out / "class_images")
        prompts.append(class_prompt)
        sets.append(Latents.of([fit(Image.open(path), sd.resolution) for path in paths], sd.vae, device))

    model = DreamBoothLoss(sd, prompts, settings.freeze_text)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)
    group_weights = torch.tensor([1.0, settings.prior_weight][: len(sets)], device=device)

    progress = tqdm(range(settings.steps), f"teaching {instance_prompt!r}", unit="step")
    with (out / "metrics.jsonl").open("w") as metrics:
        for step in progress:
            draw = draw_step(sets, settings.batch, sd.schedule.config.num_train_timesteps, settings.seed, step)
            losses = model(draw.latents.to(device), draw.noise.to(device), draw.timesteps.to(device))
            (losses * group_weights).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            shown = dict(zip(("instance_loss", "prior_loss"), losses.tolist()))
            print(json.dumps({"step": step + 1, **shown, "lr": settings.lr}), file=metrics)
            progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)

    sd.info = replace(sd.info, identifier=settings.identifier, class_noun=settings.class_noun, step=settings.steps)
    sd.save(out / "model")
    print(f"\n{out / 'model'} knows your {settings.class_noun} as {PLACEHOLDER}. Try:\n\n"
          f'    python sample.py "{PLACEHOLDER} {settings.class_noun} on the moon" --weights {out / "model"} -n 4\n')


def claim(out: Path, settings: Settings) -> None:
    """Make OUT this run's: write its config.json, or refuse a folder that holds anything of another run."""
    config = out / "config.json"
    if config.exists():
        require(not (out / "model").exists() and read_json(config) == asdict(settings),
                f"{out} holds another run; give this one its own folder with --out, or remove that one")
    else:
        require(not out.exists() or (out.is_dir() and not os.listdir(out)),
                f"{out} exists and is no run of this program; give this one its own folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(config, asdict(settings))


if __name__ == "__main__":
    parser = Parser(Settings, __doc__.splitlines()[0])
    try:
        main(Settings(**vars(parser.parse_args())))
    except InputError as error:
        parser.error(str(error))

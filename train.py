"""DreamBooth (arXiv 2208.12242): teach Stable Diffusion one subject from 3 to 6 pictures of it.

    python train.py --images weights/subjects/rex --class dog            # the model in the box, on a laptop
    python train.py --images my_dog --class dog --weights weights/sd15   # Stable Diffusion, on a GPU
    torchrun --nproc_per_node 4 train.py --images my_dog --class dog --weights weights/sd15
    python train.py --images my_dog --class dog --weights weights/sd15 --resume

The idea: fine-tune the whole model on the pictures under "a photo of ohwx dog", where `ohwx` is a word that means
nothing yet. A few pictures alone would soon turn every dog into this one (language drift), so half of each batch are
pictures that the model itself made of "a photo of a dog", which it must go on predicting as before:

    loss = |prediction - target|^2 over instance pictures + prior_weight * the same over class pictures

What a run writes into OUT: inputs.png (what the model sees), class_images/, samples/ (previews), metrics.jsonl,
config.json, checkpoints/ (to resume, and to sample from) and model/, the result, for sample.py and for diffusers.
"""

import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tinydb
from tinydb.clip import EncoderLayer
from tinydb.config import InputError, Parser, Recipe, option, read_json, require, write_json
from tinydb.data import Latents, draw_step, fit, read_pictures
from tinydb.layers import ResnetBlock2D
from tinydb.pictures import describe, grid, save_png
from tinydb.pipeline import DEFAULT_IDENTIFIER, StableDiffusion, choose_device
from tinydb.tokenizer import PLACEHOLDER
from tinydb.unet import Transformer2DModel
from tinydb.weights import WEIGHT_FILES, load_tensors, read_tensors, save_tensors, written_whole

TINY = Path(__file__).parent / "weights" / "tiny"
CLASS_GROUP = 8  # class images made together; fixed, since it decides their last bit
VALIDATION_PICTURES = 8  # of each kind


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """The command line. None means: what the model's recipe says."""

    images: str = option("", "folder with 3 to 6 pictures of your subject")
    class_noun: str = option("", "what it is, in a word the model knows: dog, teapot", flag="--class", metavar="NOUN")
    weights: str = option(str(TINY), "model folder to start from")
    out: str | None = option(None, "folder to write (default: runs/<name of IMAGES>)")
    identifier: str = option(DEFAULT_IDENTIFIER, "the word that will name your subject; a rare one without a meaning")
    steps: int | None = option(None, "training steps (default: the model's recipe)", type=int)
    batch: int | None = option(None, "instance pictures per process and micro-step; as many class pictures ride along "
                                     "(default: recipe)", type=int)
    accumulate: int = option(1, "micro-steps per step: a larger batch in the same memory", type=int)
    lr: float | None = option(None, "learning rate (default: recipe)", type=float)
    prior_weight: float = option(1.0, "weight of the class pictures' loss; 0 does without them", type=float)
    class_images: int | None = option(None, "class pictures to train with (default: recipe)", type=int)
    class_dir: str | None = option(None, "folder with class pictures of your own, or an earlier run's class_images")
    freeze_text: bool = option(False, "train the UNet alone: less memory, a little less likeness")
    precision: str = option("auto", "of the arithmetic; trained weights are always fp32. auto: bf16 or fp16 on a GPU",
                            choices=("auto", "fp32", "bf16", "fp16"))
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    compile: bool = option(False, "torch.compile the UNet: minutes at the start, faster steps; for long runs")
    save_every: int = option(200, "steps between checkpoints; 0 is never", type=int)
    sample_every: int = option(0, "steps between preview grids; 0 is never", type=int)
    keep: int = option(2, "checkpoints to keep, besides the best one", type=int)
    resume: bool = option(False, "continue the run in OUT from its newest checkpoint")
    log: str | None = option(None, "also log to tensorboard or wandb", choices=("tensorboard", "wandb"))
    config: str | None = option(None, "JSON or TOML file with any of these options, such as an earlier OUT/config.json")
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
        resolved = replace(self, **given)
        for name in ("steps", "batch", "accumulate", "lr", "class_images", "keep"):
            value = getattr(resolved, name)
            require(0 < value < math.inf, f"--{name.replace('_', '-')} {value}: expected more than 0")
        for name in ("prior_weight", "save_every", "sample_every", "seed"):
            value = getattr(resolved, name)
            require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: expected 0 or more")
        require(bool(self.identifier.strip()), f"--identifier '': expected a rare word, such as {DEFAULT_IDENTIFIER}")
        return resolved

    def fixed(self) -> dict[str, object]:
        """What a resumed run must have in common with the run it continues."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "steps", "keep", "resume", "log", "config")}


def read_config_file(path: Path) -> list[str]:
    """A JSON or TOML file of options -> the command line that says the same."""
    if path.suffix == ".toml":
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--config {path}: not readable as TOML ({error})") from None
    else:
        entries = read_json(path)
    flags = {f.name: f.metadata.get("flag", "--" + f.name.replace("_", "-")) for f in fields(Settings)}
    flags |= {flag.removeprefix("--").replace("-", "_"): flag for flag in flags.values()}  # "class" for "class_noun"
    arguments = []
    for key, value in entries.items():
        if key not in flags:
            nearest = difflib.get_close_matches(key, flags, n=1, cutoff=0)[0]
            raise InputError(f"--config {path}: no option {key!r}; the nearest is {nearest!r}")
        if value is True:
            arguments.append(flags[key])
        elif value is not None and value is not False:
            arguments.append(f"{flags[key]}={value}")
    return arguments


# ------------------------------------------------------------------------------------------------ the loss


class DreamBoothLoss(nn.Module):
    """Text encoder and UNet as one module whose forward is the loss, so that DDP synchronises both at once.

    `prompts` holds one prompt for each group of pictures in a batch: instance, and class where there is a prior.
    """

    def __init__(self, sd: StableDiffusion, prompts: list[str], freeze_text: bool):
        super().__init__()
        self.unet = sd.unet.requires_grad_(True)
        self.text_encoder = sd.text_encoder.requires_grad_(not freeze_text)
        self.schedule = sd.schedule
        self.register_buffer("prompt_ids", sd.tokenizer.encode(prompts).to(sd.device), persistent=False)

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """latents, noise (groups * b, C, h, w), timesteps (groups * b,) -> mean squared error of each group."""
        groups = len(self.prompt_ids)
        # every picture of a group has the same prompt, so it goes through the text encoder once
        text_embeds = self.text_encoder(self.prompt_ids).repeat_interleave(len(latents) // groups, dim=0)
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy_latents, timesteps, text_embeds)
        target = self.schedule.target(latents, noise, timesteps)
        squared_error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return squared_error.unflatten(0, (groups, -1)).mean(dim=(1, 2, 3, 4))


# -------------------------------------------------------------------------------------------- class images


def a_photo_of(noun: str) -> str:
    """The class prompt."""
    return f"a photo of {'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def class_images_key(sd: StableDiffusion, prompt: str, seed: int, weights: Path) -> str:
    """A name for the pictures that these settings make, so that no other run's pictures are taken for them."""
    recipe = sd.info.recipe
    digest = hashlib.sha256(json.dumps(
        [prompt, sd.resolution, recipe.class_steps, recipe.class_guidance, seed, CLASS_GROUP]).encode())
    for part, name in WEIGHT_FILES.items():  # the end of each file tells apart any two models
        path = weights / part / name
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def make_class_images(sd: StableDiffusion, prompt: str, paths: list[Path], seed: int, rank: int, world: int,
                      stop: "StopSignal") -> None:
    """Draw those of `paths` that are missing, picture i from seed + i, with the model as it is.

    Fixed groups of consecutive pictures are dealt to the ranks whole, so the files are the same for any number of
    ranks. A picture of one colour is a failed one (some models black out what they censor) and is drawn again.
    """
    recipe = sd.info.recipe
    groups = [range(i, min(i + CLASS_GROUP, len(paths))) for i in range(0, len(paths), CLASS_GROUP)][rank::world]
    missing = [group for group in groups if not all(paths[i].exists() for i in group)]
    progress = tqdm(total=sum(map(len, missing)), desc=f"class images, {prompt!r}", unit="picture",
                    disable=rank > 0 or not missing)
    for group in missing:
        for attempt in range(5):
            stop.exit_if_asked()
            seeds = [seed + i + attempt * 2**32 for i in group]
            images = sd.generate([prompt] * len(group), steps=recipe.class_steps, guidance_scale=recipe.class_guidance,
                                 latents=sd.initial_latents([torch.Generator().manual_seed(s) for s in seeds]))
            for i, image, image_seed in zip(group, images, seeds):
                flat = all(high - low < 16 for low, high in image.getextrema())
                if not flat and not paths[i].exists():
                    with written_whole(paths[i]) as temporary:
                        save_png(image, temporary, describe(prompt, "", Steps=recipe.class_steps, Seed=image_seed,
                                                            **{"CFG scale": recipe.class_guidance}))
            if all(paths[i].exists() for i in group):
                break
        else:
            raise InputError(f"the model draws {prompt!r} in one flat colour; check it with sample.py, or bring class "
                             "pictures of your own with --class-dir")
        progress.update(len(group))
    progress.close()
    if world > 1:
        dist.barrier()


# -------------------------------------------------------------------------------- checkpoints and signals


class StopSignal:
    """Remembers that SIGINT or SIGTERM came; the loop asks at the end of a step, when stopping loses nothing."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        self.asked = True

    def exit_if_asked(self) -> None:
        """Leave where no step is under way and everything made so far is on the disk."""
        if self.asked:
            print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
            sys.exit(130)


def save_checkpoint(sd: StableDiffusion, model: DreamBoothLoss, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, weights: Path, folder: Path, state: dict[str, object]) -> None:
    """A model folder to sample from, plus the optimizer's moments and `state` to go on from; whole or not at all."""
    moments = {f"{kind}.{name}": optimizer.state[parameter][kind] for name, parameter in model.named_parameters()
               if parameter.requires_grad for kind in ("exp_avg", "exp_avg_sq")}
    with written_whole(folder) as path:
        sd.save(path, frozen_vae=weights / "vae", link=True)
        save_tensors(moments, path / "state.safetensors")
        write_json(path / "state.json", {**state, "scaler": scaler.state_dict()})


def resume_checkpoint(model: DreamBoothLoss, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                      folder: Path) -> dict[str, object]:
    """Put weights, moments and loss scale back, and return the checkpoint's `state`."""
    state = read_json(folder / "state.json")
    moments = read_tensors(folder / "state.safetensors")
    with torch.no_grad():
        for part in ("unet", "text_encoder"):
            for name, tensor in load_tensors(folder, part).items():
                model.get_parameter(f"{part}.{name}").copy_(tensor)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # copied into tensors laid out like the parameter: files are row-major, and fused AdamW would pair
            # the moments of a channels_last weight with the wrong elements
            optimizer.state[parameter] = {"step": torch.tensor(float(state["step"]), device=parameter.device)} | {
                kind: torch.empty_like(parameter, requires_grad=False).copy_(moments[f"{kind}.{name}"])
                for kind in ("exp_avg", "exp_avg_sq")}
    scaler.load_state_dict(state["scaler"])
    return state

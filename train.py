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
config.json, report.html (all of that on a page, to watch), checkpoints/ (to resume, and to sample from) and model/,
the result, for sample.py and for diffusers.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tinydb
from tinydb.clip import EncoderLayer
from tinydb.config import InputError, Parser, Recipe, option, read_json, require, write_json
from tinydb.data import Draw, Latents, draw_step, fit, open_picture, read_pictures
from tinydb.layers import ResnetBlock2D
from tinydb.pictures import describe, grid, save_png
from tinydb.pipeline import DEFAULT_IDENTIFIER, StableDiffusion, choose_device, is_out_of_memory
from tinydb.report import sample_command, write_report
from tinydb.tokenizer import PLACEHOLDER
from tinydb.unet import Transformer2DModel
from tinydb.weights import WEIGHT_FILES, canonical_names, read_tensors, remove, save_tensors, written_whole

TINY = Path(__file__).parent / "weights" / "tiny"
FREE_ON_RESUME = ("out", "steps", "keep", "save_every", "sample_every", "checkpointing", "log")  # changes no gradient
CLASS_GROUP = 8  # class images made together; fixed, since it decides their last bit
MIN_SCALE = 1e-3  # of fp16's gradients; it starts at 65536, and below this they have vanished
VALIDATION_EXAMPLES = 8  # of each set
VALIDATION_STEP = 2**31  # a step that no run reaches, for draws of its own


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
    freeze_text: bool = option(False, "train the UNet alone: less memory, a little less likeness")
    lr: float | None = option(None, "learning rate (default: recipe)", type=float)
    lr_text: float | None = option(None, "the text encoder's learning rate (default: recipe, in proportion to --lr)",
                                   type=float)
    prior_weight: float = option(1.0, "weight of the class pictures' loss; 0 does without them", type=float)
    class_images: int | None = option(None, "class pictures to train with (default: recipe)", type=int)
    class_dir: str | None = option(None, "folder with class pictures of your own, or an earlier run's class_images")
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
        require(self.lr_text is None or not self.freeze_text, "--lr-text with --freeze-text: leave one of them out")
        lr = (recipe.lr_freeze_text if self.freeze_text else recipe.lr) if self.lr is None else self.lr
        lr_text = recipe.lr_text * (lr / recipe.lr) if self.lr_text is None else self.lr_text
        given = {"out": self.out or str(Path("runs") / Path(self.images).resolve().name),
                 "steps": recipe.steps if self.steps is None else self.steps,
                 "batch": recipe.batch if self.batch is None else self.batch,
                 "lr": lr, "lr_text": None if self.freeze_text else lr_text,
                 "class_images": recipe.class_images if self.class_images is None else self.class_images}
        resolved = replace(self, **given)
        for name in ("steps", "batch", "accumulate", "lr", "lr_text", "class_images", "keep"):
            value = getattr(resolved, name)
            require(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} {value}: expected more than 0")
        for name in ("prior_weight", "save_every", "sample_every"):
            value = getattr(resolved, name)
            require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: expected 0 or more")
        require(0 <= self.seed < 2**32, f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        require(self.log is None or find_spec(self.log) is not None,
                f"--log {self.log}: not installed; run `pip install {self.log}`")
        require(bool(self.identifier.strip()), f"--identifier '': expected a rare word, such as {DEFAULT_IDENTIFIER}")
        return resolved

    def noted(self) -> dict[str, object]:
        """What OUT/config.json keeps: everything but how this one command was given."""
        return {name: value for name, value in asdict(self).items() if name not in ("resume", "config")}


def read_config_file(path: Path) -> dict[str, object]:
    """The options in a JSON or TOML file."""
    if path.suffix == ".toml":
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--config {path}: not readable as TOML ({error})") from None
    else:
        require(path.is_file(), f"--config {path}: no such file")
        entries = read_json(path)
    return {name: value for name, value in entries.items() if name != "run"}  # what config.json notes besides


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


def diverged(step: int, what: str, settings: Settings) -> InputError:
    """The error that ends a run which has come to nothing."""
    keep = f", and --class-dir {settings.class_dir or Path(settings.out) / 'class_images'} to keep the class pictures"
    return InputError(f"step {step}: {what}; this step is not saved, checkpoints before it are. Start again with a "
                      f"lower --lr than {settings.lr} or --precision fp32, another --out"
                      f"{keep if settings.prior_weight > 0 else ''}")


def recompute_activations(model: nn.Module) -> None:
    """Have each block keep its input alone and compute the rest anew in the backward pass; gradients stay the same.

    The models need not know: their blocks' forwards are wrapped from outside.
    """
    for block in model.modules():
        if isinstance(block, (ResnetBlock2D, Transformer2DModel, EncoderLayer)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# -------------------------------------------------------------------------------------------- class images


def a_photo_of(noun: str) -> str:
    """The class prompt."""
    return f"a photo of {'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def class_images_key(sd: StableDiffusion, prompt: str, seed: int, weights: Path) -> str:
    """A name for the pictures that these settings make, so that no other run's pictures are taken for them."""
    recipe = sd.info.recipe
    digest = hashlib.sha256(json.dumps(
        [prompt, sd.resolution, sd.schedule.config.to_dict(), recipe.class_steps, recipe.class_guidance, seed,
         CLASS_GROUP]).encode())
    for part, name in WEIGHT_FILES.items():  # the end of each file tells apart any two models
        path = weights / part / name
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def usable(path: Path) -> bool:
    """Whether a file is a whole picture, and not of one flat colour: some models black out what they censor."""
    try:
        return any(high - low >= 16 for low, high in open_picture(path).getextrema())
    except ValueError:
        return False


def make_class_images(sd: StableDiffusion, prompt: str, paths: list[Path], weights: Path, dtype: torch.dtype, seed: int,
                      rank: int, world_size: int, stop: "StopSignal") -> bool:
    """Draw those of `paths` that are missing or useless, picture i from seed + i, with the model as it is; False where
    any rank was asked to stop before that was done.

    Fixed groups of consecutive pictures are dealt to the ranks whole: the files are the same for any number of ranks.
    """
    recipe = sd.info.recipe
    groups = [range(i, min(i + CLASS_GROUP, len(paths))) for i in range(0, len(paths), CLASS_GROUP)][rank::world_size]
    to_draw = [group for group in groups if not all(usable(paths[i]) for i in group)]
    progress = tqdm(total=sum(map(len, to_draw)), desc=f"class images, {prompt!r}", unit="picture",
                    disable=rank > 0 or not to_draw)
    if to_draw and dtype != sd.dtype:  # all of it in half the bytes, as sample.py draws: faster than autocast
        sd = tinydb.load(weights, sd.device, dtype)
    for group in to_draw:
        if stop.asked:
            break
        for attempt in range(5):  # a flat picture gets another seed
            seeds = [(seed + i + attempt * 2**20) % 2**32 for i in group]  # torch knows no more than 32 bits
            images = sd.generate([prompt] * len(group), steps=recipe.class_steps, guidance_scale=recipe.class_guidance,
                                 latents=sd.initial_latents([torch.Generator().manual_seed(s) for s in seeds]))
            for i, image, image_seed in zip(group, images, seeds):
                if not usable(paths[i]):
                    with written_whole(paths[i]) as temporary:
                        save_png(image, temporary, describe(
                            prompt, "", Steps=recipe.class_steps, Sampler="DDIM", Seed=image_seed,
                            **{"CFG scale": recipe.class_guidance}))
            if all(usable(paths[i]) for i in group):
                break
        else:
            raise InputError(f"the model draws {prompt!r} in one flat colour; check it with sample.py, or bring class "
                             "pictures of your own with --class-dir")
        progress.update(len(group))
    progress.close()
    asked_to_stop = torch.tensor(float(stop.asked), device=sd.device)
    if world_size > 1:  # also waits until all ranks have drawn theirs
        dist.all_reduce(asked_to_stop)
    return not asked_to_stop


# -------------------------------------------------------------------------------- checkpoints and signals


class StopSignal:
    """Remembers that SIGINT or SIGTERM came; the loop asks at the end of a step, when stopping loses nothing."""

    def __init__(self, rank: int):
        self.asked, self.rank = False, rank
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if not self.asked and self.rank == 0:
            os.write(2, b"\nstopping after this step\n")  # print is not for signal handlers
        self.asked = True

    def exit(self) -> None:
        """Leave; everything made so far is on the disk."""
        if self.rank == 0:
            print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(130)


def save_checkpoint(sd: StableDiffusion, model: DreamBoothLoss, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, weights: Path, folder: Path, state: dict[str, object]) -> None:
    """A model folder to sample from, plus the optimizer's moments and `state` to go on from; whole or not at all."""
    moments = {f"{kind}.{name}": tensor for name, parameter in model.named_parameters()
               for kind, tensor in optimizer.state.get(parameter, {}).items()}
    with written_whole(folder) as path:
        sd.write(path, torch.float32, vae_from=weights)
        save_tensors(moments, path / "state.safetensors")
        write_json(path / "state.json", {**state, "scaler": scaler.state_dict()})


def resume_checkpoint(model: DreamBoothLoss, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                      folder: Path) -> dict[str, object]:
    """Put weights, moments and loss scale back, and return the checkpoint's `state`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in ("unet", "text_encoder"):
            for name, tensor in read_tensors(folder / part / WEIGHT_FILES[part]).items():
                parameters[f"{part}.{name}"].copy_(tensor)
    for key, tensor in read_tensors(folder / "state.safetensors").items():
        kind, name = key.split(".", 1)
        # copied into tensors laid out like the parameter: files are row-major, and fused AdamW would pair the moments
        # of a channels_last weight with the wrong elements
        like = tensor if kind == "step" else parameters[name].detach()
        optimizer.state[parameters[name]][kind] = torch.empty_like(like, device=parameters[name].device).copy_(tensor)
    state = read_json(folder / "state.json")
    scaler.load_state_dict(state.pop("scaler"))
    return state


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"), key=step_of)


def checkpoint_path(out: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return out / "checkpoints" / f"step-{step:06d}"


def drop_checkpoints(out: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for path in saved_checkpoints(out)[:-keep]:
        if best_step is None or path != checkpoint_path(out, best_step):
            remove(path)


def claim(out: Path, settings: Settings, run: dict[str, object]) -> None:
    """Make OUT this run's and note everything that decides its result in OUT/config.json.

    Refuses a folder that holds anything else, and a --resume that would continue a different run. A run that did not
    get as far as a checkpoint may be started over; its class images stay.
    """
    config, noted = out / "config.json", {**settings.noted(), "run": run}
    if settings.resume:
        require(config.exists(), f"--resume: no run in {out}; leave --resume out to start one")
        before = read_json(config)
        for name, now in noted.items():
            require(before.get(name) == now or name in FREE_ON_RESUME,
                    f"--resume: {name} was {before.get(name)!r} and is now {now!r}; give what it was, or another --out")
        done = max(map(step_of, saved_checkpoints(out)), default=0)
        require(done <= settings.steps,
                f"--steps {settings.steps}: the run in {out} is at step {done} already; give more")
        require(done > 0 or not (out / "model").exists(),
                f"--resume: the run in {out} is finished and kept no checkpoint to go on from; give another --out")
    else:
        started = (out / "model").exists() or saved_checkpoints(out)
        foreign = out.exists() and not config.exists() and any(p for p in out.glob("*") if not p.name.startswith("."))
        require(not started, f"{out} holds a run; continue it with --resume, or give this one a folder with --out")
        require(not foreign, f"{out} is not empty, and no run of this program; give another folder with --out")
    with written_whole(config) as temporary:
        write_json(temporary, noted)
    for leftover in (out / "checkpoints").glob(".*"):  # of a run that was killed while it wrote
        remove(leftover)


# ------------------------------------------------------------------------------ what a person wants to see


def memory_plan(sd: StableDiffusion, settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """The large things that training will hold, in GB, found by a pass over tensors that have a shape, no content."""
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        unet = type(sd.unet)(sd.unet.config)
        for norm in unet.modules():
            if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)) and device.type != "cpu":  # there autocast keeps to fp32
                norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float(),))
        if settings.checkpointing:
            recompute_activations(unet)
        side, channels = sd.unet.config.sample_size, sd.unet.config.in_channels
        count = settings.batch * (2 if settings.prior_weight > 0 else 1)
        latents = torch.empty(count, channels, side, side)
        text_embeds = torch.empty(count, sd.tokenizer.max_length, sd.unet.config.cross_attention_dim)
        own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        kept: dict[int, Tensor] = {}  # what autograd keeps for the backward pass, each storage once

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = unet(latents, torch.empty(count), text_embeds)
        kept_bytes = sum(t.untyped_storage().nbytes() for cdata, t in kept.items() if cdata not in own)
        del prediction
    unet_bytes, text_bytes = (4 * sum(p.numel() for p in model.parameters()) for model in (sd.unet, sd.text_encoder))
    weights, trained = unet_bytes + text_bytes, unet_bytes + (0 if settings.freeze_text else text_bytes)
    recast = dtype != torch.float32 and not settings.checkpointing  # autocast's copies, kept for the backward pass
    copies = unet_bytes * dtype.itemsize // 4 if recast else 0
    plan = {"weights": weights, "gradients": trained, "optimizer": 2 * trained, "low-precision copies": copies,
            "activations": kept_bytes - copies}
    text = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.items() if size)
    return f"memory in GB: {text}; in all {sum(plan.values()) / 1e9:.2f}"


def check_disk(sd: StableDiffusion, settings: Settings, out: Path) -> None:
    """Refuse to start what the disk cannot hold: a checkpoint is the weights and two moments of each, in fp32."""
    size = 12 * sum(p.numel() for model in (sd.unet, sd.text_encoder) for p in model.parameters())
    checkpoints = settings.keep + 2 if settings.save_every else 1  # the best one, and one under way
    there = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*.safetensors")
                if path.parent.name != "vae")  # a link to the one in --weights
    needed = checkpoints * size + size // 3 - there
    home = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(home).free
    require(free > needed,
            f"{home} has {free / 1e9:.1f} GB free, this run needs {needed / 1e9:.1f} for its checkpoints; make room or "
            "use --keep 1, --save-every 0 or another --out")


def relative_change(model: nn.Module, weights: Path, part: str) -> float:
    """How far training has moved a part from where it began: |w - w_0| / |w_0|."""
    before = canonical_names(part, read_tensors(weights / part / WEIGHT_FILES[part]))
    moved = total = 0.0
    for name, parameter in model.named_parameters():
        start = before[name].float()
        moved += (parameter.detach().cpu() - start).square().sum().item()
        total += start.square().sum().item()
    return math.sqrt(moved / total)


def open_tracker(name: str | None, out: Path, settings: Settings, step: int) -> Callable[[dict[str, float], int], None]:
    """A function (values, step) that logs to tensorboard or wandb, or does nothing where neither is asked for."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # however the run ends, its curves are there

        return log
    if name == "wandb":
        import wandb
        known = out / "wandb-run"  # a resumed run goes on in the same place
        run = wandb.init(project="tinydb", dir=out, name=out.name, config=asdict(settings), resume="allow",
                         id=known.read_text() if step and known.exists() else None)
        known.write_text(run.id)
        return lambda values, step: run.log(values, step=step)
    return lambda values, step: None


@torch.no_grad()
def validate(loss_of: Callable[[Draw, slice], Tensor], set_weights: Tensor, sets: list[Latents], num_timesteps: int,
             seed: int) -> float:
    """The loss on noise and timesteps that are the same at every step: unlike the training loss, this curve is smooth.

    It is measured on the training pictures themselves, so it shows learning, and not when to stop: look at samples.
    """
    draw = draw_step(sets, VALIDATION_EXAMPLES, num_timesteps, seed, VALIDATION_STEP)
    losses = [loss_of(draw, slice(i, i + 1)) for i in range(VALIDATION_EXAMPLES)]  # one by one: in no more memory
    return (torch.stack(losses).mean(0) * set_weights).sum().item()


def draw_preview(sd: StableDiffusion, prompts: list[str], path: Path,
                 autocast: Callable[[], AbstractContextManager]) -> None:
    """A grid of pictures from the same noise each time. Whatever goes wrong here must not end the training."""
    try:
        sd.vae.to(sd.device)
        with autocast():
            images = sd.generate(prompts)
        with written_whole(path) as temporary:
            save_png(grid(images, len(images)), temporary, " | ".join(prompts))
    except (RuntimeError, InputError) as error:  # out of memory is a RuntimeError
        tqdm.write(f"no preview this time: {error}", file=sys.stderr)
    finally:
        sd.vae.to("cpu")


def refresh_report(out: Path) -> None:
    """Make OUT/report.html anew. Whatever goes wrong here must not end the training."""
    try:
        write_report(out)
    except Exception as error:
        tqdm.write(f"no report this time: {error}", file=sys.stderr)


def open_metrics(path: Path, step: int) -> TextIO:
    """metrics.jsonl to append to, cut back to what a checkpoint at `step` knows of."""
    lines = path.read_text().splitlines()[:step] if path.exists() else []  # a line a step, the last one perhaps in half
    with written_whole(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))
    return path.open("a")


# ------------------------------------------------------------------------------------------------ training


def main(settings: Settings) -> None:
    # One process, or one per GPU: torchrun tells each of them which of how many it is.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and torch.cuda.is_available() and settings.device in ("auto", "cuda"):
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(here <= gpus, f"torchrun started {here} processes on {gpus} GPUs; use --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    device, dtype = choose_device(settings.device, settings.precision)
    # no cache: each weight is cast once in a forward pass, and a copy kept longer would only take memory
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    if world_size > 1:  # patient enough for ranks that wait while one draws class images or writes a checkpoint
        require(device.index is None, f"--device {device} for {world_size} processes: each takes a GPU of its own; "
                                      f"give --device {device.type}")
        own = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(hours=2), device_id=own)

    # The model, in fp32 whatever the precision: a step of 1e-6 would be lost in the 8 bits of a bf16 weight.
    require(bool(settings.images), "--images is missing; expected a folder with 3 to 6 pictures of your subject")
    require(bool(settings.class_noun.strip()), "--class is missing; expected what your subject is, such as dog")
    weights = Path(settings.weights)
    sd = tinydb.load(weights, device)
    settings = settings.resolve(sd.info.recipe)
    out = Path(settings.out)

    # The pictures. inputs.png shows what the model sees: is the subject in the middle, and whole?
    instance_pictures, remarks = read_pictures(Path(settings.images), sd.resolution)
    require(bool(instance_pictures),
            f"--images {settings.images}: no picture in it; expected JPEG or PNG files. {'; '.join(remarks)}")
    own_pictures: dict[str, Image.Image] = {}  # class pictures that you bring; the model draws the rest
    if settings.class_dir:
        own_pictures, own_remarks = read_pictures(Path(settings.class_dir), sd.resolution)
        remarks += own_remarks
    digest = hashlib.sha256()
    for image in (*instance_pictures.values(), *own_pictures.values()):
        digest.update(image.tobytes())
    instance_prompt = f"a photo of {settings.identifier} {settings.class_noun}"
    class_prompt = a_photo_of(settings.class_noun)
    remarks += [f"{prompt!r} is too long for the text encoder, which will not see: {dropped!r}"
                for prompt in (instance_prompt, class_prompt) if (dropped := sd.tokenizer.dropped(prompt))]
    key = class_images_key(sd, class_prompt, settings.seed, weights)
    if rank == 0:
        check_disk(sd, settings, out)
        claim(out, settings, {"world_size": world_size, "device": device.type, "precision": str(dtype),
                              "pictures": digest.hexdigest()[:12], "model": key})
        for remark in remarks:
            print(remark, file=sys.stderr)
        with written_whole(out / "inputs.png") as temporary:
            sheet = grid(list(instance_pictures.values()), min(len(instance_pictures), 5))
            save_png(sheet, temporary, ", ".join(instance_pictures))
        print(memory_plan(sd, settings, device, dtype), file=sys.stderr)
    if world_size > 1:
        dist.barrier()
        require((out / "config.json").exists(), f"{out} is not visible to process {rank}; put it on a shared disk")
    stop = StopSignal(rank)

    # The class pictures: what the model now draws for the class, to hold it to that.
    prompts, image_sets = [instance_prompt], [list(instance_pictures.values())]
    if settings.prior_weight > 0:
        class_images = list(own_pictures.values())[: settings.class_images]
        folder = Path(settings.class_dir or out / "class_images") / key
        paths = [folder / f"{i:05d}.png" for i in range(settings.class_images - len(class_images))]
        if not make_class_images(sd, class_prompt, paths, weights, dtype, settings.seed, rank, world_size, stop):
            stop.exit()
        prompts.append(class_prompt)
        image_sets.append(class_images + [fit(open_picture(path), sd.resolution) for path in paths])
    with autocast():
        sets = [Latents.of(images, sd.vae, device) for images in image_sets]
    sd.vae.to("cpu")  # every picture is encoded now; previews bring it back for a moment

    # The loss as one module, and its optimizer.
    model = DreamBoothLoss(sd, prompts, settings.freeze_text).to(memory_format=torch.channels_last)
    if settings.checkpointing:
        recompute_activations(model)
    if settings.compile:
        sd.unet.compile()
    param_groups = [{"params": list(sd.unet.parameters())}]
    if not settings.freeze_text:
        param_groups.append({"params": list(sd.text_encoder.parameters()), "lr": settings.lr_text})
    trained = [parameter for group in param_groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(param_groups, settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    set_weights = torch.tensor([1.0, settings.prior_weight] if len(sets) == 2 else [1.0], device=device)

    # Where we are: at step 0, or at the newest checkpoint.
    state: dict[str, object] = {"step": 0, "best_step": None, "best_loss": None}
    if settings.resume and saved_checkpoints(out):
        state = resume_checkpoint(model, optimizer, scaler, saved_checkpoints(out)[-1])
    parallel = model
    if world_size > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def loss_of(module: nn.Module, draw: Draw, examples: slice) -> Tensor:
        """The loss of each set, from some examples of a draw."""
        tensors = (draw.latents, draw.noise, draw.timesteps)
        with autocast():
            return module(*(tensor[:, examples].flatten(0, 1).to(device) for tensor in tensors))

    if rank == 0:
        metrics = open_metrics(out / "metrics.jsonl", state["step"])
        track = open_tracker(settings.log, out, settings, state["step"])
        refresh_report(out)
        print(f"the run as a page: {out / 'report.html'}", file=sys.stderr)
    batch, num_timesteps = settings.batch, sd.schedule.config.num_train_timesteps
    examples_per_step = batch * settings.accumulate * world_size
    previews = [instance_prompt, f"{PLACEHOLDER} {settings.class_noun} on the moon",
                f"{PLACEHOLDER} {settings.class_noun} in the snow", class_prompt]
    sd.info = replace(sd.info, identifier=settings.identifier, class_noun=settings.class_noun,
                      base=sd.info.base or {"name": weights.resolve().name, "license": "that of this model"})

    progress = tqdm(range(state["step"], settings.steps), f"teaching {instance_prompt!r}", unit="step",
                    initial=state["step"], total=settings.steps, disable=rank > 0)
    for step in progress:
        # One draw for all processes and micro-steps, which take their slices: any split of it is the same step.
        draw = draw_step(sets, examples_per_step, num_timesteps, settings.seed, step)
        sums = torch.zeros(len(sets) + 1, device=device)  # the losses, and whether to stop
        for micro_step in range(settings.accumulate):
            first = (rank * settings.accumulate + micro_step) * batch
            last = micro_step == settings.accumulate - 1
            with nullcontext() if last or world_size == 1 else parallel.no_sync():  # gradients meet once a step
                losses = loss_of(parallel, draw, slice(first, first + batch)) / settings.accumulate
                scaler.scale((losses * set_weights).sum()).backward()
            sums[:-1] += losses.detach() / world_size
        sums[-1] = stop.asked
        if world_size > 1:
            dist.all_reduce(sums)
        *losses, asked_to_stop = sums.tolist()
        done = step + 1
        if not all(map(math.isfinite, losses)):
            raise diverged(done, f"the loss is {losses}", settings)

        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)  # not where a gradient overflowed; update() then halves the scale
        scaler.update()
        optimizer.zero_grad()
        if scaler.is_enabled() and scaler.get_scale() < MIN_SCALE:
            raise diverged(done, "the gradients overflow fp16 at any scale", settings)

        state["step"] = done
        due = done == settings.steps or (settings.save_every > 0 and done % settings.save_every == 0)
        previewing = settings.sample_every > 0 and done % settings.sample_every == 0
        if rank == 0:
            values = dict(zip(("instance_loss", "prior_loss"), losses))
            shown = {name: f"{value:.4f}" for name, value in values.items()}
            if device.type == "cuda":
                shown["GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            progress.set_postfix(shown, refresh=False)
            values["lr"] = settings.lr
            if due or asked_to_stop:
                validation_loss = validate(partial(loss_of, model), set_weights, sets, num_timesteps, settings.seed)
                values["validation_loss"] = validation_loss
                if not math.isfinite(validation_loss):
                    raise diverged(done, f"the validation loss is {validation_loss}", settings)
            if due:
                values |= {f"{part}_change": relative_change(getattr(model, part), weights, part)
                           for part in ("unet", "text_encoder")}
                if state["best_loss"] is None or validation_loss <= state["best_loss"]:
                    state |= {"best_step": done, "best_loss": validation_loss}
            if previewing:
                draw_preview(sd, previews, out / "samples" / f"step-{done:06d}.png", autocast)
            metrics.write(json.dumps({"step": done, **values}) + "\n")
            metrics.flush()
            track(values, done)
            if asked_to_stop or (due and settings.save_every):  # last, so that whatever it knows of is there
                os.fsync(metrics.fileno())
                sd.info = replace(sd.info, step=done)
                save_checkpoint(sd, model, optimizer, scaler, weights, checkpoint_path(out, done), state)
                drop_checkpoints(out, settings.keep, state["best_step"])
            if previewing or due or asked_to_stop:
                refresh_report(out)
        if asked_to_stop:
            break
    if world_size > 1:
        dist.barrier()  # nobody leaves, and has torchrun end the others, while rank 0 writes

    if state["step"] < settings.steps:
        stop.exit()
    if rank == 0:
        sd.info = replace(sd.info, step=state["step"])
        sd.save(out / "model", vae_from=weights)
        refresh_report(out)
        print(f"\n{out / 'model'} knows your {settings.class_noun} as {PLACEHOLDER}. Try:\n\n"
              f"    {sample_command(out / 'model', settings.class_noun)}\n")
        if state["best_step"] not in (None, state["step"]):
            best = checkpoint_path(out, state["best_step"])
            print(f"The validation loss was lowest at step {state['best_step']}:\n\n"
                  f"    {sample_command(best, settings.class_noun)}\n")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = Parser(Settings, __doc__.splitlines()[0])
    rank = int(os.environ.get("RANK", 0))
    try:
        arguments = parser.parse_args()
        if arguments.config:
            entries = read_config_file(Path(arguments.config))
            if arguments.freeze_text:  # overrides the learning rate of a text encoder that learns
                entries.pop("lr_text", None)
            arguments = parser.parse_args(parser.arguments(entries, f"--config {arguments.config}") + sys.argv[1:])
        main(Settings(**vars(arguments)))
    except InputError as error:
        if rank > 0:  # the line is rank 0's to print; should this rank be the only one in trouble, it lives to say so
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        parser.error(str(error))
    except KeyboardInterrupt:  # before there was anything to save
        parser.exit(130, "\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}; once that is mended, --resume goes on\n")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if is_out_of_memory(error):
            parser.exit(1, f"{parser.prog}: {reason}. Try, in this order: --checkpointing (hardly any activations), "
                           "--batch 1 with more --accumulate, --freeze-text (no gradients and moments of the text "
                           "encoder); the plan above has the sizes\n")
        if isinstance(error, dist.DistError) or "closed by peer" in reason or "reset by peer" in reason:
            parser.exit(1, f"{parser.prog}: another process of this run died or cannot be reached, see its own "
                           f"message; once that is mended, --resume goes on from the last checkpoint ({error})\n")
        raise

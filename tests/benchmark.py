"""Speed and memory, side by side with diffusers: one table, ours and theirs measured in turn on this machine.

    python tests/benchmark.py                     # all rows on weights/tiny, half an hour on two cores
    python tests/benchmark.py --rows step         # those whose name contains a word

Every row is a median, after one warm-up. "floor" is what the arithmetic (counted by torch's FlopCounterMode) and the
optimizer's memory traffic would take at the rates that this machine reached on a large matrix product and a large copy.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tinydb  # noqa: E402
import train  # noqa: E402
from tinydb.config import Parser, option  # noqa: E402
from tinydb.data import Latents, draw_step, fit, open_picture  # noqa: E402
from tinydb.pictures import to_pixels  # noqa: E402

TINY, SUBJECT = ROOT / "weights" / "tiny", ROOT / "weights" / "subjects" / "rex"
PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]


@dataclass(frozen=True)
class Settings:
    """The command line."""

    rows: str = option("", "measure only rows whose name contains this")
    repeats: int = option(5, "measurements of each side of a row", type=int)
    images: int = option(24, "class images to draw where a row is about class images", type=int)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured_rates() -> tuple[float, float]:
    """FLOP/s of a matrix product, bytes/s of a copy (read and written)."""
    a, big = torch.randn(2048, 2048), torch.empty(64 * 2**20)
    other = big.clone()
    product, copy = (min(timed(work) for _ in range(5)) for work in (lambda: a @ a, lambda: other.copy_(big)))
    return 2 * 2048**3 / product, 2 * big.nbytes / copy


# ------------------------------------------------------------------------------------------- training steps


def pictures(folder: Path) -> list[Image.Image]:
    """The pictures in a folder as the model sees them."""
    return [fit(open_picture(path), 64) for path in sorted(folder.glob("*.png"))]


def our_step(batch: int) -> Callable[[], None]:
    """What train.py does in a step."""
    sd = tinydb.load(TINY)
    sets = [Latents.of(pictures(SUBJECT), sd.vae, torch.device("cpu")) for _ in range(2)]
    loss = train.DreamBoothLoss(sd, PROMPTS, False).to(memory_format=torch.channels_last)
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    recipe = sd.info.recipe
    groups = [{"params": sd.unet.parameters()}, {"params": sd.text_encoder.parameters(), "lr": recipe.lr_text}]
    optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=0.01, fused=True)

    def step() -> None:
        draw = draw_step(sets, batch, 1000, 0, 0)
        loss(*(tensor.flatten(0, 1) for tensor in (draw.latents, draw.noise, draw.timesteps))).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(pipeline: StableDiffusionPipeline, prompts: list[str], sets: list[Tensor], batch: int, lr: float,
               lr_text: float, encode: bool = True) -> Callable[[], None]:
    """What diffusers' examples/dreambooth/train_dreambooth.py does in a step with prior preservation and
    --train_text_encoder, on the pixels (N, 3, H, W) of instance and class; `encode=False` leaves the VAE out."""
    unet, text_encoder, vae = pipeline.unet.train(), pipeline.text_encoder.train(), pipeline.vae.requires_grad_(False)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    groups = [{"params": unet.parameters()}, {"params": text_encoder.parameters(), "lr": lr_text}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ids = pipeline.tokenizer([prompt for prompt in prompts for _ in range(batch)], truncation=True,
                             padding="max_length", return_tensors="pt").input_ids
    if not encode:
        with torch.no_grad():
            sets = [vae.encode(pixels).latent_dist.sample() for pixels in sets]

    def step() -> None:
        examples = torch.cat([pictures[torch.randint(len(pictures), (batch,))] for pictures in sets])
        latents = vae.encode(examples).latent_dist.sample() if encode else examples
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),)).long()
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(ids)[0], return_dict=False)[0]
        v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if v else noise
        (prediction, prior), (target, prior_target) = prediction.chunk(2), target.chunk(2)
        loss = F.mse_loss(prediction.float(), target.float()) + 1.0 * F.mse_loss(prior.float(), prior_target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ----------------------------------------------------------------------------------------------- sampling


def their_pipeline(weights: str | Path = TINY) -> StableDiffusionPipeline:
    """A model folder in diffusers, with DDIM and without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(weights)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_class_images(sd: tinydb.StableDiffusion, count: int, steps: int, guidance: float) -> None:
    """As train.py draws them."""
    for first in range(0, count, train.CLASS_GROUP):
        sd.generate([PROMPTS[1]] * train.CLASS_GROUP, steps=steps, guidance_scale=guidance, seed=first)


def their_class_images(pipeline: StableDiffusionPipeline, prompt: str, count: int) -> list[Image.Image]:
    """As train_dreambooth.py draws them: four at once, with the pipeline's 50 steps and guidance."""
    return [image for _ in range(0, count, 4) for image in pipeline([prompt] * 4).images]


# ----------------------------------------------------------------------------------------- whole processes


# The shortest script that draws a picture with diffusers, up to its first step.
THEIR_START = f"""
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({str(TINY)!r})
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline(["a dog on the moon"] * 4, num_inference_steps=1)
"""


# A small process between this one and what is measured: a child's peak begins at its parent's size.
MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def process(*command: object) -> tuple[float, float]:
    """Seconds, and peak resident bytes, of a Python process."""
    printed = subprocess.run([sys.executable, "-c", MEASURED, *map(str, command)], check=True, stdout=subprocess.PIPE)
    seconds, peak = map(float, printed.stdout.split())
    return seconds, peak


def their_job(weights: str, out: str, images: str, noun: str, class_images: str, steps: str, batch: str,
              lr: str, lr_text: str) -> None:
    """The whole of train_dreambooth.py's computation: class images at the pipeline's defaults, training, saving.

    `class_images` is how many of them, or a folder that has them already.
    """
    torch.manual_seed(0)
    pipeline, class_prompt = their_pipeline(weights), train.a_photo_of(noun)
    folder = Path(class_images)
    drawn = pictures(folder) if folder.is_dir() else their_class_images(pipeline, class_prompt, int(class_images))
    sets = [to_pixels(pictures(Path(images))), to_pixels(drawn)]
    step = their_step(pipeline, [f"a photo of ohwx {noun}", class_prompt], sets, int(batch), float(lr),
                      float(lr_text))
    for _ in range(int(steps)):
        step()
    pipeline.save_pretrained(out)
    shutil.copy(Path(weights) / "tinydb.json", out)  # the recipe to sample with


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Row:
    """What is measured: callables that return a number (seconds, or bytes), and the arithmetic of ours."""

    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    goal: float
    floor: Callable[[], object] | None = None  # work whose FLOPs are counted
    optimizer_bytes: float = 0.0
    repeats: int | None = None


def rows(settings: Settings, folder: Path) -> list[Row]:
    """The table of the project's goals."""
    sd, pipeline, recipe = tinydb.load(TINY), their_pipeline(), tinydb.load(TINY).info.recipe
    sets = [to_pixels(pictures(SUBJECT))] * 2
    parameters = sum(p.numel() for part in (sd.unet, sd.text_encoder) for p in part.parameters())

    def step_row(name: str, batch: int, goal: float, encode: bool = True) -> Row:
        ours = our_step(batch)
        theirs = their_step(their_pipeline(), PROMPTS, sets, batch, recipe.lr, recipe.lr_text, encode)
        return Row(name, lambda: timed(ours), lambda: timed(theirs), goal, ours, 28 * parameters)

    def four(steps: int) -> Row:
        prompts = ["a dog on the moon"] * 4
        ours = lambda: sd.generate(prompts, steps=steps, guidance_scale=7.5)  # noqa: E731
        return Row(f"4 images, {steps} steps, guidance", lambda: timed(ours),
                   lambda: timed(lambda: pipeline(prompts, num_inference_steps=steps)), 0.85, ours)

    def class_row(name: str, steps: int, guidance: float, goal: float) -> Row:
        ours = lambda: our_class_images(sd, settings.images, steps, guidance)  # noqa: E731
        theirs = lambda: their_class_images(pipeline, PROMPTS[1], settings.images)  # noqa: E731
        return Row(name, lambda: timed(ours), lambda: timed(theirs), goal, ours, repeats=2)

    def sampling(index: int, steps: int) -> tuple[Callable[[], float], Callable[[], float]]:
        script = THEIR_START.replace("num_inference_steps=1", f"num_inference_steps={steps}")
        return (lambda: process(ROOT / "sample.py", "a dog on the moon", "--weights", TINY, "--steps", steps,
                                "--out", folder)[index],
                lambda: process("-c", script)[index])

    job = (SUBJECT, "dog", recipe.class_images, recipe.steps, recipe.batch, recipe.lr, recipe.lr_text)
    jobs = iter(range(1000))
    return [
        step_row("step, batch 4+4", 4, 0.55),
        step_row("step, batch 1+1", 1, 0.55),
        step_row("step, batch 4+4, no VAE on either side", 4, 0.9, encode=False),
        four(50),
        class_row(f"{settings.images} class images, same sampler", 50, 7.5, 0.8),
        class_row(f"{settings.images} class images, by the recipe", recipe.class_steps, recipe.class_guidance, 0.5),
        Row("cold start to the first step", *sampling(0, 1), 0.45),
        Row("peak memory of sampling", *sampling(1, 20), 0.65, repeats=2),
        Row("the whole job",
            lambda: process(ROOT / "train.py", "--images", SUBJECT, "--class", "dog", "--weights", TINY,
                            "--out", folder / f"job-{next(jobs)}")[0],
            lambda: process(__file__, "--their-job", TINY, folder / "theirs", *job)[0], 0.5, repeats=1),
    ]


def main(settings: Settings) -> None:
    for library in (logging, transformers.utils.logging):
        library.disable_progress_bar()
    flops, bandwidth = measured_rates()
    print(f"{torch.get_num_threads()} threads, {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    print("| row | ours | diffusers | ratio | goal | floor |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(settings, Path(folder)):
            if settings.rows not in row.name:
                continue
            if row.repeats != 1:
                row.ours(), row.theirs()  # warm up
            ours, theirs = [], []
            for _ in range(row.repeats or settings.repeats):
                ours.append(row.ours())
                theirs.append(row.theirs())
            ours, theirs = statistics.median(ours), statistics.median(theirs)
            floor = ""
            if row.floor:
                with FlopCounterMode(display=False) as counter:
                    row.floor()
                floor = f"{100 * (counter.get_total_flops() / flops + row.optimizer_bytes / bandwidth) / ours:.0f}%"
            scale, unit = (1e-6, "MB") if "memory" in row.name else (1, "s")
            print(f"| {row.name} | {ours * scale:.3g} {unit} | {theirs * scale:.3g} {unit} | {ours / theirs:.2f} | "
                  f"{row.goal} | {floor} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--their-job"]:
        their_job(*sys.argv[2:])
    else:
        main(Settings(**vars(Parser(Settings, __doc__.splitlines()[0]).parse_args())))

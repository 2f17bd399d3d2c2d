"""Speed and memory, side by side with diffusers: one table, ours and theirs measured in turn on this machine.

    python tests/benchmark.py                     # all rows on weights/tiny, half an hour on two cores
    python tests/benchmark.py --rows step         # those whose name contains a word
    python tests/benchmark.py --device cuda       # Stable Diffusion 1.5's shapes, random weights, bf16

Every row is a median, after one warm-up; whole jobs and GPU memory are measured once, as they come. "floor" is what the
arithmetic (counted by torch's FlopCounterMode) and the optimizer's memory traffic would take at the rates that this
machine reached on a large matrix product and a large copy.
"""

import gc
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tinydb  # noqa: E402
import train  # noqa: E402
from convert_weights import SD1  # noqa: E402
from tinydb.config import InputError, ModelInfo, Parser, option  # noqa: E402
from tinydb.data import Latents, draw_step, fit, open_picture  # noqa: E402
from tinydb.diffusion import NoiseSchedule  # noqa: E402
from tinydb.pictures import to_pixels  # noqa: E402
from tinydb.pipeline import PARTS, StableDiffusion, choose_device  # noqa: E402
from tinydb.tokenizer import CLIPTokenizer  # noqa: E402

TINY, SUBJECT = ROOT / "weights" / "tiny", ROOT / "weights" / "subjects" / "rex"
PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]


@dataclass(frozen=True)
class Settings:
    """The command line."""

    rows: str = option("", "measure only rows whose name contains this")
    repeats: int = option(5, "measurements of each side of a row that has no number of its own", type=int)
    images: int = option(24, "class images to draw where a row is about class images", type=int)
    device: str = option("cpu", "cuda measures Stable Diffusion 1.5 there", choices=("cpu", "cuda"))


@dataclass(frozen=True)
class Model:
    """What is measured: a model folder on a device, whose arithmetic is in `dtype`."""

    folder: Path
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """As train.py has it; accelerate, which train_dreambooth.py uses, keeps the cache."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def ours(self) -> StableDiffusion:
        return tinydb.load(self.folder, self.device, self.dtype)

    def theirs(self, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
        """In diffusers, with DDIM and without a progress bar."""
        pipeline = StableDiffusionPipeline.from_pretrained(self.folder)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device, dtype or self.dtype)


def stable_diffusion(folder: Path) -> Path:
    """A folder of Stable Diffusion 1.5's shapes with random weights, and the tokenizer of the model in the box."""
    from conftest import randomize  # here, since it imports what their job should not wait for

    models = [randomize(model_class(getattr(SD1, part)).requires_grad_(False), seed=0)
              for part, (model_class, _) in PARTS.items()]
    tiny = CLIPTokenizer.read(TINY / "tokenizer")
    tokenizer = CLIPTokenizer(tiny.vocab, tiny.merges, tiny.pad, max_length=77)
    StableDiffusion(*models, tokenizer, NoiseSchedule(SD1.schedule), SD1.info).save(folder, torch.float16)
    return folder


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def peak(work: Callable[[], object]) -> float:
    """Bytes of GPU memory that `work` needs at once."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product in `dtype`, bytes/s of a copy (read and written)."""
    side = 2048 if device.type == "cpu" else 8192
    a, big = torch.randn(side, side, device=device, dtype=dtype), torch.ones(64 * 2**20, device=device)
    other = big.clone()
    product, copy = (min(timed(work) for _ in range(5)) for work in (lambda: a @ a, lambda: other.copy_(big)))
    return 2 * side**3 / product, 2 * big.nbytes / copy


# ------------------------------------------------------------------------------------------- training steps


def pictures(folder: Path, resolution: int) -> list[Image.Image]:
    """The pictures in a folder as the model sees them."""
    return [fit(open_picture(path), resolution) for path in sorted(folder.glob("*.png"))]


def resolution_of(pipeline: StableDiffusionPipeline) -> int:
    """Pixels of the pictures that a model was made for."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def trained_parameters(folder: Path) -> int:
    """How many numbers a step changes: those of UNet and text encoder."""
    with torch.device("meta"):
        models = [model_class(config_class.read(folder / part / "config.json"))
                  for part, (model_class, config_class) in PARTS.items() if part != "vae"]
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def our_step(model: Model, batch: int, *, checkpointing: bool = False, compiled: bool = False) -> Callable[[], None]:
    """What train.py does in a step."""
    sd = tinydb.load(model.folder, model.device)
    with model.autocast():
        sets = [Latents.of(pictures(SUBJECT, sd.resolution), sd.vae, model.device) for _ in range(2)]
    sd.vae.to("cpu")
    loss = train.DreamBoothLoss(sd, PROMPTS, False).to(memory_format=torch.channels_last)
    if checkpointing:
        train.recompute_activations(loss)
    if compiled:
        sd.unet.compile()
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    recipe = sd.info.recipe
    groups = [{"params": sd.unet.parameters()}, {"params": sd.text_encoder.parameters(), "lr": recipe.lr_text}]
    optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=0.01, fused=True)

    def step() -> None:
        draw = draw_step(sets, batch, 1000, 0, 0)
        tensors = (draw.latents, draw.noise, draw.timesteps)
        with model.autocast():
            losses = loss(*(tensor.flatten(0, 1).to(model.device) for tensor in tensors))
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(model: Model, pipeline: StableDiffusionPipeline, prompts: list[str], sets: list[Tensor], batch: int,
               lr: float, lr_text: float, *, encode: bool = True, compiled: bool = False) -> Callable[[], None]:
    """What diffusers' examples/dreambooth/train_dreambooth.py does in a step with prior preservation and
    --train_text_encoder, on the pixels (N, 3, H, W) of instance and class; `encode=False` leaves the VAE out."""
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    vae = pipeline.vae.requires_grad_(False).to(model.dtype)
    if compiled:
        unet.compile()
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    groups = [{"params": unet.parameters()}, {"params": text_encoder.parameters(), "lr": lr_text}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ids = pipeline.tokenizer([prompt for prompt in prompts for _ in range(batch)], truncation=True,
                             padding="max_length", return_tensors="pt").input_ids.to(model.device)
    if not encode:
        with torch.no_grad():
            sets = [vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample() for pixels in sets]

    def step() -> None:
        examples = torch.cat([pictures[torch.randint(len(pictures), (batch,))] for pictures in sets])
        examples = examples.to(vae.device, vae.dtype)
        latents = vae.encode(examples).latent_dist.sample() if encode else examples
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=latents.device).long()
        noisy = schedule.add_noise(latents, noise, timesteps)
        with model.autocast():
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


def their_step_on_subject(model: Model, batch: int, **settings: bool) -> Callable[[], None]:
    """The same on the pictures that our step is measured on."""
    pipeline, recipe = model.theirs(torch.float32), ModelInfo.read(model.folder / "tinydb.json").recipe
    sets = [to_pixels(pictures(SUBJECT, resolution_of(pipeline)))] * 2
    return their_step(model, pipeline, PROMPTS, sets, batch, recipe.lr, recipe.lr_text, **settings)


# ----------------------------------------------------------------------------------------------- sampling


def our_class_images(sd: StableDiffusion, count: int, steps: int, guidance: float) -> None:
    """As train.py draws them."""
    for first in range(0, count, train.CLASS_GROUP):
        group = min(train.CLASS_GROUP, count - first)
        sd.generate([PROMPTS[1]] * group, steps=steps, guidance_scale=guidance, seed=first)


def their_class_images(pipeline: StableDiffusionPipeline, prompt: str, count: int) -> list[Image.Image]:
    """As train_dreambooth.py draws them: four at once, with the pipeline's 50 steps and guidance."""
    return [image for first in range(0, count, 4) for image in pipeline([prompt] * min(4, count - first)).images]


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


def their_job(device: str, weights: str, out: str, images: str, noun: str, class_images: str, steps: str, batch: str,
              lr: str, lr_text: str) -> None:
    """The whole of train_dreambooth.py's computation: class images at the pipeline's defaults, training, saving.

    `class_images` is how many of them, or a folder that has them already.
    """
    torch.manual_seed(0)
    model, class_prompt = Model(Path(weights), *choose_device(device, "auto")), train.a_photo_of(noun)
    pipeline = model.theirs(torch.float32)
    resolution = resolution_of(pipeline)
    if Path(class_images).is_dir():
        drawn = pictures(Path(class_images), resolution)
    else:
        drawn = their_class_images(model.theirs(), class_prompt, int(class_images))
    sets = [to_pixels(pictures(Path(images), resolution)), to_pixels(drawn)]
    step = their_step(model, pipeline, [f"a photo of ohwx {noun}", class_prompt], sets, int(batch), float(lr),
                      float(lr_text))
    for _ in range(int(steps)):
        step()
    pipeline.save_pretrained(out)
    shutil.copy(Path(weights) / "tinydb.json", out)  # the recipe to sample with


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Row:
    """What is measured. `sides` makes two callables that return a number, seconds or bytes: ours and theirs."""

    name: str
    goal: str  # the ratio or, on a GPU, our own number
    sides: Callable[[], tuple[Callable[[], float], Callable[[], float]]]
    has_floor: bool = False  # our FLOPs can be counted: it all happens in this process
    optimizer_bytes: float = 0.0
    repeats: int | None = None


def step_row(model: Model, name: str, batch: int, goal: str, *, encode: bool = True, compiled: bool = False) -> Row:
    """A training step. AdamW reads weight, gradient and two moments and writes all but the gradient: 28 bytes each."""
    def sides() -> tuple[Callable[[], float], Callable[[], float]]:
        ours = our_step(model, batch, compiled=compiled)
        theirs = their_step_on_subject(model, batch, encode=encode, compiled=compiled)
        return lambda: timed(ours), lambda: timed(theirs)

    return Row(name, goal, sides, not compiled, 28 * trained_parameters(model.folder), repeats=20)


def draw_row(model: Model, name: str, count: int, goal: str, *, compiled: bool = False) -> Row:
    """Pictures of 50 steps with guidance, all of them at once."""
    def sides() -> tuple[Callable[[], float], Callable[[], float]]:
        sd, pipeline, prompts = model.ours(), model.theirs(), ["a dog on the moon"] * count
        if compiled:
            sd.unet.compile()
            pipeline.unet.compile()
        return (lambda: timed(lambda: sd.generate(prompts, steps=50, guidance_scale=7.5)),
                lambda: timed(lambda: pipeline(prompts, num_inference_steps=50)))

    return Row(name, goal, sides, not compiled)


def class_row(model: Model, name: str, count: int, steps: int, guidance: float, goal: str) -> Row:
    """Class images: ours with these steps and guidance, theirs with the pipeline's own."""
    def sides() -> tuple[Callable[[], float], Callable[[], float]]:
        sd, pipeline = model.ours(), model.theirs()
        return (lambda: timed(lambda: our_class_images(sd, count, steps, guidance)),
                lambda: timed(lambda: their_class_images(pipeline, PROMPTS[1], count)))

    return Row(name, goal, sides, True, repeats=2)


def sampling_row(name: str, index: int, steps: int, goal: str, folder: Path, repeats: int | None = None) -> Row:
    """Seconds (index 0) or peak memory (1) of the whole process that draws four pictures with the model in the box."""
    script = THEIR_START.replace("num_inference_steps=1", f"num_inference_steps={steps}")
    ours = (ROOT / "sample.py", "a dog on the moon", "--weights", TINY, "--steps", steps, "--device", "cpu",
            "--out", folder / "samples")
    return Row(name, goal, lambda: (lambda: process(*ours)[index], lambda: process("-c", script)[index]),
               repeats=repeats)


def job_row(model: Model, goal: str, folder: Path, *options: object) -> Row:
    """All that train.py does by the recipe, from the first import to the saved model. Of class images we draw as many,
    in the recipe's steps; theirs take the pipeline's 50."""
    recipe = ModelInfo.read(model.folder / "tinydb.json").recipe
    ours = (ROOT / "train.py", "--images", SUBJECT, "--class", "dog", "--weights", model.folder, "--device",
            model.device, "--out", folder / "job", *options)
    theirs = (__file__, "--their-job", model.device, model.folder, folder / "theirs", SUBJECT, "dog",
              recipe.class_images, recipe.steps, recipe.batch, recipe.lr, recipe.lr_text)
    return Row("the whole job", goal, lambda: (lambda: process(*ours)[0], lambda: process(*theirs)[0]), repeats=1)


def memory_row(model: Model, name: str, goal: str, **settings: bool) -> Row:
    """Peak memory of a GPU over a training step of 1+1."""
    def twice(make_step: Callable[[], Callable[[], None]]) -> float:
        """With the optimizer's moments, which the first step makes."""
        def work() -> None:
            step = make_step()
            step()
            step()
        return peak(work)

    return Row(name, goal, lambda: (lambda: twice(lambda: our_step(model, 1, **settings)),
                                    lambda: twice(lambda: their_step_on_subject(model, 1))), repeats=1)


def cpu_rows(images: int, folder: Path) -> list[Row]:
    """The model in the box."""
    model, recipe = Model(TINY, torch.device("cpu"), torch.float32), ModelInfo.read(TINY / "tinydb.json").recipe
    return [
        step_row(model, "step, batch 4+4", 4, "0.55"),
        step_row(model, "step, batch 1+1", 1, "0.55"),
        step_row(model, "step, batch 4+4, no VAE on either side", 4, "0.9", encode=False),
        draw_row(model, "4 images, 50 steps, guidance", 4, "0.85"),
        class_row(model, f"{images} class images, same sampler", images, 50, 7.5, "0.8"),
        class_row(model, f"{images} class images, by the recipe", images, recipe.class_steps, recipe.class_guidance,
                  "0.5"),
        sampling_row("cold start to the first step", 0, 1, "0.45", folder),
        sampling_row("peak memory of sampling", 1, 20, "0.65", folder, repeats=2),
        job_row(model, "0.5", folder),
    ]


def gpu_rows(folder: Path) -> list[Row]:
    """Stable Diffusion 1.5 at 512 pixels, in bf16 where the GPU can."""
    model = Model(stable_diffusion(folder / "sd15"), *choose_device("cuda", "auto"))
    return [
        draw_row(model, "1 image, 50 steps, guidance", 1, "0.76 s"),
        draw_row(model, "1 image, 50 steps, guidance, compiled", 1, "0.76 s", compiled=True),
        draw_row(model, "16 images, 50 steps, guidance", 16, "floor 50%"),
        step_row(model, "step, batch 1+1", 1, "0.032 s"),
        step_row(model, "step, batch 1+1, compiled", 1, "0.032 s", compiled=True),
        step_row(model, "step, batch 8+8", 8, "floor 40%"),
        memory_row(model, "peak memory of a step", "8000 MB"),
        memory_row(model, "peak memory of a step, --checkpointing", "8000 MB", checkpointing=True),
        job_row(model, "92 s", folder, "--save-every", 0),
    ]


def measure(row: Row, repeats: int, flops: float, bandwidth: float) -> str:
    """A row of the table."""
    sides = row.sides()
    if row.repeats != 1:
        for side in sides:  # warm up
            side()
    numbers = [[side() for side in sides] for _ in range(row.repeats or repeats)]
    ours, theirs = (statistics.median(values) for values in zip(*numbers))
    floor = ""
    if row.has_floor:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others are not counted
            sides[0]()
        floor = f"{100 * (counter.get_total_flops() / flops + row.optimizer_bytes / bandwidth) / ours:.0f}%"
    scale, unit = (1e-6, "MB") if "memory" in row.name else (1, "s")
    return (f"| {row.name} | {ours * scale:.3g} {unit} | {theirs * scale:.3g} {unit} | {ours / theirs:.2f} | "
            f"{row.goal} | {floor} |")


def main(settings: Settings) -> None:
    for library in (logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    device, dtype = choose_device(settings.device, "auto")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        rows = gpu_rows(Path(folder)) if on_gpu else cpu_rows(settings.images, Path(folder))
        flops, bandwidth = measured_rates(device, dtype)
        machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        print(f"{machine}, {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
        print("| row | ours | diffusers | ratio | goal | floor |\n|---|---:|---:|---:|---:|---:|", flush=True)
        for row in rows:
            if settings.rows in row.name:
                print(measure(row, settings.repeats, flops, bandwidth), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--their-job"]:
        their_job(*sys.argv[2:])
    else:
        parser = Parser(Settings, __doc__.splitlines()[0])
        try:
            main(Settings(**vars(parser.parse_args())))
        except InputError as error:
            parser.error(str(error))

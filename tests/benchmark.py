"""Speed and memory, side by side with diffusers: one table, ours and theirs measured in turn on this machine.

    python tests/benchmark.py                     # all rows on weights/tiny, half an hour on two cores
    python tests/benchmark.py --rows step         # those whose name contains a word
    python tests/benchmark.py --device cuda       # Stable Diffusion 1.5's shapes, random weights, bf16

Every row is a median, after one warm-up; whole jobs and GPU memory are measured once, without one. "floor" is the part
of our time that the arithmetic (counted by torch's FlopCounterMode) and the optimizer's memory traffic would take at
the rates that this machine reaches on a large matrix product and a large copy.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "weights")]
import reference  # noqa: E402
import tinydb  # noqa: E402
import train  # noqa: E402
from convert_weights import SD1  # noqa: E402
from tinydb import cli  # noqa: E402
from tinydb.class_images import GROUP  # noqa: E402
from tinydb.cli import choose_device, choose_dtype, option  # noqa: E402
from tinydb.config import Checked, ModelInfo, Recipe  # noqa: E402
from tinydb.data import Latents, random_batch, read_pictures  # noqa: E402
from tinydb.diffusion import NoiseSchedule  # noqa: E402
from tinydb.pipeline import PARTS, StableDiffusion  # noqa: E402
from tinydb.tokenizer import CLIPTokenizer  # noqa: E402

TINY, SUBJECT = ROOT / "weights" / "tiny", ROOT / "weights" / "subjects" / "rex"
PROMPTS = ["a photo of ohwx dog", "a photo of a dog"]

Measured = Callable[[], float]  # does the work and returns seconds or bytes


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    rows: str = option("", "measure only rows whose name contains this")
    repeats: int = option(5, "measurements of each side of a row that has no number of its own", least=1)
    images: int = option(24, "class images to draw where a row is about class images", least=1)
    device: str = option("cpu", "cuda measures Stable Diffusion 1.5 there", choices=("cpu", "cuda"))


@dataclass(frozen=True)
class Model:
    """What is measured: a model folder on a device, and the precision of the arithmetic."""

    folder: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def recipe(self) -> Recipe:
        return ModelInfo.read(self.folder / "tinydb.json").recipe

    def ours(self) -> StableDiffusion:
        return tinydb.load(self.folder, self.device, self.dtype)

    def theirs(self) -> StableDiffusionPipeline:
        return reference.load_pipeline(self.folder, self.device, self.dtype)


def stable_diffusion(folder: Path) -> Path:
    """A folder of Stable Diffusion 1.5's shapes with random weights, and the tokenizer of the model in the box."""
    models = [model_class(getattr(SD1, part)).requires_grad_(False) for part, (model_class, _) in PARTS.items()]
    for embedding in models[0].text_model.embeddings.values():
        nn.init.normal_(embedding.weight)  # tinydb leaves them empty
    tiny = CLIPTokenizer.read(TINY / "tokenizer")
    tokenizer = CLIPTokenizer(tiny.vocab, tiny.merges, tiny.pad, max_length=77)
    StableDiffusion(*models, tokenizer, NoiseSchedule(SD1.schedule), SD1.info).save(folder, torch.float16)
    return folder


# ------------------------------------------------------------------------------------------------ measuring


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def peak(make_step: Callable[[], Callable[[], None]]) -> float:
    """Bytes of GPU memory that training needs at once: in the second step, since the first makes the optimizer's
    moments."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step = make_step()
    step()
    step()
    return torch.cuda.max_memory_allocated()


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


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product in `dtype`, bytes/s of a copy (read and written)."""
    side = 2048 if device.type == "cpu" else 8192
    a, big = torch.randn(side, side, device=device, dtype=dtype), torch.ones(64 * 2**20, device=device)
    other = big.clone()
    product = min(timed(lambda: a @ a) for _ in range(5))
    copy = min(timed(lambda: other.copy_(big)) for _ in range(5))
    return 2 * side**3 / product, 2 * big.nbytes / copy


# ------------------------------------------------------------------------------------- what both sides do


def our_step(model: Model, batch: int, *, recompute: bool = False, compiled: bool = False) -> Callable[[], None]:
    """What train.py does in a step, `batch` pictures of the subject and as many for the class."""
    sd, recipe = tinydb.load(model.folder, model.device), model.recipe
    pictures, _ = read_pictures(SUBJECT, sd.resolution)

    def autocast() -> torch.autocast:
        enabled = model.dtype != torch.float32
        return torch.autocast(model.device.type, model.dtype, enabled=enabled, cache_enabled=False)

    with autocast():
        latents = Latents.of(pictures.values(), sd.vae, model.device)
    sd.vae.to("cpu")
    prompts = [len(pictures) * [prompt] for prompt in PROMPTS]
    loss = train.DreamBoothLoss(sd, prompts, freeze_text=False).to(memory_format=torch.channels_last)
    if recompute:
        train.recompute_activations(loss)
    if compiled:
        sd.unet.compile()
    trained = [*sd.unet.parameters(), *sd.text_encoder.parameters()]
    groups = [{"params": sd.unet.parameters()}, {"params": sd.text_encoder.parameters(), "lr": recipe.lr_text}]
    optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=0.01, fused=True)

    def step() -> None:
        examples = random_batch([latents, latents], batch, sd.schedule.config.num_train_timesteps, seed=0, step=0)
        with autocast():
            losses = loss(examples.to(model.device))
        losses.sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(model: Model, batch: int, **settings: bool) -> Callable[[], None]:
    """What diffusers does in a step, on the same pictures."""
    pipeline = reference.load_pipeline(model.folder, model.device)
    pixels, _ = reference.read_pixels(SUBJECT, pipeline)
    prompts = [len(pixels) * [prompt] for prompt in PROMPTS]
    return reference.training_step(pipeline, prompts, [pixels, pixels], batch, model.recipe, model.dtype, **settings)


def our_class_images(sd: StableDiffusion, count: int, steps: int, guidance: float) -> None:
    """As train.py draws them."""
    for first in range(0, count, GROUP):
        prompts = [PROMPTS[1]] * min(GROUP, count - first)
        sd.generate(prompts, steps=steps, guidance_scale=guidance, seed=first)


def trained_parameters(folder: Path) -> int:
    """How many numbers a step changes: those of UNet and text encoder."""
    with torch.device("meta"):
        models = [model_class(config_class.read(folder / part / "config.json"))
                  for part, (model_class, config_class) in PARTS.items() if part != "vae"]
    return sum(parameter.numel() for model in models for parameter in model.parameters())


# The shortest script that draws pictures with diffusers.
THEIR_SAMPLING = f"""
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({str(TINY)!r})
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline(["a dog on the moon"] * 4, num_inference_steps=STEPS)
"""


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Row:
    """A row of the table. `sides` prepares both sides and returns what measures them, ours and theirs."""

    name: str
    goal: str  # the ratio or, on a GPU, our own number
    sides: Callable[[], tuple[Measured, Measured]]
    traffic: float | None = None  # bytes that our optimizer moves; None: no floor, our FLOPs cannot be counted
    repeats: int | None = None


def step_row(model: Model, name: str, batch: int, goal: str, *, encode: bool = True, compiled: bool = False) -> Row:
    """A training step. AdamW reads weight, gradient and two moments and writes all but the gradient: 28 bytes each."""
    def sides() -> tuple[Measured, Measured]:
        ours = our_step(model, batch, compiled=compiled)
        theirs = their_step(model, batch, encode=encode, compiled=compiled)
        return lambda: timed(ours), lambda: timed(theirs)

    return Row(name, goal, sides, None if compiled else 28 * trained_parameters(model.folder), repeats=20)


def draw_row(model: Model, name: str, count: int, goal: str, *, compiled: bool = False) -> Row:
    """Pictures of 50 steps with guidance, all of them at once."""
    def sides() -> tuple[Measured, Measured]:
        sd, pipeline, prompts = model.ours(), model.theirs(), ["a dog on the moon"] * count
        if compiled:
            sd.unet.compile()
            pipeline.unet.compile()
        return (lambda: timed(lambda: sd.generate(prompts, steps=50, guidance_scale=7.5)),
                lambda: timed(lambda: pipeline(prompts, num_inference_steps=50)))

    return Row(name, goal, sides, None if compiled else 0)


def class_row(model: Model, name: str, count: int, steps: int, guidance: float, goal: str) -> Row:
    """Class images: ours with these steps and guidance, theirs with the pipeline's own."""
    def sides() -> tuple[Measured, Measured]:
        sd, pipeline = model.ours(), model.theirs()
        return (lambda: timed(lambda: our_class_images(sd, count, steps, guidance)),
                lambda: timed(lambda: reference.draw_class_images(pipeline, PROMPTS[1], count)))

    return Row(name, goal, sides, 0, repeats=2)


def sampling_row(name: str, index: int, steps: int, goal: str, folder: Path, repeats: int | None = None) -> Row:
    """Seconds (index 0) or peak memory (1) of the whole process that draws four pictures with the model in the box."""
    ours = (ROOT / "sample.py", "a dog on the moon", "--weights", TINY, "--steps", steps, "--device", "cpu",
            "--out", folder / "samples")
    theirs = ("-c", THEIR_SAMPLING.replace("STEPS", str(steps)))
    return Row(name, goal, lambda: (lambda: process(*ours)[index], lambda: process(*theirs)[index]), repeats=repeats)


def job_row(model: Model, goal: str, folder: Path, *options: object) -> Row:
    """The whole of train.py by the recipe, from the first import to the saved model. Both sides draw as many class
    images: we in the recipe's steps, diffusers in the pipeline's 50."""
    same = ("--images", SUBJECT, "--class", "dog", "--weights", model.folder, "--device", model.device)
    ours = (ROOT / "train.py", *same, "--out", folder / "ours", *options)
    theirs = (ROOT / "weights" / "reference.py", *same, "--out", folder / "theirs")
    return Row("the whole job", goal, lambda: (lambda: process(*ours)[0], lambda: process(*theirs)[0]), repeats=1)


def memory_row(model: Model, name: str, goal: str, *, recompute: bool = False) -> Row:
    """Peak memory of a GPU over a training step of 1+1."""
    return Row(name, goal, lambda: (lambda: peak(lambda: our_step(model, 1, recompute=recompute)),
                                    lambda: peak(lambda: their_step(model, 1))), repeats=1)


def cpu_rows(images: int, folder: Path) -> list[Row]:
    """The model in the box."""
    model = Model(TINY, torch.device("cpu"), torch.float32)
    recipe = model.recipe
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
    device = choose_device("cuda")
    model = Model(stable_diffusion(folder / "sd15"), device, choose_dtype("auto", device))
    return [
        draw_row(model, "1 image, 50 steps, guidance", 1, "0.76 s"),
        draw_row(model, "1 image, 50 steps, guidance, compiled", 1, "0.76 s", compiled=True),
        draw_row(model, "16 images, 50 steps, guidance", 16, "floor 50%"),
        step_row(model, "step, batch 1+1", 1, "0.032 s"),
        step_row(model, "step, batch 1+1, compiled", 1, "0.032 s", compiled=True),
        step_row(model, "step, batch 8+8", 8, "floor 40%"),
        memory_row(model, "peak memory of a step", "8000 MB"),
        memory_row(model, "peak memory of a step, --recompute", "8000 MB", recompute=True),
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
    if row.traffic is not None:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others are not counted
            sides[0]()
        floor = f"{100 * (counter.get_total_flops() / flops + row.traffic / bandwidth) / ours:.0f}%"
    scale, unit = (1e-6, "MB") if "memory" in row.name else (1, "s")
    return (f"| {row.name} | {ours * scale:.3g} {unit} | {theirs * scale:.3g} {unit} | {ours / theirs:.2f} | "
            f"{row.goal} | {floor} |")


def main(settings: Settings) -> None:
    device = choose_device(settings.device)
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        rows = gpu_rows(Path(folder)) if on_gpu else cpu_rows(settings.images, Path(folder))
        flops, bandwidth = measured_rates(device, choose_dtype("auto", device))
        machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        print(f"{machine}, {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
        print("| row | ours | diffusers | ratio | goal | floor |\n|---|---:|---:|---:|---:|---:|", flush=True)
        for row in rows:
            if settings.rows in row.name:
                print(measure(row, settings.repeats, flops, bandwidth), flush=True)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Measure fewer rows with --rows")

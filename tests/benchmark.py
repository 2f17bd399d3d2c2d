"""Speed and memory, side by side with diffusers: one table, ours and theirs measured on this machine.

    python tests/benchmark.py                     # the model in the box, half an hour on two cores
    python tests/benchmark.py --rows step         # rows whose name contains a word
    python tests/benchmark.py --device cuda       # Stable Diffusion 1.5's shapes, random weights, bf16: some minutes

Every number is a median after a warm-up; whole jobs are measured once. On a CPU both sides take turns; on a GPU one
side has all of the memory, and our steps are those of train.py's own loop. "floor" is the part of our time that the
arithmetic (counted by torch's FlopCounterMode) and the optimizer's memory traffic would take at the rates that this
machine reaches on a large matrix product and a large copy. "goal" is the ratio that we aim for, "planned" what train.py
says at its start, and "waits" how often the CPU waits for the GPU in a step, or in a drawing.
"""

import gc
import io
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
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
STEPS = 10  # of a training on a GPU

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


# A small process between this one and what is measured: a child's peak begins at its parent's size.
MEASURED = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
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


def our_step(model: Model, batch: int, lora: int) -> Callable[[], None]:
    """What train.py does in a step, `batch` pictures of the subject and as many for the class, to the model itself or
    to low-rank updates of that rank."""
    sd = tinydb.load(model.folder, model.device)
    settings = train.Settings(images=str(SUBJECT), class_noun="dog", lora=lora, frozen_prior=False)
    pictures, _ = read_pictures(SUBJECT, sd.resolution)

    def autocast() -> torch.autocast:
        enabled = model.dtype != torch.float32
        return torch.autocast(model.device.type, model.dtype, enabled=enabled, cache_enabled=False)

    latents = Latents.of(pictures.values(), sd.vae, model.device)
    sd.vae.to("cpu")
    prompts = [len(pictures) * [prompt] for prompt in PROMPTS]
    loss, optimizer = train.trainable(sd, model.folder, prompts, settings.resolve(model.recipe), model.dtype)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        num_timesteps = sd.schedule.config.num_train_timesteps
        examples = random_batch([latents, latents], [batch, batch], num_timesteps, seed=0, step=0)
        with autocast():
            losses = loss([of_set.to(model.device) for of_set in examples])
        losses.sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(model: Model, batch: int, encode: bool = True) -> Callable[[], None]:
    """What diffusers does in a step, on the same pictures."""
    pipeline = reference.load_pipeline(model.folder, model.device)
    pixels, _ = reference.read_pixels(SUBJECT, pipeline)
    prompts = [len(pixels) * [prompt] for prompt in PROMPTS]
    return reference.training_step(pipeline, prompts, [pixels, pixels], batch, model.recipe, model.dtype, encode=encode)


def our_class_images(sd: StableDiffusion, count: int, recipe: Recipe) -> None:
    """As train.py draws them."""
    for first in range(0, count, GROUP):
        prompts = [PROMPTS[1]] * min(GROUP, count - first)
        sd.generate(prompts, steps=recipe.class_steps, sampler=recipe.class_sampler,
                    guidance_scale=recipe.class_guidance, guidance_stop=1.0, seed=first)


def networks(model: Model) -> list[nn.Module]:
    """Text encoder, UNet and VAE without memory behind them, to count with."""
    with torch.device("meta"):
        return [model_class(config_class.read(model.folder / part / "config.json"))
                for part, (model_class, config_class) in PARTS.items()]


@dataclass(frozen=True)
class Floor:
    """What a row cannot do without: floating-point operations, and bytes that the optimizer moves."""

    flops: float
    traffic: float = 0


def step_floor(model: Model, batch: int) -> Floor:
    """AdamW reads weight, gradient and two moments and writes all but the gradient: 28 bytes for each weight."""
    text_encoder, unet, _ = networks(model)
    latents = torch.empty(2 * batch, unet.config.in_channels, *2 * [unet.config.sample_size], device="meta")
    ids = torch.zeros(2, text_encoder.config.max_position_embeddings, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        text_embeds = text_encoder(ids).repeat_interleave(batch, dim=0)
        unet(latents, torch.zeros(2 * batch, device="meta"), text_embeds).sum().backward()
    weights = sum(parameter.numel() for network in (text_encoder, unet) for parameter in network.parameters())
    return Floor(counter.get_total_flops(), 28 * weights)


@torch.no_grad()
def drawing_floor(model: Model, count: int, steps: int) -> Floor:
    """Two predictions for each step of a picture, and its decoding."""
    text_encoder, unet, vae = networks(model)
    text = torch.empty(2 * count, text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size,
                       device="meta")
    latents = torch.empty(2 * count, unet.config.in_channels, *2 * [unet.config.sample_size], device="meta")
    with FlopCounterMode(display=False) as step:
        unet(latents, torch.zeros(2 * count, device="meta"), text)
    with FlopCounterMode(display=False) as decoding:
        vae.decode(latents[:count])
    return Floor(steps * step.get_total_flops() + decoding.get_total_flops())


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
    """A row of the table on a CPU. `sides` prepares both sides and returns what measures them, ours and theirs."""

    name: str
    goal: str  # the ratio
    sides: Callable[[], tuple[Measured, Measured]]
    floor: Floor | None = None
    repeats: int | None = None


def step_row(model: Model, name: str, batch: int, goal: str, *, encode: bool = True, lora: int = 0) -> Row:
    """A training step; theirs is always that of the whole model, which is what the floor is counted for."""
    def sides() -> tuple[Measured, Measured]:
        ours, theirs = our_step(model, batch, lora), their_step(model, batch, encode)
        return lambda: timed(ours), lambda: timed(theirs)

    return Row(name, goal, sides, None if lora else step_floor(model, batch), repeats=20)


def draw_row(model: Model, name: str, count: int, goal: str) -> Row:
    """Pictures of 50 steps with guidance, all of them at once."""
    def sides() -> tuple[Measured, Measured]:
        sd, pipeline, prompts = model.ours(), model.theirs(), ["a dog on the moon"] * count
        return (lambda: timed(lambda: sd.generate(prompts, steps=50, guidance_scale=7.5, guidance_stop=1.0)),
                lambda: timed(lambda: pipeline(prompts, num_inference_steps=50)))

    return Row(name, goal, sides, drawing_floor(model, count, 50))


def class_row(model: Model, name: str, count: int, recipe: Recipe, goal: str) -> Row:
    """Class images: ours by this recipe, theirs with the pipeline's own steps and guidance."""
    def sides() -> tuple[Measured, Measured]:
        sd, pipeline = model.ours(), model.theirs()
        return (lambda: timed(lambda: our_class_images(sd, count, recipe)),
                lambda: timed(lambda: reference.draw_class_images(pipeline, PROMPTS[1], count)))

    return Row(name, goal, sides, drawing_floor(model, count, recipe.class_steps), repeats=2)


def sampling_row(name: str, index: int, steps: int, goal: str, folder: Path, repeats: int | None = None) -> Row:
    """Seconds (index 0) or peak memory (1) of the whole process that draws four pictures with the model in the box."""
    ours = (ROOT / "sample.py", "a dog on the moon", "--weights", TINY, "--steps", steps, "--device", "cpu",
            "--out", folder / "samples")
    theirs = ("-c", THEIR_SAMPLING.replace("STEPS", str(steps)))
    return Row(name, goal, lambda: (lambda: process(*ours)[index], lambda: process(*theirs)[index]), repeats=repeats)


def job_row(model: Model, goal: str, folder: Path) -> Row:
    """The whole of train.py by the recipe, from the first import to the saved model. Both sides draw as many class
    images: we in the recipe's steps, diffusers in the pipeline's 50."""
    same = ("--images", SUBJECT, "--class", "dog", "--weights", model.folder, "--device", model.device)
    ours = (ROOT / "train.py", *same, "--out", folder / "ours")
    theirs = (ROOT / "weights" / "reference.py", *same, "--out", folder / "theirs")
    return Row("the whole job", goal, lambda: (lambda: process(*ours)[0], lambda: process(*theirs)[0]), repeats=1)


def cpu_rows(images: int, folder: Path) -> list[Row]:
    """The model in the box."""
    model = Model(TINY, torch.device("cpu"), torch.float32)
    return [
        step_row(model, "step, batch 4+4", 4, "0.55"),
        step_row(model, "step, batch 1+1", 1, "0.55"),
        step_row(model, "step, batch 4+4, no VAE on either side", 4, "0.9", encode=False),
        step_row(model, "step, batch 4+4, ours with --lora 8", 4, "0.6", lora=8),
        draw_row(model, "4 images, 50 steps, guidance", 4, "0.85"),
        class_row(model, f"{images} class images, same sampler", images, Recipe(), "0.8"),
        class_row(model, f"{images} class images, by the recipe", images, model.recipe, "0.5"),
        sampling_row("cold start to the first step", 0, 1, "0.45", folder),
        sampling_row("peak memory of sampling", 1, 20, "0.65", folder, repeats=2),
        job_row(model, "0.4", folder),
    ]


def measure(row: Row, repeats: int, flops: float, bandwidth: float) -> str:
    """A row of the table on a CPU."""
    sides = row.sides()
    if row.repeats != 1:
        for side in sides:  # warm up
            side()
    numbers = [[side() for side in sides] for _ in range(row.repeats or repeats)]
    ours, theirs = (statistics.median(values) for values in zip(*numbers))
    scale, unit = (1e-6, "MB") if "memory" in row.name else (1, "s")
    return (f"| {row.name} | {ours * scale:.3g} {unit} | {theirs * scale:.3g} {unit} | {ours / theirs:.2f} | "
            f"{row.goal} | {part_of(ours, row.floor, flops, bandwidth)} |")


def part_of(seconds: float, floor: Floor | None, flops: float, bandwidth: float) -> str:
    """How much of the time the floor is."""
    return f"{100 * (floor.flops / flops + floor.traffic / bandwidth) / seconds:.0f}%" if floor else ""


# -------------------------------------------------------------------------------------- the table on a GPU


@dataclass
class Numbers:
    """What one side of a row took."""

    seconds: float
    peak: float  # bytes of GPU memory
    waits: float  # in a step, or a drawing
    planned: float | None = None  # bytes that train.py announced


@contextmanager
def waits_counted() -> Iterator[list[object]]:
    """A list that gets an entry each time that the CPU waits for the GPU or, without one, would do so."""
    waits = []
    if torch.cuda.is_available():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits += [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        return

    def counted(method: Callable) -> Callable:
        def call(tensor: torch.Tensor, *arguments: object) -> object:
            waits.append(method)
            return method(tensor, *arguments)
        return call

    with ExitStack() as patches:
        for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
            patches.enter_context(mock.patch.object(torch.Tensor, name, counted(getattr(torch.Tensor, name))))
        yield waits


class Watch:
    """Stands in for the progress bar of train.py's loop, and notes what each step takes."""

    def __init__(self):
        self.seconds, self.waits = [], []

    def __call__(self, steps: Iterable[int], *arguments: object, **options: object) -> "Watch":
        self.steps = steps
        return self

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            if torch.cuda.is_available() and step < 2:  # the first step makes the moments
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with waits_counted() as waits:
                yield step
            self.seconds.append(time.perf_counter() - start)
            self.waits.append(len(waits))
        self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    def set_postfix(self, *arguments: object, **options: object) -> None:
        pass


def watched(**settings: object) -> Watch:
    """Train, by train.py's own loop, and say what it took; `planned` is what it announced."""
    watch, said = Watch(), io.StringIO()
    with mock.patch.object(train, "tqdm", watch), redirect_stderr(said), redirect_stdout(io.StringIO()):
        train.main(train.Settings(**settings))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the run had one of its own
    watch.planned = 1e9 * float(re.search(r"at once ([\d.]+)", said.getvalue())[1])
    return watch


def our_training(model: Model, folder: Path, batch: int, **flags: object) -> Numbers:
    """Steps of train.py, without class images to draw."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[model.dtype]
    settings = {"images": str(SUBJECT), "class_noun": "dog", "class_dir": str(SUBJECT), "class_images": 5,
                "weights": str(model.folder), "device": model.device.type, "precision": precision,
                "batch": batch, "steps": STEPS, "save_every": 0}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        watch = watched(**{**settings, **flags}, out=out)
    seconds, waits = (statistics.median(values[2:-1]) for values in (watch.seconds, watch.waits))
    return Numbers(seconds, watch.peak, waits, watch.planned)


def checkpoint(model: Model, folder: Path) -> Numbers:
    """The seconds of writing one."""
    seconds = []

    def save(*arguments: object) -> None:
        seconds.append(timed(lambda: original(*arguments)))

    original = train.save_checkpoint
    with mock.patch.object(train, "save_checkpoint", save):
        numbers = our_training(model, folder, 1, save_every=STEPS)
    return replace(numbers, seconds=seconds[0])


def repeated(work: Callable[[], object], times: int) -> Numbers:
    """Some work, after a warm-up."""
    work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with waits_counted() as waits:
        seconds = statistics.median(timed(work) for _ in range(times))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Numbers(seconds, peak, len(waits) / times)


def our_drawing(model: Model, count: int, steps: int) -> Numbers:
    sd = model.ours()
    return repeated(lambda: sd.generate(["a dog"] * count, steps=steps, guidance_scale=7.5, guidance_stop=1.0), 3)


def their_drawing(model: Model, count: int, steps: int) -> Numbers:
    pipeline = model.theirs()
    return repeated(lambda: pipeline(["a dog"] * count, num_inference_steps=steps), 3)


def our_class_drawing(model: Model, count: int) -> Numbers:
    sd = model.ours()
    return repeated(lambda: our_class_images(sd, count, model.recipe), 1)


def their_class_drawing(model: Model, count: int) -> Numbers:
    pipeline = model.theirs()
    return repeated(lambda: reference.draw_class_images(pipeline, PROMPTS[1], count), 1)


@dataclass
class GpuRow:
    """A row of the table on a GPU; a goal is the ratio, or a number for an H100."""

    name: str
    goal: str
    ours: Callable[[], Numbers]
    theirs: Callable[[], Numbers] | None = None
    floor: Floor | None = None


def gpu_rows(model: Model, images: int, folder: Path) -> list[GpuRow]:
    """What matters on a GPU. --accumulate, processes and --compile change a step's time in ways of their own."""
    ours, steps = partial(our_training, model, folder), model.recipe.sample_steps

    def theirs(batch: int) -> Numbers:
        return repeated(their_step(model, batch), STEPS)

    return [
        GpuRow("step, batch 1+1", "0.8, 0.06 s", lambda: ours(1), lambda: theirs(1), step_floor(model, 1)),
        GpuRow("step, batch 4+4", "0.8, 0.12 s", lambda: ours(4), lambda: theirs(4), step_floor(model, 4)),
        GpuRow("--freeze-text", "0.055 s", lambda: ours(1, freeze_text=True)),
        GpuRow("--recompute", "0.075 s", lambda: ours(1, recompute=True)),
        GpuRow("--lora 16", "0.045 s", lambda: ours(1, lora=16)),
        GpuRow("--lora 16 --recompute", "2.5 GB", lambda: ours(1, lora=16, recompute=True)),
        GpuRow("--offload", "4.5 GB, 1.6 s", lambda: ours(1, offload=True)),
        GpuRow(f"1 picture, {steps} steps", "0.9, 0.45 s", lambda: our_drawing(model, 1, steps),
               lambda: their_drawing(model, 1, steps), drawing_floor(model, 1, steps)),
        GpuRow(f"8 pictures, {steps} steps", "0.95, 1.8 s", lambda: our_drawing(model, 8, steps),
               lambda: their_drawing(model, 8, steps), drawing_floor(model, 8, steps)),
        GpuRow(f"{images} class images", "0.9", lambda: our_class_drawing(model, images),
               lambda: their_class_drawing(model, images)),
        GpuRow("a checkpoint", "20 s", lambda: checkpoint(model, folder)),
    ]


def attempt(side: Callable[[], Numbers] | None) -> Numbers | str:
    """What a side took, or why there is no number; its memory is free afterwards."""
    if side is None:
        return ""
    try:
        return side()
    except RuntimeError as error:
        if not cli.is_out_of_memory(error):
            raise
        return "out of memory"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure_gpu(row: GpuRow, flops: float, bandwidth: float) -> str:
    """A row of the table on a GPU."""
    ours, theirs = attempt(row.ours), attempt(row.theirs)
    measured = [side for side in (ours, theirs) if isinstance(side, Numbers)]
    seconds = [f"{side.seconds:.3g} s" if side in measured else side for side in (ours, theirs)]
    peaks = [f"{side.peak / 1e9:.1f}" if side in measured else "" for side in (ours, theirs)]
    cells = [row.name, *seconds, f"{ours.seconds / theirs.seconds:.2f}" if len(measured) == 2 else "", row.goal]
    if ours in measured:
        planned = f"{ours.planned / 1e9:.1f}" if ours.planned is not None else ""
        cells += [part_of(ours.seconds, row.floor, flops, bandwidth), peaks[0], planned, peaks[1], f"{ours.waits:g}"]
    else:
        cells += ["", "", "", peaks[1], ""]
    return f"| {' | '.join(cells)} |"


def main(settings: Settings) -> None:
    on_gpu = settings.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU with CUDA here: nothing is measured")
        return
    device = choose_device(settings.device)
    flops, bandwidth = measured_rates(device, choose_dtype("auto", device))
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    with tempfile.TemporaryDirectory() as name:
        folder, columns = Path(name), ["row", "ours", "diffusers", "ratio", "goal", "floor"]
        if on_gpu:
            columns += ["peak GB", "planned", "diffusers GB", "waits"]
            model = Model(stable_diffusion(folder / "sd15"), device, choose_dtype("auto", device))
            rows = gpu_rows(model, settings.images, folder)
            measured = partial(measure_gpu, flops=flops, bandwidth=bandwidth)
        else:
            rows = cpu_rows(settings.images, folder)
            measured = partial(measure, repeats=settings.repeats, flops=flops, bandwidth=bandwidth)
        print(f"| {' | '.join(columns)} |\n|---{(len(columns) - 1) * '|---:'}|", flush=True)
        for row in rows:
            if settings.rows in row.name:
                print(measured(row), flush=True)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Measure fewer rows with --rows")

"""Draw pictures with Stable Diffusion, or with what train.py made of it.

    python sample.py "[V] dog on the moon"
    python sample.py "a red cat in the snow" -n 4 --weights weights/tiny --guidance 3 --seed 7

[V] stands for the word under which train.py taught the subject. Prints the paths of the pictures on stdout.
"""

import math
import os
import re
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

from tqdm import tqdm

import tinydb
from tinydb.config import InputError, Parser, option, require
from tinydb.pictures import describe, grid, save_png
from tinydb.pipeline import choose_device
from tinydb.tokenizer import PLACEHOLDER

TINY = Path(__file__).parent / "weights" / "tiny"
SAMPLERS = {"ddim": "DDIM", "dpm": "DPM++ 2M"}  # and their names in the metadata that other programs read
GROUP = 4  # pictures drawn at once; guidance doubles it


@dataclass(frozen=True)
class Settings:
    """The command line. None means: what the model's recipe says."""

    prompt: str = option(MISSING, "what to draw; [V] is the subject that train.py taught")
    weights: str | None = option(None, "model folder (default: the newest runs/*/model, else weights/tiny)")
    count: int = option(4, "pictures to draw, picture i with seed + i", type=int, flag="-n", metavar="N")
    steps: int | None = option(None, "sampling steps (default: the model's recipe)", type=int)
    guidance: float | None = option(None, "classifier-free guidance scale, 1 is none (default: recipe)", type=float)
    seed: int = option(0, "decides the starting noise", type=int)
    size: str | None = option(None, "WIDTHxHEIGHT in pixels (default: what the model was trained on)")
    negative: str = option("", "what to steer away from")
    sampler: str = option("ddim", "dpm is DPM-Solver++ 2M, which needs fewer --steps", choices=tuple(SAMPLERS))
    eta: float = option(0.0, "fresh noise in each step of DDIM: 0 is none, 1 is DDPM's", type=float)
    out: str = option("samples", "folder for the pictures, or the name of a .png")
    device: str = option("auto", "cpu, cuda, mps, ... or auto")
    precision: str = option("auto", "number format; auto is bf16 or fp16 on a GPU",
                            choices=("auto", "fp32", "bf16", "fp16"))


def newest_model() -> Path:
    """The model folder that was finished last in runs/, else the embedded model."""
    finished = list(Path("runs").glob("*/model/model_index.json"))
    return max(finished, key=lambda path: path.stat().st_mtime).parent if finished else TINY


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    require(match is not None, f"--size {text}: expected WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])


def output_paths(out: Path, prompt: str, count: int) -> tuple[list[Path], Path]:
    """Where `count` pictures and their grid go: files with the next free numbers in a folder, or the .png named."""
    if out.suffix == ".png":
        singles = [out] if count == 1 else [out.with_name(f"{out.stem}-{i}.png") for i in range(count)]
        return singles, out
    name = re.sub(r"\W+", "-", prompt.replace(PLACEHOLDER, "V")).strip("-")[:60]
    first = max((int(path.name[:4]) for path in out.glob("[0-9][0-9][0-9][0-9]-*.png")), default=-1) + 1
    return [out / f"{first + i:04d}-{name}.png" for i in range(count)], out / f"{first:04d}-{name}-grid.png"


def prompt_with_subject(prompt: str, noun: str) -> str:
    """The prompt itself if it has both [V] and the class word, else the nearest one that has."""
    subject = f"{PLACEHOLDER} {noun}"
    classed = re.search(rf"(?:\b(?:a|an|the) )?\b{re.escape(noun)}\b", prompt)
    if PLACEHOLDER in prompt:
        return prompt if classed else prompt.replace(PLACEHOLDER, subject, 1)
    return prompt[: classed.start()] + subject + prompt[classed.end() :] if classed else f"{subject}, {prompt}"


def main(settings: Settings):
    require(settings.count > 0, f"-n {settings.count}: expected 1 or more")
    require(0 <= settings.seed < 2**32, f"--seed {settings.seed}: expected 0 to {2**32 - 1}")
    require(0 <= settings.eta <= 1, f"--eta {settings.eta}: expected 0 (DDIM) to 1 (DDPM)")
    require(settings.eta == 0 or settings.sampler == "ddim",
            f"--eta {settings.eta}: only --sampler ddim adds fresh noise; leave one of them out")
    require(settings.guidance is None or math.isfinite(settings.guidance),
            f"--guidance {settings.guidance}: expected a number, such as 7.5")
    out = Path(settings.out)
    folder = out.absolute().parent if out.suffix == ".png" else out.absolute()
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    require(home.is_dir() and os.access(home, os.W_OK), f"--out {out}: {home} is no folder to write in")
    require(not (out.suffix == ".png" and out.is_dir()), f"--out {out}: a folder; expected the name of a file")
    size = parse_size(settings.size) if settings.size else None
    weights = Path(settings.weights) if settings.weights else newest_model()
    device, dtype = choose_device(settings.device, settings.precision)
    sd = tinydb.load(weights, device, dtype)

    subject = f"{PLACEHOLDER} is a {sd.info.class_noun}" if sd.info.class_noun else "not taught a subject yet"
    print(f"{weights} on {device}, {subject}", file=sys.stderr)
    if PLACEHOLDER in settings.prompt and not sd.info.class_noun:
        print(f"{weights} does not know what {PLACEHOLDER} is: teach it with train.py first", file=sys.stderr)
    if sd.info.class_noun:
        asked = settings.prompt.replace(sd.identifier, PLACEHOLDER)
        asking = prompt_with_subject(asked, sd.info.class_noun)
        if asking != asked:
            print(f'this prompt does not ask for your {sd.info.class_noun}; one that does: "{asking}"', file=sys.stderr)
    for prompt in (settings.prompt, settings.negative):
        if dropped := sd.tokenizer.dropped(prompt.replace(PLACEHOLDER, sd.identifier)):
            print(f"the prompt is too long for the text encoder, which will not see: {dropped!r}", file=sys.stderr)

    steps = sd.info.recipe.sample_steps if settings.steps is None else settings.steps
    guidance = sd.info.recipe.guidance if settings.guidance is None else settings.guidance
    images = []
    groups = [range(i, min(i + GROUP, settings.count)) for i in range(0, settings.count, GROUP)]
    with tqdm(total=steps * len(groups), desc="drawing", unit="step") as progress:
        for group in groups:
            for latents in sd.denoise([settings.prompt] * len(group), steps=steps, guidance_scale=guidance,
                                      seed=settings.seed + group[0], negative=settings.negative, size=size,
                                      sampler=settings.sampler, eta=settings.eta):
                progress.update()
            images += sd.decode(latents)

    paths, grid_path = output_paths(out, settings.prompt, settings.count)
    for i, (image, path) in enumerate(zip(images, paths)):
        about = {"Steps": steps, "Sampler": SAMPLERS[settings.sampler], "CFG scale": guidance,
                 "Seed": settings.seed + i, "Size": f"{image.width}x{image.height}", "Eta": settings.eta,
                 "Model": str(weights)}
        save_png(image, path, describe(settings.prompt, settings.negative, **about))
        print(path)
    if settings.count > 1:
        about = f"{settings.count} pictures of: {settings.prompt}"
        save_png(grid(images, min(settings.count, 4)), grid_path, about)
        print(grid_path)


if __name__ == "__main__":
    parser = Parser(Settings, __doc__.splitlines()[0])
    try:
        main(Settings(**vars(parser.parse_args())))
    except InputError as error:
        parser.error(str(error))

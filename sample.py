"""Draw pictures with Stable Diffusion, or with what train.py made of it.

    python sample.py "[V] dog on the moon"
    python sample.py "a red cat in the snow" -n 4 --weights weights/tiny --guidance 3 --seed 7
    python sample.py "[V] dog in the snow" "[V] dog at night" -n 2      # the same noise for each prompt: a series
    python sample.py --prompts prompts.txt                              # one a line; .jsonl lines may set any option
    python sample.py "[V] dog at night" --init dog.png --strength 0.5   # draw over a picture
    python sample.py --from samples/0000-V-dog.png --guidance 6         # the same again, but for one thing
    python sample.py "[V] dog on the moon" --attention                  # and where each word was looked at

[V] stands for the word under which train.py taught the subject. Prints the paths of the pictures on stdout.
"""

import json
import math
import os
import re
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import tinydb
from tinydb.config import InputError, Parser, option, require
from tinydb.data import open_picture
from tinydb.pictures import describe, grid, heat_map, read_description, save_png
from tinydb.pipeline import StableDiffusion, choose_device, is_out_of_memory, steps_left
from tinydb.tokenizer import PLACEHOLDER
from tinydb.unet import AttentionMaps
from tinydb.weights import written_whole

TINY = Path(__file__).parent / "weights" / "tiny"
GROUP = 4  # pictures drawn at once; guidance doubles it
SERIES = 16  # prompts at most that come together on one sheet
# What a picture says of itself, in the words that other programs use, and the options that say the same.
SAID = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance", "Seed": "seed", "Size": "size", "Eta": "eta",
        "Denoising strength": "strength", "Init": "init", "Model": "weights"}
SAMPLER_NAMES = {"ddim": "DDIM", "dpm": "DPM++ 2M"}


@dataclass(frozen=True)
class Settings:
    """The command line. None means: what the model's recipe says."""

    prompt: list[str] = option(MISSING, "what to draw, one prompt or several; [V] is the subject that train.py taught",
                               nargs="*")
    prompts: str | None = option(None, "file with a prompt a line; in a .jsonl file, an object a line with any option")
    source: str | None = option(None, "picture to draw again, by what it says of itself; the command line overrides it",
                                flag="--from", metavar="PICTURE")
    weights: str | None = option(None, "model folder (default: the newest runs/*/model, else weights/tiny)")
    count: int = option(4, "pictures of each prompt, picture i with seed + i", type=int, flag="-n", metavar="N")
    steps: int | None = option(None, "sampling steps (default: the model's recipe)", type=int)
    guidance: float | None = option(None, "classifier-free guidance scale, 1 is none (default: recipe)", type=float)
    seed: int = option(0, "decides the starting noise", type=int)
    size: str | None = option(None, "WIDTHxHEIGHT in pixels (default: what the model was trained on)")
    negative: str = option("", "what to steer away from")
    init: str | None = option(None, "picture to draw over", metavar="PICTURE")
    strength: float = option(0.6, "how much of --init is drawn anew, up to 1", type=float)
    sampler: str = option("ddim", "dpm is DPM-Solver++ 2M, which needs fewer --steps", choices=tuple(SAMPLER_NAMES))
    preview: int = option(0, "draw preview.png anew every N steps, to watch (0: never)", type=int, metavar="N")
    attention: bool = option(False, "also show where in the picture each word of the prompt is looked at")
    eta: float = option(0.0, "fresh noise in each step of DDIM: 0 is none, 1 is DDPM's", type=float)
    out: str = option("samples", "folder for the pictures, or the name of a .png")
    device: str = option("auto", "cpu, cuda, mps, ... or auto")
    precision: str = option("auto", "number format; auto is bf16 or fp16 on a GPU",
                            choices=("auto", "fp32", "bf16", "fp16"))


def settings_of_picture(path: Path) -> dict[str, object]:
    """The options with which a picture was drawn, from what it says of itself."""
    try:
        with Image.open(path) as image:
            prompt, negative, said = read_description(image)
    except (OSError, ValueError) as error:
        raise InputError(f"--from {path}: {error}; expected a PNG that sample.py wrote") from None
    entries = {SAID[name]: value for name, value in said.items() if name in SAID}
    samplers = {name: sampler for sampler, name in SAMPLER_NAMES.items()}
    if entries.get("sampler", "DDIM") not in samplers:
        print(f"{path}: its sampler {entries['sampler']} is not here; --sampler says which to use", file=sys.stderr)
    if "strength" in entries and "init" not in entries:
        print(f"{path}: was drawn over a picture that it does not name; --init brings it", file=sys.stderr)
    return {"prompt": prompt, "negative": negative, "count": 1, **entries,
            "sampler": samplers.get(entries.get("sampler"))}


def settings_of_lines(path: Path) -> list[dict[str, object]]:
    """What each line of a --prompts file asks for."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {path}: not readable ({error})") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        except ValueError as error:
            raise InputError(f"--prompts {path}: line {number} is not readable as JSON ({error})") from None
        if isinstance(entry, dict) and isinstance(entry.get("from"), str):
            entry = settings_of_picture(Path(entry["from"])) | entry
        require(isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
                and isinstance(entry.get("from", ""), str) and not {"prompts", "source"} & entry.keys()
                and not any(isinstance(value, (list, dict)) for value in entry.values()),
                f'--prompts {path}: line {number} is {line}; expected one such as {{"prompt": "a dog", "seed": 3}}')
        entries.append(entry)
    require(bool(entries), f"--prompts {path}: empty; expected a prompt a line")
    return entries


def read_jobs(parser: Parser, argv: list[str]) -> list[tuple[str, Settings]]:
    """The command line -> prompts, each with its settings."""
    def options(entries: dict[str, object], source: str) -> list[str]:
        return parser.arguments({name: value for name, value in entries.items() if name != "prompt"}, source)

    given = parser.parse_intermixed_args(argv)
    prompts = given.prompt
    if given.source:
        picture = settings_of_picture(Path(given.source))
        prompts = prompts or ([] if given.prompts else [picture["prompt"]])
        given = parser.parse_intermixed_args([*options(picture, f"--from {given.source}"), *argv])
    jobs = [(prompt, Settings(**vars(given))) for prompt in prompts]
    for entries in settings_of_lines(Path(given.prompts)) if given.prompts else []:
        line = parser.parse_args(options(entries, f"--prompts {given.prompts}"), Namespace(**vars(given)))
        jobs.append((entries["prompt"], Settings(**vars(line))))
    require(bool(jobs), 'a prompt is missing; expected one such as "[V] dog on the moon"')
    return jobs


def newest_model() -> Path:
    """The model folder that was finished last in runs/, else the embedded model."""
    finished = list(Path("runs").glob("*/model/model_index.json"))
    return max(finished, key=lambda path: path.stat().st_mtime).parent if finished else TINY


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    require(match is not None and int(match[1]) * int(match[2]) > 0,
            f"--size {text}: expected WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])


def is_file_name(out: Path) -> bool:
    """Whether --out names a picture rather than a folder of them."""
    return out.suffix.lower() == ".png"


def output_paths(out: Path, prompt: str, count: int) -> tuple[list[Path], Path]:
    """Where `count` pictures and their grid go: files with the next free numbers in a folder, or the .png named."""
    if is_file_name(out):
        singles = [out] if count == 1 else [out.with_name(f"{out.stem}-{i}.png") for i in range(count)]
        return singles, out
    name = re.sub(r"\W+", "-", prompt.replace(PLACEHOLDER, "V")).strip("-")[:60]
    numbers = [int(match[1]) for path in out.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    first = max(numbers, default=-1) + 1
    return [out / f"{first + i:04d}-{name}.png" for i in range(count)], out / f"{first:04d}-{name}-grid.png"


def prompt_with_subject(prompt: str, noun: str) -> str:
    """The prompt itself if it has both [V] and the class word, else the nearest one that has."""
    subject = f"{PLACEHOLDER} {noun}"
    classed = re.search(rf"(?:\b(?:a|an|the) )?\b{re.escape(noun)}\b", prompt, re.IGNORECASE)
    if PLACEHOLDER in prompt:
        return prompt if classed else prompt.replace(PLACEHOLDER, subject, 1)
    return prompt[: classed.start()] + subject + prompt[classed.end() :] if classed else f"{subject}, {prompt}"


def check(settings: Settings) -> None:
    """InputError for what no model could draw."""
    require(settings.count > 0, f"-n {settings.count}: expected 1 or more")
    last = 2**32 - settings.count
    require(0 <= settings.seed <= last, f"--seed {settings.seed}: expected 0 to {last} for {settings.count} pictures")
    require(0 < settings.strength <= 1, f"--strength {settings.strength}: expected more than 0, at most 1")
    require(settings.preview >= 0, f"--preview {settings.preview}: expected a number of steps, or 0 for none")
    require(0 <= settings.eta <= 1, f"--eta {settings.eta}: expected 0 (DDIM) to 1 (DDPM)")
    require(settings.eta == 0 or settings.sampler == "ddim",
            f"--eta {settings.eta}: only --sampler ddim adds fresh noise; leave one of them out")
    require(settings.guidance is None or math.isfinite(settings.guidance),
            f"--guidance {settings.guidance}: expected a number, such as 7.5")
    if settings.size:
        parse_size(settings.size)
    out = Path(settings.out)
    require(out.suffix.lower() not in (".jpg", ".jpeg", ".webp"),
            f"--out {out}: pictures are PNG files, which keep how they were made; expected a folder or a name.png")
    folder = out.absolute().parent if is_file_name(out) else out.absolute()
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    require(home.is_dir() and os.access(home, os.W_OK), f"--out {out}: {home} is no folder to write in")
    require(not (is_file_name(out) and out.is_dir()), f"--out {out}: a folder; expected the name of a file")


def advise(sd: StableDiffusion, weights: Path, prompt: str, negative: str) -> None:
    """Say on stderr what of a prompt will not do what its writer hopes."""
    noun = sd.info.class_noun
    if PLACEHOLDER in prompt and not noun:
        print(f"{weights} does not know what {PLACEHOLDER} is: teach it with train.py first", file=sys.stderr)
    if noun:
        asked = re.sub(re.escape(sd.identifier), lambda _: PLACEHOLDER, prompt, flags=re.IGNORECASE)
        asking = prompt_with_subject(asked, noun)
        if asking != asked:
            print(f'this prompt does not ask for your {noun}; one that does: "{asking}"', file=sys.stderr)
    for text in (prompt, negative):
        if dropped := sd.tokenizer.dropped(text.replace(PLACEHOLDER, sd.identifier)):
            print(f"the prompt is too long for the text encoder, which will not see: {dropped!r}", file=sys.stderr)


def picture_to_draw_over(path: Path, size: tuple[int, int]) -> Image.Image:
    """The picture of --init, cut to the shape of what is drawn."""
    require(path.is_file(), f"--init {path}: no such file; expected a picture")
    try:
        return ImageOps.fit(open_picture(path), size, Image.Resampling.LANCZOS)
    except ValueError as error:
        raise InputError(f"--init {path}: {error}; expected a picture") from None


def attention_sheet(image: Image.Image, words: list[tuple[str, slice]], maps: Tensor) -> Image.Image:
    """A picture and, for each word, where it was looked at: `maps` (T, h, w) of tokens, of which each word has a slice.
    Every word has a scale of its own."""
    images = [image] + [heat_map(image, maps[tokens].mean(0)) for _, tokens in words]
    return grid(images, min(len(images), 6), ["", *(word for word, _ in words)])


def draw(sd: StableDiffusion, prompt: str, settings: Settings,
         preview: Path) -> tuple[list[Image.Image], list[Tensor]]:
    """The pictures of a prompt and, with --attention, their maps (T, h, w); `preview` is the file to watch."""
    count, steps, init = settings.count, settings.steps, None
    size = parse_size(settings.size) if settings.size else None
    if settings.init:
        init = picture_to_draw_over(Path(settings.init), size or (sd.resolution, sd.resolution))
    images, maps = [], []
    groups = [range(i, min(i + GROUP, count)) for i in range(0, count, GROUP)]
    steps_each = steps_left(steps, settings.strength) if init else steps
    with tqdm(total=steps_each * len(groups), desc="drawing", unit="step") as progress:
        for group in groups:
            with AttentionMaps(sd.unet, len(group)) if settings.attention else nullcontext() as watched:
                for latents, clean in sd.denoise(
                        [prompt] * len(group), steps=steps, guidance_scale=settings.guidance,
                        seed=settings.seed + group[0], negative=settings.negative, size=size, init=init,
                        strength=settings.strength, sampler=settings.sampler, eta=settings.eta):
                    progress.update()
                    if settings.preview and progress.n % settings.preview == 0:
                        with written_whole(preview) as temporary:
                            save_png(grid(sd.decode(clean), len(group)), temporary, f"step {progress.n} of: {prompt}")
            images += sd.decode(latents)
            maps += watched.mean() if watched else []
    return images, maps


def draw_and_save(sd: StableDiffusion, weights: Path, prompt: str, settings: Settings) -> list[Image.Image]:
    """Draw the pictures of one prompt, save them, print where."""
    recipe, out = sd.info.recipe, Path(settings.out)
    settings = replace(settings, steps=recipe.sample_steps if settings.steps is None else settings.steps,
                       guidance=recipe.guidance if settings.guidance is None else settings.guidance)
    preview = out.with_name(f"{out.stem}-preview.png") if is_file_name(out) else out / "preview.png"
    images, maps = draw(sd, prompt, settings, preview)

    paths, grid_path = output_paths(out, prompt, settings.count)
    for i, (image, path) in enumerate(zip(images, paths)):
        made_with = {**asdict(settings), "sampler": SAMPLER_NAMES[settings.sampler], "seed": settings.seed + i,
                     "size": f"{image.width}x{image.height}", "weights": weights}
        about = {name: made_with[key] for name, key in SAID.items()
                 if settings.init or key not in ("init", "strength")}
        save_png(image, path, describe(prompt, settings.negative, **about))
        print(path)
        if maps:
            sheet = attention_sheet(image, sd.words(prompt), maps[i])
            save_png(sheet, path := path.with_name(f"{path.stem}-attention.png"), f"cross-attention of: {prompt}")
            print(path)
    if settings.count > 1:
        sheet = grid(images, min(settings.count, 4), [prompt] + [""] * (len(images) - 1))
        save_png(sheet, grid_path, f"{settings.count} pictures of: {prompt}")
        print(grid_path)
    return images


def main(jobs: list[tuple[str, Settings]]) -> None:
    """Draw each prompt; a few of them also on one sheet, a row each."""
    for _, settings in jobs:
        check(settings)
    files = [settings.out for _, settings in jobs if is_file_name(Path(settings.out))]
    require(len(files) == len(set(files)),
            f"--out {', '.join(files[:1])}: several prompts do not fit into one file; name a folder")
    newest, opened, rows = newest_model(), None, []
    for prompt, settings in jobs:
        weights = Path(settings.weights) if settings.weights else newest
        device, dtype = choose_device(settings.device, settings.precision)
        if opened != (weights, device, dtype):
            sd, opened = tinydb.load(weights, device, dtype), (weights, device, dtype)
            subject = f"{PLACEHOLDER} is a {sd.info.class_noun}" if sd.info.class_noun else "not taught a subject yet"
            print(f"{weights} on {device}, {subject}", file=sys.stderr)
        advise(sd, weights, prompt, settings.negative)
        images = draw_and_save(sd, weights, prompt, settings)
        if 1 < len(jobs) <= SERIES and not files:
            rows.append(images)
    sizes = {image.size for row in rows for image in row}
    if rows and len({len(row) for row in rows}) == len(sizes) == 1:
        captions = [caption for prompt, _ in jobs for caption in [prompt] + [""] * (len(rows[0]) - 1)]
        [path], _ = output_paths(Path(jobs[0][1].out), "series", 1)
        sheet = grid([image for row in rows for image in row], len(rows[0]), captions)
        save_png(sheet, path, " | ".join(prompt for prompt, _ in jobs))
        print(path)


if __name__ == "__main__":
    parser = Parser(Settings, __doc__.splitlines()[0])
    try:
        main(read_jobs(parser, sys.argv[1:]))
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        parser.exit(1, f"{parser.prog}: {str(error).splitlines()[0]}. Try --precision bf16 or a smaller --size\n")

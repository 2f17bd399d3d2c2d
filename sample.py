"""Draw pictures with Stable Diffusion, or with what train.py made of it.

    python sample.py "[V] dog on the moon"
    python sample.py "a red cat in the snow" -n 4 --weights weights/tiny --guidance 3 --seed 7
    python sample.py "[V] dog in the snow" "[V] dog at night" -n 2      # the same noise for each prompt: a series
    python sample.py --prompts prompts.txt                              # one on each line
    python sample.py "[V] dog at night" --init dog.png --strength 0.5   # draw over a picture
    python sample.py --from samples/0000-V-dog.png --guidance 6         # the same picture, but with other guidance
    python sample.py "[V] dog on the moon" --lora other.safetensors     # with low-rank updates
    python sample.py "[V] dog on the moon" --attention                  # and where each word was looked at
    python sample.py "[V] dog on the moon" -n 16 --best 4               # the four that CLIP finds best
    python sample.py "a dog on the moon" --among photographs            # no drawing: the best of what is there

[V] stands for the word under which train.py taught the subject. Prints the paths of the pictures on stdout.
"""

import itertools
import os
import re
from contextlib import nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

import tinydb
from tinydb import cli
from tinydb.attention import AttentionMaps, attention_sheet
from tinydb.cli import choose_device, choose_dtype, extra, option, say
from tinydb.config import InputError, ModelInfo, require
from tinydb.data import read_pictures
from tinydb.diffusion import SAMPLERS
from tinydb.lora_files import read_lora
from tinydb.pictures import (MOST_SHOWN, VISIBLE, describe, grid, no_picture_in, open_picture, read_description,
                             save_png)
from tinydb.pipeline import DEFAULT_IDENTIFIER, LAST_SEED, Sampling, StableDiffusion
from tinydb.prompts import identifier_pattern, read_lines
from tinydb.run import config_around
from tinydb.scores import NO_CLIP, Ranking, choose_clip, subject_pictures
from tinydb.storage import LORA_FILE, TINY, existing_parent, is_tiny, model_folder, newest_state
from tinydb.tokenizer import PLACEHOLDER

GROUP = 4  # pictures drawn at once; guidance doubles it
SERIES = 16  # at most so many prompts, and pictures of each, come together on one sheet


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """The command line: how to sample (pipeline.Sampling), what, and where to. `described`: what a picture says about
    itself, in the words that other programs use."""

    prompt: list[str] = option(MISSING, "what to draw, one prompt or several; [V] is the subject that train.py taught",
                               nargs="*")
    prompts: str | None = option(None, "text file with a prompt on each line; lines that begin with # are "
                                       "passed over")
    source: str | None = option(None, "PNG of sample.py or A1111 to draw again with its own options, except those that "
                                      "are given here", flag="--from", metavar="PICTURE")
    weights: str | None = option(None, "model folder, or the OUT of a run (default: what finished last in runs/, else "
                                       "weights/tiny; with --lora, what that was learnt on)", described="Model")
    lora: str | None = option(None, "LoRA file to add to the model, or several, with commas between", metavar="FILE",
                              described="Lora")
    lora_scale: float = option(1.0, "how much of each to add", described="Lora scale")
    count: int = option(4, "pictures of each prompt", flag="-n", metavar="N", least=1, most=10**4)
    init: str | None = option(None, "picture to draw over", metavar="PICTURE", described="Init")
    preview: int = option(0, "redraw preview.png every N steps, to watch (0: never)", metavar="N", least=0)
    best: int | None = option(None, "keep so many of the pictures of a prompt, those that fit it best by CLIP",
                              metavar="N", least=1)
    among: str | None = option(None, "draw nothing; rank the pictures in a folder by how well they fit, by CLIP",
                               metavar="DIR")
    clip: str | None = option(None, "CLIP folder for --best and --among (default: weights/tiny-clip for the model in "
                                    "the box)")
    attention: bool = option(False, "also show where in the picture each word of the prompt is looked at")
    out: str = option("samples", "folder for the pictures, or the name of a .png")
    device: str = option("auto", "cpu, cuda, mps, ... or auto")
    precision: str = option("auto", "number format; auto is bf16 or fp16 on a GPU",
                            choices=("auto", "fp32", "bf16", "fp16"), described="Precision")

    @property
    def loras(self) -> list[str]:
        """The files of --lora; a comma elsewhere than behind .safetensors belongs to a name."""
        return re.split(r"(?<=\.safetensors), *", self.lora) if self.lora else []

    @property
    def out_is_file(self) -> bool:
        """Whether --out names a picture rather than a folder of them."""
        return self.out.lower().endswith(".png")


DESCRIBED = {f.metadata["described"]: f.name for f in fields(Settings) if "described" in f.metadata}


# ------------------------------------------------------------------------------------------- what to draw


def settings_in_picture(given: Settings) -> dict[str, object]:
    """The options with which the picture of --from was drawn, by what it says about itself."""
    if given.source is None:
        return {}
    try:
        with Image.open(given.source, formats=["PNG"]) as image:
            prompt, negative, described = read_description(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--from {given.source}: {error}; expected a PNG that sample.py or A1111 wrote") from None
    samplers, own_model = {each.name: key for key, each in SAMPLERS.items()}, given.weights is None
    here = {"Sampler": described.get("Sampler") in samplers, "RNG": described.get("RNG") == "CPU",
            "Precision": described.get("Precision") in ("fp32", "bf16", "fp16"),
            "CLIP text": True, "CLIP image": True,  # scores, which say nothing of how to draw
            "Eta DDIM": described.get("Eta DDIM") == "0.0",  # in our older pictures: no fresh noise, as now
            "Model": Path(described.get("Model", "")).is_dir(),
            "Lora": own_model, "Lora scale": own_model}
    foreign = [name for name in described if not here.get(name, name in DESCRIBED)]
    if foreign:
        left = ", ".join(f"{name} {described[name][:40]}" for name in foreign)
        say(f"{given.source}: not taken over: {left}")
    entries = {DESCRIBED[name]: value for name, value in described.items() if name in DESCRIBED and name not in foreign}
    entries.setdefault("guidance_stop", 1.0)  # other programs, and our older pictures, never stop it
    entries |= {"prompt": [] if given.prompts else [prompt], "negative": negative, "count": 1}
    if "sampler" in entries:
        entries["sampler"] = samplers[entries["sampler"]]
    if "strength" in entries and "init" not in entries and "Hires upscale" not in described:
        say(f"{given.source}: was drawn over a picture that it does not name; --init brings it")
    return entries


def read_prompts(settings: Settings) -> list[str]:
    """The prompts of the command line, and those in the file of --prompts."""
    prompts = list(settings.prompt)
    if settings.prompts:
        path = Path(settings.prompts)
        require(path.suffix not in (".json", ".jsonl"), f"--prompts {path}: a JSON file; expected plain "
                "text with a prompt on each line, and options on the command line")
        lines = read_lines(path)
        require(bool(lines), f"--prompts {path}: empty; expected a prompt on each line")
        prompts += lines
    require(bool(prompts), 'a prompt is missing; expected one such as "[V] dog on the moon"')
    return [prompt.replace("[v]", PLACEHOLDER) for prompt in prompts]


def check(settings: Settings, prompts: list[str]) -> None:
    """InputError for what cannot be drawn or written, before a model is opened."""
    require(settings.best is None or settings.best <= settings.count or settings.among,
            f"--best {settings.best}: more than the {settings.count} pictures that are drawn; give a larger -n")
    require(settings.seed + settings.count - 1 <= LAST_SEED,  # picture i is drawn from seed + i
            f"--seed {settings.seed} for -n {settings.count}: seeds end at {LAST_SEED}; give a smaller one")
    out, is_file = Path(settings.out), settings.out_is_file
    require(not is_file or len(prompts) == 1, f"--out {out}: several prompts do not fit into one file; name a folder")
    require(out.suffix.lower() not in (".jpg", ".jpeg", ".webp"),
            f"--out {out}: pictures are PNG files, which keep how they were made; expected a folder or a name.png")
    home = existing_parent(out.absolute().parent if is_file else out)
    require(home.is_dir() and os.access(home, os.W_OK), f"--out {out}: {home} is no folder to write in")
    require(not (is_file and out.is_dir()), f"--out {out}: a folder; expected the name of a file")
    numbers = range(settings.count) if is_file and settings.count > 1 and not settings.among else []
    pictures = [numbered(out, i) for i in numbers]
    taken = [str(path) for path in pictures if path.exists()]
    require(not (settings.best and taken),
            f"--out {out}: --best would overwrite {', '.join(taken[:3])}; give another name")
    files = overwritten(settings, pictures)
    for flag, source in (("--init", settings.init), ("--from", settings.source), ("--among", settings.among)):
        require(source != "", f"{flag}: empty; expected a name, or leave it out")
        if source and Path(source).exists():
            lost = [path for path in files if path.samefile(source) or path.parent.samefile(source)]
            require(not lost, f"--out {out}: would overwrite a picture of {flag}; give another name")


def overwritten(settings: Settings, pictures: list[Path]) -> list[Path]:
    """What is there already of the files whose names are known before the drawing: where --out is a file, itself and
    the `pictures` beside it; heat maps of these; and the preview."""
    out = Path(settings.out)
    files = [*pictures, out] if settings.out_is_file else []
    if settings.attention:
        out_is_sheet = len(pictures) > 0 and settings.best != 1  # a sheet has no heat maps
        files += [attention_path(path) for path in (pictures if out_is_sheet else files)]
    if settings.preview:
        files.append(preview_path(settings))
    return [path for path in files if path.exists()]


def newest_model() -> Path:
    """The model folder, or the OUT of a run with --lora, that was finished last in runs/; else the model in the box."""
    finished = [*Path("runs").glob("*/model/model_index.json"), *Path("runs").glob(f"*/{LORA_FILE}")]
    return max(finished, key=lambda path: path.stat().st_mtime).parent if finished else TINY


def with_model(settings: Settings) -> Settings:
    """The settings with the model that they mean. A run with --lora, or a checkpoint of one, stands for its LoRA file;
    such files without --weights belong to the model that they were learnt on."""
    files = settings.loras
    if settings.weights is None and files:
        return replace(settings, weights=learnt_on(files))
    weights = newest_state(Path(settings.weights or newest_model()))
    if (weights / "model_index.json").exists() or not (weights / LORA_FILE).exists():
        return replace(settings, weights=str(weights))
    by_place = {Path(file).resolve(): file for file in (str(weights / LORA_FILE), *files)}  # each file once
    files = list(by_place.values())
    return replace(settings, weights=learnt_on(files), lora=",".join(files))


def learnt_on(files: list[str]) -> str:
    """The model folder with which the runs of LoRA files began; that in the box where none of them lies in a run."""
    cure, bases = f"give --weights MODEL --lora {','.join(files)}", {}
    for file in files:
        base = config_around(Path(file)).get("weights")
        require(isinstance(base, str | None), f"{file}: the config.json of its run names no weights; {cure}")
        if base is None:
            continue
        if not Path(base).is_dir():  # the model in the box of another clone is that of this one
            about, box = read_lora(Path(file))[1], ModelInfo.read(TINY / "tinydb.json")
            require(is_tiny(Path(base)) and about.get("base") == box.base,
                    f"{file}: its run began with {base}, which is not there any more; {cure}")
            base = str(TINY)
        bases.setdefault(Path(base).resolve(), base)
    require(len(bases) <= 1,
            f"these LoRA files were learnt on different models, {' and '.join(bases.values())}; {cure}")
    return next(iter(bases.values()), str(TINY))


def advise(sd: StableDiffusion, weights: Path, prompt: str, negative: str) -> None:
    """Warn on stderr where a prompt will not work as written."""
    noun = sd.info.class_noun
    if PLACEHOLDER in prompt and noun is None:
        say(f"{weights} was taught no subject, so {PLACEHOLDER}, read as {sd.identifier!r}, means nothing to it; teach "
            "it with train.py first, or bring back its tinydb.json")
    written_out = prompt.replace(PLACEHOLDER, sd.identifier).lower()
    if noun and (sd.identifier.lower() not in written_out or noun.lower() not in written_out):
        say(f'"{prompt}" does not ask for your {noun}; write {PLACEHOLDER} {noun} for it')
    if marked := re.search(r"<lora:[^>]*>|\([^()]*:(\d|\d*\.\d+)\)", prompt):
        cure = "give the file with --lora" if marked[0].startswith("<") else "leave it out"
        say(f"{marked[0]} is read as words, not as a weight, which it is to A1111; {cure}")
    for text in (prompt, negative):
        if dropped := sd.tokenizer.dropped(text.replace(PLACEHOLDER, sd.identifier)):
            say(f"the prompt is too long for the text encoder, which will not see: {dropped!r}")


# ---------------------------------------------------------------------------------------- drawing and saving


def new_path(settings: Settings, name: str, i: int | None = None) -> Path:
    """Where picture `i`, or a sheet, goes: --out where that is a file, else a file there with the next free number.

    An empty file takes the number at once, so that two programs never write into one picture.
    """
    out = Path(settings.out)
    if settings.out_is_file:
        return out if i is None or settings.count == 1 else numbered(out, i)
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", name).strip("-")[:60].encode()[:120].decode(errors="ignore")  # names end at 255 bytes
    taken = [int(match[1]) for path in out.glob("*.png") if (match := re.match(r"(\d+)-", path.name))]
    for number in itertools.count(1 + max(taken, default=-1)):
        with suppress(FileExistsError):  # another program was faster
            path = out / f"{number:04d}-{name}.png"
            path.touch(exist_ok=False)
            return path


def numbered(out: Path, i: int) -> Path:
    """Where picture `i` of several goes, if --out names one."""
    return out.with_name(f"{out.stem}-{i}.png")


def preview_path(settings: Settings) -> Path:
    """Where --preview shows the picture that is being drawn."""
    out = Path(settings.out)
    return out.with_name(f"{out.stem}-preview.png") if settings.out_is_file else out / "preview.png"


def attention_path(path: Path) -> Path:
    """Where the heat maps of the picture at `path` go."""
    return path.with_name(f"{path.stem}-attention.png")


def save(image: Image.Image, path: Path, about: str, quiet: bool = False) -> Path:
    """Write a picture and print where it is, unless `quiet`; where that fails, no empty file is left."""
    try:
        save_png(image, path, about)
    except BaseException:  # Ctrl-C too
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        raise
    if not quiet:
        tqdm.write(str(path))
    return path


def draw(sd: StableDiffusion, weights: Path, prompt: str, settings: Settings, ranking: Ranking | None) -> list[Path]:
    """Draw the pictures of one prompt; each is on the disk before the next ones are begun. With a `ranking`, the best
    of them stay. Returns where they are."""
    settings = sd.with_recipe(settings)
    init = picture_to_draw_over(sd, settings) if settings.init else None
    steps = settings.steps_over_picture if init else settings.steps
    sampling = {f.name: getattr(settings, f.name) for f in fields(Sampling)}
    files: list[list[Path]] = []  # of each picture: itself and, with --attention, its heat maps
    groups = [range(i, min(i + GROUP, settings.count)) for i in range(0, settings.count, GROUP)]
    with tqdm(total=steps * len(groups), desc="drawing", unit="step") as progress:
        for group in groups:
            sampling["seed"] = settings.seed + group[0]
            with AttentionMaps(sd.unet, len(group)) if settings.attention else nullcontext() as maps:
                for latents, clean in sd.denoise([prompt] * len(group), init=init, **sampling):
                    progress.update()
                    if settings.preview and progress.n % settings.preview == 0:
                        with extra("preview"):
                            predicted = grid(sd.decode(clean), len(group))
                            save_png(predicted, preview_path(settings), f"step {progress.n} of: {prompt}")
            drawn = sd.decode(latents)
            scores = ranking.score(drawn) if ranking else [{}] * len(drawn)
            for i, image, score in zip(group, drawn, scores):
                about = description(sd, weights, image, prompt, settings, settings.seed + i, score)
                path = new_path(settings, prompt, i)
                files.append([save(image, path, about, quiet=bool(ranking))])
                if maps:
                    heat_maps = attention_sheet(image, sd.words(prompt), maps.mean()[i - group[0]])
                    about = f"cross-attention of: {prompt}"
                    files[-1].append(save(heat_maps, attention_path(path), about, quiet=bool(ranking)))
    if ranking:
        files = keep_best(ranking, files, settings)
    paths = [path for path, *_ in files]
    if len(paths) > 1:
        sheet = Path(settings.out) if settings.out_is_file else paths[0].with_name(f"{paths[0].stem}-grid.png")
        with extra("sheet"):  # somebody may have moved a picture
            shown = [open_picture(path) for path in paths[:MOST_SHOWN]]
            captions = [prompt] + [""] * (len(shown) - 1)
            save(grid(shown, min(len(shown), 4), captions), sheet, f"{len(shown)} pictures of: {prompt}")
        require(sheet.exists() or not settings.out_is_file, f"--out {sheet}: no sheet; the pictures are beside it")
    return paths


def keep_best(ranking: Ranking, files: list[list[Path]], settings: Settings) -> list[list[Path]]:
    """Delete the files of all but the best pictures of --best; print and return those of the best, best first."""
    order = ranking.best()
    for i in order[settings.best :]:
        for path in files[i]:
            path.unlink(missing_ok=True)  # somebody may have moved it
    for i in order[: settings.best]:
        if settings.out_is_file and settings.best == 1:  # it gets the name of --out
            out = Path(settings.out)
            files[i] = [path.replace(name) for path, name in zip(files[i], (out, attention_path(out)))]
        print(*files[i], sep="\n")
        say(scores_text(ranking.scores[i]))
    return [files[i] for i in order[: settings.best]]


def picture_to_draw_over(sd: StableDiffusion, settings: Settings) -> Image.Image:
    """The picture of --init, cut to the shape of what is drawn."""
    require(Path(settings.init).is_file(), f"--init {settings.init}: no such file; expected a picture")
    try:
        image = open_picture(Path(settings.init))
    except ValueError as error:
        raise InputError(f"--init {settings.init}: {error}; expected a picture") from None
    return ImageOps.fit(image, settings.size or (sd.resolution, sd.resolution), Image.Resampling.LANCZOS)


def description(sd: StableDiffusion, weights: Path, image: Image.Image, prompt: str, settings: Settings,
                seed: int, score: dict[str, float]) -> str:
    """What a picture says about itself."""
    made_with = asdict(settings) | {"sampler": SAMPLERS[settings.sampler].name, "seed": seed, "weights": weights,
                                    "size": f"{image.width}x{image.height}"}
    left_out = [] if settings.init else ["init", "strength"]
    left_out += [] if settings.lora else ["lora", "lora_scale"]
    left_out += [] if settings.guidance_stop < 1 else ["guidance_stop"]
    left_out += ["precision"] if settings.precision == "auto" else []
    about = {name: made_with[key] for name, key in DESCRIBED.items() if key not in left_out}
    about["RNG"] = "CPU"  # A1111 would draw its noise on the GPU
    about |= {name: f"{value:.4f}" for name, value in score.items()}
    return describe(prompt, settings.negative, sd.identifier, **about)


def open_rankings(weights: Path, prompts: list[str], settings: Settings) -> list[Ranking]:
    """What ranks pictures of each prompt: by the prompt and, if it names the subject, by the pictures that the subject
    was taught from, where they are still there."""
    require((weights / "model_index.json").exists(), f"{weights}: not a model folder; give another --weights")
    info = ModelInfo.read(weights / "tinydb.json")
    clip = choose_clip(settings.clip, info.base)
    require(clip is not None, f"{'--among' if settings.among else '--best'}: {NO_CLIP}")
    about, taught = info.to_dict(), settings.weights
    for file in settings.loras:  # the last one that says so decides what [V] is
        told = read_lora(Path(file))[1]
        if told.get("class"):
            about, taught = told, file
    pattern = identifier_pattern(about.get("identifier") or DEFAULT_IDENTIFIER)
    prompts = [pattern.sub(PLACEHOLDER, prompt) for prompt in prompts]
    asked = any(PLACEHOLDER in prompt for prompt in prompts)
    subject = subject_pictures(Path(taught), clip.side) if asked else []
    if asked and not subject:
        say(f"the pictures that {PLACEHOLDER} was taught from are not found; only the rest of the prompt is compared")
    return [Ranking(clip, prompt, subject if PLACEHOLDER in prompt else []) for prompt in prompts]


def scores_text(score: dict[str, float]) -> str:
    """A picture's scores in a line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in score.items())


def is_sheet(path: Path) -> bool:
    """Whether a picture says that it is one of ours, but not how it was drawn: a grid, a preview, heat maps."""
    with suppress(OSError, Image.DecompressionBombError), Image.open(path, formats=["PNG"]) as image:
        text = image.info.get("parameters")
        return text is not None and re.search(r'Steps:|"steps"', text) is None  # SwarmUI's is JSON
    return False


def rank_folder(prompt: str, settings: Settings, ranking: Ranking) -> None:
    """Print the pictures in the folder of --among and their scores, best first; the best come on a sheet."""
    pictures, remarks = read_pictures(Path(settings.among), max(ranking.clip.side, VISIBLE))
    sheets = [name for name in pictures if is_sheet(Path(settings.among, name))]
    remarks += [f"{name} is left out: a sheet of sample.py or train.py" for name in sheets]
    pictures = {name: picture for name, picture in pictures.items() if name not in sheets}
    require(bool(pictures), no_picture_in("--among", settings.among, remarks))
    say(*remarks)
    names, images = list(pictures), list(pictures.values())
    ranking.score(images)
    order = ranking.best()
    for i in order:
        print(Path(settings.among) / names[i], scores_text(ranking.scores[i]), sep="\t")
    shown = order[: settings.best or 8]
    captions = [scores_text(ranking.scores[i]) for i in shown]
    sheet = grid([images[i] for i in shown], min(len(shown), 4), captions)
    save(sheet, new_path(settings, f"best of {prompt}"), f"the best of {settings.among} for: {prompt}")


def main(settings: Settings) -> None:
    """Draw each prompt; a few of them also come on one sheet, a row each."""
    prompts = read_prompts(settings)
    check(settings, prompts)
    settings = with_model(replace(settings, negative=settings.negative.replace("[v]", PLACEHOLDER)))
    weights = model_folder(settings.weights)
    rankings = open_rankings(weights, prompts, settings) if settings.among or settings.best else [None] * len(prompts)
    if settings.among:
        for prompt, ranking in zip(prompts, rankings):
            rank_folder(prompt, settings, ranking)
        return
    device = choose_device(settings.device)
    sd = tinydb.load(weights, device, choose_dtype(settings.precision, device))
    for file in settings.loras:
        sd.add_lora(file, settings.lora_scale)
    subject = f"{PLACEHOLDER} is a {sd.info.class_noun}" if sd.info.class_noun else "not taught a subject yet"
    say(f"{' + '.join([str(weights), *settings.loras])} on {device}, {subject}")
    rows = []
    for prompt, ranking in zip(prompts, rankings):
        advise(sd, weights, prompt, settings.negative)
        rows.append(draw(sd, weights, prompt, settings, ranking))
    count = len(rows[0])
    if 1 < len(prompts) <= SERIES and count <= SERIES:
        captions = [caption for prompt in prompts for caption in [prompt] + [""] * (count - 1)]
        with extra("sheet"):
            images = [open_picture(path) for row in rows for path in row]
            save(grid(images, count, captions), new_path(settings, "series"), " | ".join(prompts))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, defaults=settings_in_picture,
            out_of_memory="Try --precision bf16 or a smaller --size")

"""How well the model in the box follows a prompt, and what DreamBooth does to it, in numbers and pictures.

    python weights/evaluate.py                # composition: 500 prompts, a third of them pairs it never saw
    python weights/evaluate.py --quick        # 100 of them
    python weights/evaluate.py --dreambooth   # teach it six subjects in several ways: hours; the same command goes on
    python weights/evaluate.py --subject weights/subjects/rex --lora runs/rex/lora.safetensors    # the paper's table

A judge (judge.py) looks at every picture. The last table needs a CLIP instead, and works for any Stable Diffusion.
Tables are printed as Markdown; OUT has the pictures.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tinydb
from tinydb import cli
from tinydb.cli import choose_device, option
from tinydb.config import Checked, ModelInfo, read_json, require, write_json
from tinydb.data import read_pictures
from tinydb.pictures import grid, to_pixels
from tinydb.pipeline import StableDiffusion
from tinydb.prompts import NOUN, class_prompt, fill, without_subject
from tinydb.scores import NO_CLIP, TINY_NAME, choose_clip
from tinydb.storage import LORA_FILE, fingerprint, written_whole
from tinydb.tokenizer import PLACEHOLDER
from judge import ATTRIBUTES, Judge, draw_batch, load_judge
from world import (COLORS, PLACES, SUBJECTS, Scene, Subject, compose, full_caption, phrase, render, sample_scene,
                   scene_look)

Similarity = Callable[[list[Image.Image], list[Image.Image]], Tensor]  # N and M pictures -> (N, M)

BATCH = 20  # pictures drawn at once
PER_PROMPT = 2  # pictures of the subject for each prompt of the study
CLASS_IMAGES = 32


@dataclass(frozen=True)
class Arm:
    """A way to teach a subject, by what differs from train.py's recipe; `diffusers`: by weights/reference.py."""

    options: tuple[str, ...] = ()
    captions: bool = True  # the texts beside the subject's pictures
    prior: str = "recipe"  # the class prompts: the recipe's, "plain", or "unasked": none of what the study asks for
    diffusers: bool = False


ARMS = {  # in the order in which they are run: what matters most comes first
    "the recipe": Arm(),
    "the paper": Arm(("--lora", "0", "--no-frozen-prior", "--lr-decay", "0"), captions=False, prior="plain"),
    "the model itself": Arm(("--lora", "0")), "no convolutions": Arm(("--no-lora-conv",)),
    "diffusers (the paper)": Arm(captions=False, prior="plain", diffusers=True),
    "prior of noise": Arm(("--no-frozen-prior",)), "no captions": Arm(captions=False, prior="plain"),
    "plain prior": Arm(prior="plain"), "prior that names nothing asked": Arm(prior="unasked"),
    "constant rate": Arm(("--lr-decay", "0")), "diffusers, captions and varied prior": Arm(diffusers=True),
    "no prior loss": Arm(("--prior-weight", "0")), "UNet alone": Arm(("--freeze-text",)),
    "half the steps": Arm(("--steps", "60")), "twice the steps": Arm(("--steps", "240")),
}
COMPARED = 2  # the first two arms are tried with every seed; the others, which show what each part does, with one


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    weights: str = option(str(ROOT / "weights" / "tiny"), "model folder to evaluate")
    lora: str | None = option(None, "LoRA file to add to it", metavar="FILE")
    out: str = option("runs/evaluate", "folder for pictures, and for the results of the study")
    guidance: float | None = option(None, "of the composition's pictures (default: the model's recipe)")
    guidance_stop: float | None = option(None, "of these, the part of the steps after which guidance stops", most=1)
    quick: bool = option(False, "a fifth of the prompts; of the study two subjects, one seed and four ways")
    dreambooth: bool = option(False, "the study of DreamBooth instead of composition")
    seeds: int = option(3, "of the study: with how many seeds the first two ways are tried", least=1)
    subject: str | None = option(None, "folder of the pictures that the model was taught: the paper's table, by CLIP")
    clip: str | None = option(None, "CLIP folder for --subject (default: that of the model in the box, for its world)")


def open_model(weights: str | Path, lora: str | Path | None) -> StableDiffusion:
    """A model folder on the best device, with the updates of a LoRA file where there is one."""
    sd = tinydb.load(weights, choose_device("auto"))
    if lora:
        sd.add_lora(lora)
    return sd


def draw(sd: StableDiffusion, prompts: list[str], name: str, **sampling: float | None) -> list[Image.Image]:
    """A picture for each prompt, picture i with seed i."""
    images = []
    with tqdm(total=len(prompts), desc=name, unit="picture") as progress:
        for i in range(0, len(prompts), BATCH):
            images += sd.generate(prompts[i : i + BATCH], seed=i, **sampling)
            progress.update(len(images) - i)
    return images


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """A Markdown table."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(values)} |")


def with_error(values: list[float]) -> str:
    """The mean, and where there are two values or more, its standard error."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.0f}" if len(values) > 1 else ""
    return f"{np.mean(values):.0f}{error}"


# ---------------------------------------------------------------------------------------------- composition


def attributes_of(scene: Scene) -> list[int]:
    """What the judge should see in a scene: for each attribute the index of its value."""
    values = (scene.noun, scene.color, scene.pattern, scene.place, "red hat" if scene.hat else "nothing")
    return [names.index(value) for names, value in zip(ATTRIBUTES.values(), values)]


def accuracy(judge: Judge, images: list[Image.Image], scenes: list[Scene]) -> list[float]:
    """Percent of pictures that show each attribute of their scene, and all of them together."""
    logits = judge(to_pixels(images))
    seen = torch.stack([values.argmax(1) for values in logits.values()], 1)
    right = seen == torch.tensor([attributes_of(scene) for scene in scenes])
    return [100 * column.float().mean().item() for column in (*right.T, right.all(1))]


def composition(settings: Settings, sd: StableDiffusion, judge: Judge, out: Path) -> None:
    """Prompts that name everything, drawn and judged; beside the drawn ones, the judge's view of real scenes."""
    total = 100 if settings.quick else 500
    rows = {}
    for name, count, held_out in (("seen", total - total // 3, False), ("held out", total // 3, True)):
        rng = np.random.default_rng(100 + held_out)
        scenes = [sample_scene(rng, held_out) for _ in range(count)]
        images = draw(sd, [full_caption(scene) for scene in scenes], f"pairs {name}",
                      guidance_scale=settings.guidance, guidance_stop=settings.guidance_stop)
        grid(images[:80], 10).save(out / f"{name.replace(' ', '-')}.png")
        rows[f"pairs {name} ({count})"] = accuracy(judge, images, scenes)
        rows[f"{name}, drawn by world.py"] = accuracy(judge, [render(scene, rng) for scene in scenes], scenes)
    print_table("right, in percent", [*ATTRIBUTES, "all"],
                {name: [f"{value:.1f}" for value in values] for name, values in rows.items()})


# ------------------------------------------------------------------------------------------ one subject

# The 25 prompts of the DreamBooth paper's data set (arXiv 2208.12242, supplementary material): of anything; of objects,
# or of what is alive; and of anything again.
SURROUNDINGS = ("in the jungle", "in the snow", "on the beach", "on a cobblestone street", "on top of pink fabric",
                "on top of a wooden floor", "with a city in the background", "with a mountain in the background",
                "with a blue house in the background", "on top of a purple rug in a forest")
OF_OBJECTS = ("with a wheat field in the background", "with a tree and autumn leaves in the background",
              "with the Eiffel Tower in the background", "floating on top of water", "floating in an ocean of milk",
              "on top of green grass with sunflowers around it", "on top of a mirror",
              "on top of the sidewalk in a crowded street", "on top of a dirt road", "on top of a white rug")
OF_LIVING = ("wearing a red hat", "wearing a santa hat", "wearing a rainbow scarf",
             "wearing a black top hat and a monocle", "in a chef outfit", "in a firefighter outfit",
             "in a police outfit", "wearing pink glasses", "wearing a yellow shirt", "in a purple wizard outfit")
LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")
LIVING = "dog cat person man woman boy girl baby child horse bird rabbit bear hamster".split()
PAPER_PER_PROMPT = 4


def paper_prompts(noun: str, in_the_box: bool) -> list[str]:
    """The paper's 25 prompts or, `in_the_box`, as many of the same kinds in the words of its world."""
    more = OF_LIVING if noun.split()[-1] in LIVING else OF_OBJECTS
    surroundings, looks = [*SURROUNDINGS, *more], LOOKS
    if in_the_box:
        surroundings, looks = [*PLACES, *(f"{place} wearing a red hat" for place in PLACES)], list(COLORS)[:5]
    return [f"a {PLACEHOLDER} {noun} {surrounding}" for surrounding in surroundings] + [
        fill(f"a {NOUN} {PLACEHOLDER} {noun}", look) for look in looks]


def mean_of_pairs(features: Tensor) -> float:
    """The mean cosine of each two different unit vectors of (B, D)."""
    count = len(features)
    return ((features @ features.T).sum().item() - count) / (count * (count - 1))


def paper_table(settings: Settings, sd: StableDiffusion, out: Path) -> None:
    """What the paper measures of a subject (section 4.3, tables 1 and 3), with CLIP's features alone: CLIP-I, likeness
    to the subject's pictures; CLIP-T, to the prompt without the identifier; DIV, one less the likeness among pictures
    of one prompt; and PRES, the likeness to the subject of pictures of its class, of which less is better."""
    noun, clip = sd.info.class_noun, choose_clip(settings.clip, sd.info.base)
    require(noun is not None, f"{settings.lora or settings.weights}: it was taught no subject; give OUT/model of a run "
                              "as --weights, or OUT/lora.safetensors as --lora")
    require(clip is not None, NO_CLIP)
    pictures = list(read_pictures(Path(settings.subject), sd.resolution)[0].values())
    require(len(pictures) > 1, f"--subject {settings.subject}: {len(pictures)} pictures in it, expected more")
    prompts = paper_prompts(noun, sd.info.base.get("name") == TINY_NAME)[:: 5 if settings.quick else 1]
    images = draw(sd, [prompt for prompt in prompts for _ in range(PAPER_PER_PROMPT)], f"{len(prompts)} prompts")
    class_images = draw(sd, [class_prompt(noun)] * CLASS_IMAGES, class_prompt(noun))
    grid(images, PAPER_PER_PROMPT).save(out / "prompts.png")

    subject, text = clip.images(pictures), clip.text([without_subject(prompt) for prompt in prompts])
    features = clip.images(images).unflatten(0, (len(prompts), PAPER_PER_PROMPT))
    numbers = torch.tensor([[(of_prompt @ subject.T).mean(), (of_prompt @ words).mean(), 1 - mean_of_pairs(of_prompt)]
                            for of_prompt, words in zip(features, text)])
    rows = dict(zip(prompts, numbers.tolist())) | {"mean": numbers.mean(0).tolist()}
    print_table(f"{noun}, {PAPER_PER_PROMPT} pictures a prompt", ["CLIP-I", "CLIP-T", "DIV"],
                {name: [f"{value:.3f}" for value in values] for name, values in rows.items()})
    print(f"\nPRES {(clip.images(class_images) @ subject.T).mean():.3f} ({CLASS_IMAGES} pictures of "
          f"{class_prompt(noun)!r}); the subject's own pictures among themselves: CLIP-I {mean_of_pairs(subject):.3f}")


# ------------------------------------------------------------------------------------------ the study


def study_prompts(subject: Subject) -> list[tuple[str, dict[str, str]]]:
    """Ten prompts for a subject, none of which its pictures answer, and what the judge should see for each."""
    noun, new_places = subject.noun, [place for place in PLACES if place not in subject.places]
    prompts = [(f"[V] {noun} {place}", {"place": place}) for place in new_places]
    prompts += [(f"[V] {noun} {place} wearing a red hat", {"place": place, "topper": "red hat"})
                for place in new_places[:2]]
    prompts += [(f"a {color} [V] {noun} {place}", {"place": place, "color": color})
                for color, place in zip(("red", "yellow", "black"), new_places[2:])]
    return prompts


def similarity_to(judge: Judge) -> Similarity:
    """The cosine (N, M) between the judge's features of two lists of pictures, less what all pictures share."""
    center = judge.features(draw_batch(200, np.random.default_rng(2))[0]).mean(0)

    def similarity(images: list[Image.Image], others: list[Image.Image]) -> Tensor:
        a, b = (F.normalize(judge.features(to_pixels(pictures)) - center, dim=1) for pictures in (images, others))
        return a @ b.T

    return similarity


def shows_subject(judge: Judge, similarity: Similarity, images: list[Image.Image],
                  subject: Subject) -> dict[str, Tensor]:
    """Whether each picture has the subject's noun, its kind of marking, its colours, and all three.

    Its colours: of the same thing drawn by world.py everywhere in the subject's own colours and in every colour that a
    caption can name, marked and dressed alike, it is most like (on average over the three nearest pictures of a colour)
    the one in the subject's own.
    """
    look, rng = subject.look, np.random.default_rng(3)
    named = [replace(look, main=other.main, accent=other.accent, mark=other.mark) for other in (
        scene_look(Scene(subject.noun, color, look.marking, PLACES[0], False), rng) for color in COLORS)]
    drawn = [compose(subject.noun, each, place, rng) for each in (look, *named) for place in PLACES]
    logits = judge(to_pixels(images))
    by_color = similarity(images, drawn).unflatten(1, (1 + len(named), len(PLACES))).topk(3).values.mean(2)
    right = {"noun": logits["noun"].argmax(1) == ATTRIBUTES["noun"].index(subject.noun),
             "marking": logits["pattern"].argmax(1) == ATTRIBUTES["pattern"].index(look.marking),
             "colours": by_color.argmax(1) == 0}
    return right | {"all": torch.stack(list(right.values())).all(0)}


def subject_folder(name: str) -> Path:
    """Where the pictures of a subject are."""
    return ROOT / "weights" / "subjects" / name


def measure(judge: Judge, similarity: Similarity, name: str, images: list[Image.Image],
            class_images: list[Image.Image], placed: list[Image.Image]) -> dict[str, float]:
    """What the DreamBooth paper measures (arXiv 2208.12242, tables 1 and 3), of pictures of a subject, as many for each
    of `study_prompts` in turn, of pictures of the plain class prompt, and of the class `placed` in every place.

    In percent: subject fidelity (noun, marking, colours, all; "likeness" is the paper's DINO score with the judge's
    features), prompt fidelity ("prompt": all that the prompt names besides the subject is there), both at once
    ("recoloured": in another colour, it still has its kind of marking), of the class images "drift" (those that show
    the subject's colours), PRES (their likeness to the subject, less is better) and DIV (how far they are from one
    another, more is better), and of the placed ones "drift in places".
    """
    subject, prompts = SUBJECTS[name], study_prompts(SUBJECTS[name])
    wanted = [values for _, values in prompts for _ in range(len(images) // len(prompts))]
    photographs = list(read_pictures(subject_folder(name), images[0].width)[0].values())

    recoloured = torch.tensor(["color" in values for values in wanted])
    fidelity = shows_subject(judge, similarity, images, subject)
    logits = judge(to_pixels(images))
    prompt_right = torch.tensor([
        all(ATTRIBUTES[attribute][logits[attribute][i].argmax()] == value for attribute, value in values.items())
        for i, values in enumerate(wanted)])
    own = [image for image, other in zip(images, recoloured) if not other]
    among = similarity(class_images, class_images)
    drift, drift_in_places = (shows_subject(judge, similarity, pictures, subject)["colours"]
                              for pictures in (class_images, placed))
    numbers = {key: value[~recoloured] for key, value in fidelity.items()} | {
        "likeness": similarity(own, photographs), "prompt": prompt_right, "recoloured": fidelity["marking"][recoloured],
        "drift": drift, "drift in places": drift_in_places, "PRES": similarity(class_images, photographs),
        "DIV": 1 - among[~torch.eye(len(among), dtype=torch.bool)]}
    return {key: 100 * value.float().mean().item() for key, value in numbers.items()}


def draw_taught(folder: Path, name: str, lora: Path | None = None) -> list[list[Image.Image]]:
    """What a model, or one and a LoRA file, that was taught a subject draws: it, its class, and that in every place."""
    noun, sd = SUBJECTS[name].noun, open_model(folder, lora)
    prompts = [[prompt for prompt, _ in study_prompts(SUBJECTS[name]) for _ in range(PER_PROMPT)],
               [class_prompt(noun)] * CLASS_IMAGES,
               [f"{form}a {noun} {place}" for place in PLACES for form in ("", "a photo of ")]]
    return [draw(sd, each, f"{name}, {each[0]}") for each in prompts]


def draw_real(name: str) -> list[list[Image.Image]]:
    """What a perfect model would draw: the subject as each prompt wants it, and its class, by world.py itself."""
    subject, rng = SUBJECTS[name], np.random.default_rng(4)
    images = []
    for _, wanted in study_prompts(subject):
        look = replace(subject.look, topper=wanted.get("topper", subject.look.topper),
                       main=COLORS[wanted["color"]] if "color" in wanted else subject.look.main)
        images.append(compose(subject.noun, look, wanted["place"], rng))
    others = [replace(sample_scene(rng), noun=subject.noun) for _ in range(CLASS_IMAGES)]
    return [images, [render(scene, rng) for scene in others],
            [render(replace(scene, place=place), rng) for scene, place in zip(others, PLACES)]]


def run_script(script: str, *arguments: object) -> None:
    """Run a script as a user does. What it prints goes to stderr: stdout is for the tables."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], stdout=sys.stderr)
    require(done.returncode == 0, f"{script} ended with code {done.returncode}, see its own message")


def unasked_prompts(subject: Subject) -> list[str]:
    """Class prompts as the recipe has them, but with no colour, no place and no hat that the study asks for."""
    asked = " ".join(f"{prompt} {' '.join(values.values())}" for prompt, values in study_prompts(subject))
    colors = 3 * [color for color in COLORS if color not in asked]
    return [f"{'a photo of ' if i % 2 else ''}{phrase('{noun}', color)} {subject.places[i % len(subject.places)]}"
            for i, color in enumerate(colors)]


class Study:
    """Teaches subjects in several ways and measures the results. Numbers and pictures are kept in OUT as they come, so
    that the same command continues; models are not kept."""

    def __init__(self, weights: Path, out: Path, judge: Judge):
        self.weights, self.out, self.judge, self.similarity = weights, out, judge, similarity_to(judge)
        self.path, recipe = out / "results.json", asdict(ModelInfo.read(weights / "tinydb.json").recipe)
        empty = {"model": fingerprint(weights), "recipe": json.loads(json.dumps(recipe)), "rows": {}}  # tuples as lists
        self.kept = read_json(self.path) if self.path.exists() else empty
        require(all(self.kept.get(name) == empty[name] for name in ("model", "recipe")) and "rows" in self.kept,
                f"{self.path} has the results of another model or recipe; give another --out")
        self.rows: dict[str, dict[str, float]] = self.kept["rows"]  # "way/subject/seed" -> numbers

    def run(self, names: list[str], seeds: int, arms: list[str]) -> None:
        """Teach each subject in each way and measure; what an earlier call did is not done again."""
        order = [(arms[:COMPARED], seed) for seed in range(seeds)] + [([arm], 0) for arm in arms[COMPARED:]]
        for together, seed in order:
            for name in names:
                for arm in together:
                    if f"{arm}/{name}/{seed}" not in self.rows:
                        self.teach(arm, name, seed)
        for name in names:
            if f"before/{name}/0" not in self.rows:
                self.measure("before", name, 0, draw_taught(self.weights, name))
            if f"world.py/{name}/0" not in self.rows:
                self.measure("world.py", name, 0, draw_real(name))

    def print(self) -> None:
        """Two tables of what there is: the means of each way, and how far it is from the recipe on the same subjects
        and seeds; with the standard errors of these means over the runs."""
        runs = {way: {key.partition("/")[2]: row for key, row in self.rows.items() if key.startswith(f"{way}/")}
                for way in ("before", *ARMS, "world.py")}
        recipe, columns = runs["the recipe"], list(next(iter(self.rows.values())))
        print_table("mean ± standard error", ["runs", *columns], {
            way: [str(len(rows)), *(with_error([row[column] for row in rows.values()]) for column in columns)]
            for way, rows in runs.items() if rows})
        paired = {way: sorted(rows.keys() & recipe.keys()) for way, rows in runs.items() if way in ARMS}
        print_table("less the recipe", ["runs", *columns], {
            way: [str(len(keys)), *(with_error([runs[way][key][column] - recipe[key][column] for key in keys])
                                    for column in columns)]
            for way, keys in paired.items() if keys and way != "the recipe"})

    def pictures(self, arm: Arm, name: str) -> Path:
        """The folder with the pictures of a subject, with the texts beside them or without."""
        if arm.captions:
            return subject_folder(name)
        folder = self.out / "without-captions" / name
        if not folder.exists():
            shutil.copytree(subject_folder(name), folder, ignore=shutil.ignore_patterns("*.txt"))
        return folder

    def class_prompts(self, arm: Arm, name: str) -> list[object]:
        """The options of train.py that say which class prompts it takes."""
        if arm.prior == "unasked":
            path = self.out / f"unasked-{name}.txt"
            path.write_text("\n".join(unasked_prompts(SUBJECTS[name])) + "\n")
            return ["--class-prompts", path]
        return ["--class-prompts", "plain"] if arm.prior == "plain" else []

    def teach(self, way: str, name: str, seed: int) -> None:
        """Teach with train.py, or with diffusers on class images that train.py has drawn before; then measure."""
        arm, noun, folder = ARMS[way], SUBJECTS[name].noun, self.out / f"run-{name}-{seed}"
        class_dir = self.out / f"class-{arm.prior}-{name if arm.prior == 'unasked' else noun}-{seed}"
        class_dir.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        given = ["--images", self.pictures(arm, name), "--class", noun, "--weights", self.weights, "--seed", seed]
        if arm.diffusers:
            drawn = next(class_dir.iterdir(), None)
            require(drawn is not None, f"{class_dir}: no class images; do again a row that draws them, too")
            run_script("weights/reference.py", *given, "--out", folder / "model", "--class-dir", drawn)
        else:
            run_script("train.py", *given, *self.class_prompts(arm, name), *arm.options, "--out", folder,
                       "--class-dir", class_dir, "--save-every", 0)
        lora = folder / LORA_FILE
        taught = (self.weights, name, lora) if lora.exists() else (folder / "model", name)
        self.measure(way, name, seed, draw_taught(*taught))
        shutil.rmtree(folder)

    def measure(self, way: str, name: str, seed: int, pictures: list[list[Image.Image]]) -> None:
        """Measure what a model draws of a subject and of its class; keep the numbers, and the pictures on a sheet."""
        grid(sum(pictures, []), 10).save(self.out / f"{way}-{name}-{seed}.png".replace(" ", "-"))
        self.rows[f"{way}/{name}/{seed}"] = measure(self.judge, self.similarity, name, *pictures)
        with written_whole(self.path) as temporary:
            write_json(temporary, self.kept)


@torch.no_grad()
def main(settings: Settings):
    kind = "dreambooth" if settings.dreambooth else "subject" if settings.subject else "composition"
    out = Path(settings.out) / kind
    out.mkdir(parents=True, exist_ok=True)
    if settings.dreambooth:
        study = Study(Path(settings.weights), out, load_judge())
        names, seeds, ways = list(SUBJECTS), settings.seeds, list(ARMS)
        if settings.quick:
            names, seeds, ways = names[:2], 1, ways[:4]
        study.run(names, seeds, ways)
        study.print()
    elif settings.subject:
        paper_table(settings, open_model(settings.weights, settings.lora), out)
    else:
        composition(settings, open_model(settings.weights, settings.lora), load_judge(), out)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Try a smaller --weights")

"""The class images: what the model draws for the class before it learns the subject, to hold it to that."""

import json
import re
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from tinydb.cli import say
from tinydb.config import Recipe, require
from tinydb.data import fit, read_pictures
from tinydb.diffusion import SAMPLERS
from tinydb.pictures import describe, open_picture, save_png
from tinydb.pipeline import DEFAULT_IDENTIFIER, LAST_SEED, StableDiffusion, load
from tinydb.prompts import class_prompt, fill, read_captions, read_templates
from tinydb.run import StopSignal
from tinydb.storage import fingerprint
from tinydb.tokenizer import PLACEHOLDER

GROUP = 8  # pictures drawn together; fixed, since another group size changes the last bits of a picture
# What a key always tells of the schedule. A field that is added later, there or to the recipe, counts only if it
# differs from its default: so older keys stay valid.
KEY_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def plain_noun(noun: str, identifier: str) -> str:
    """The noun of --class without what the prompts around it say themselves: "a photo of a dog" -> "dog". InputError
    where there is none, or it names the subject, as the prompts of other trainers do: every class image would."""
    require(bool(noun.strip()), "--class is missing; expected what your subject is, such as dog")
    require(bool(identifier.strip()) and PLACEHOLDER not in identifier,
            f"--identifier {identifier!r}: expected a rare word, such as {DEFAULT_IDENTIFIER}")
    noun = re.sub(r"((an?|the|my|(photo|picture|image) of) )*", "", " ".join(noun.split()), count=1, flags=re.I)
    subject = {PLACEHOLDER.lower(), DEFAULT_IDENTIFIER, "sks", *identifier.lower().split()} & set(noun.lower().split())
    require(not subject, f"--class {noun!r}: {', '.join(subject)} is the identifier; expected the class alone, such as "
                         "dog, and an --identifier that means nothing")
    return noun


def is_picture(path: Path) -> bool:
    """Whether a file is there, and a whole picture."""
    try:
        return open_picture(path) is not None
    except ValueError:
        return False


class ClassImages:
    """The pictures of a class by one model, picture i from seed + i; those in the folder `own` are yours, and first.

    The prior keeps what its prompts name. So only a part of the pictures, the recipe's `plain_share`, has the plain
    prompt; the others take templates in turn: the recipe's, or those in a file. "plain" is none, the paper's prior.
    Templates and captions belong together: if only class prompts named places, every prompt with a place would come to
    mean the class, and if only captions did, the subject. So the recipe's prior is plain where the subject's pictures
    are not `captioned`.

    `key` names what a model in the folder `weights` draws under these settings, so that no other run's pictures are
    taken for it.
    """

    def __init__(self, sd: StableDiffusion, weights: Path, noun: str, seed: int, templates: str | None = None,
                 captioned: bool = True, own: str | None = None):
        self.sd, self.weights, self.seed = sd, weights, seed
        self.noun, self.templates, self.captioned = noun, templates, captioned
        pictures, self.remarks = read_pictures(Path(own), sd.resolution) if own else ({}, [])
        self.own, self.own_captions = list(pictures.values()), read_captions(Path(own or ""), pictures)
        recipe, schedule = sd.info.recipe, sd.schedule.config
        self.plain = class_prompt(noun)
        varied = ()
        if templates is None and captioned:
            varied = recipe.class_prompts
        elif templates not in (None, "plain"):
            require(Path(templates).exists(),
                    f"--class-prompts {templates}: no such file; expected a file of prompts, or: plain")
            varied = read_templates(Path(templates))
        self.varied = [fill(template, noun) for template in varied]
        prompts = [self.plain, recipe.plain_share, *self.varied] if self.varied else self.plain
        sampler = [recipe.class_sampler] if recipe.class_sampler != Recipe.class_sampler else []
        entries = schedule.HEADER | {f.name: getattr(schedule, f.name) for f in fields(schedule)
                                     if f.name in KEY_FIELDS or getattr(schedule, f.name) != f.default}
        self.key = fingerprint(weights, json.dumps([prompts, sd.resolution, entries, recipe.class_steps,
                                                    recipe.class_guidance, seed, GROUP, *sampler]))

    def prompt(self, i: int) -> str:
        """The prompt of picture i of those that are drawn; it does not depend on how many there are."""
        varied_share = 1 - self.sd.info.recipe.plain_share if self.varied else 0
        before, after = int(i * varied_share), int((i + 1) * varied_share)  # varied ones without and with this one
        return self.varied[before % len(self.varied)] if after > before else self.plain

    def prompts(self, count: int) -> list[str]:
        """The prompts of the first `count` pictures: of yours, and of those that are drawn."""
        own = [caption or self.plain for caption in self.own_captions[:count]]
        return own + [self.prompt(i) for i in range(count - len(own))]

    def advice(self, count: int) -> list[str]:
        """A line where the prompts of the first `count` pictures do not go together with the subject's captions."""
        varied = any(prompt != self.plain for prompt in self.prompts(count))
        if self.captioned and not varied:
            return ["the pictures have captions and the class images are plain: what only captions name, such as "
                    "places, may come to show your subject; --class-prompts FILE prevents it, or captions beside class "
                    "images of your own"]
        if varied and not self.captioned:
            return ["the class prompts vary and the pictures have no captions: what only class prompts name may come "
                    "to show anything but your subject; captions prevent it"]
        if not self.captioned and self.templates is None and self.sd.info.recipe.class_prompts:
            return ["the pictures have no captions, so all class images are plain; a 0.txt beside 0.png that says what "
                    f"is in it, such as: {PLACEHOLDER} {self.noun} on the grass, keeps more of the rest of a prompt"]
        return []

    def images(self, folder: Path, count: int, dtype: torch.dtype, rank: int, world_size: int,
               stop: StopSignal) -> list[Image.Image]:
        """`count` pictures: yours, and the rest from `folder`/key, where missing ones are drawn first by all ranks.

        Raises Stopped, in all ranks, where the user asked any of them to stop meanwhile.
        """
        own = self.own[:count]
        paths = [folder / self.key / f"{i:05d}.png" for i in range(count - len(own))]
        if rank == 0:
            say(*self.remarks, *self.advice(count))
            if own and paths:
                say(f"{len(own)} class images are yours; the model draws {len(paths)} more in {folder / self.key}")
            elif len(own) < len(self.own):
                say(f"the first {count} of your {len(self.own)} class images are used; --class-images says how many")
        self.draw(paths, dtype, rank, world_size, stop)
        if stop.asked_anywhere(self.sd.device):  # all ranks wait here for one another
            raise stop.stopped()
        return own + [fit(open_picture(path), self.sd.resolution) for path in paths]

    def draw(self, paths: list[Path], dtype: torch.dtype, rank: int, world_size: int, stop: StopSignal) -> None:
        """Draw those of `paths` that are missing or damaged. Groups of consecutive pictures go to the ranks in turn,
        and each is drawn whole, so the files are the same for any number of ranks and of pictures."""
        groups = [range(i, i + GROUP) for i in range(0, len(paths), GROUP)][rank::world_size]
        missing = {i for group in groups for i in group if i < len(paths) and not is_picture(paths[i])}
        groups = [group for group in groups if not missing.isdisjoint(group)]
        sd, recipe = self.sd, self.sd.info.recipe
        if groups and dtype != sd.dtype:  # drawn in half the bytes, which is faster than autocast
            device = sd.device
            self.sd.to("cpu")  # there may be no room for both
            sd = load(self.weights, device, dtype)
        progress = tqdm(total=len(missing), desc=f"class images, {self.plain!r}", unit="picture",
                        disable=rank > 0 or not groups)
        for group in groups:
            if stop.asked:
                break
            seeds = [(self.seed + i) % (LAST_SEED + 1) for i in group]
            prompts = [self.prompt(i) for i in group]
            images = sd.generate(prompts, steps=recipe.class_steps, sampler=recipe.class_sampler,
                                 guidance_scale=recipe.class_guidance, guidance_stop=1.0, seed=seeds[0])
            for i, image, prompt, seed in zip(group, images, prompts, seeds):
                if i not in missing:  # beyond the last, or there already: a run may have begun with it
                    continue
                about = describe(prompt, "", self.sd.identifier, Steps=recipe.class_steps,
                                 Sampler=SAMPLERS[recipe.class_sampler].name, Seed=seed,
                                 **{"CFG scale": recipe.class_guidance})
                paths[i].parent.mkdir(parents=True, exist_ok=True)
                paths[i].with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
                save_png(image, paths[i], about)
                progress.update()
        progress.close()
        if sd is not self.sd:
            del sd
            self.sd.to(device)

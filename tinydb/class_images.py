"""The class pictures: what the model draws for the class before it learns the subject, to hold it to that."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from tinydb.pictures import describe, save_png
from tinydb.pipeline import LAST_SEED, StableDiffusion, load
from tinydb.storage import fingerprint, written_whole

GROUP = 8  # pictures drawn together; fixed, since it decides their last bit


def class_prompt(noun: str) -> str:
    """The prompt of a class picture: "a photo of a dog"."""
    return f"a photo of {'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def class_images_key(sd: StableDiffusion, prompt: str, seed: int, weights: Path) -> str:
    """A name for the pictures that these settings and this model make, so that no other run's are taken for them."""
    recipe = sd.info.recipe
    return fingerprint(weights, json.dumps([prompt, sd.resolution, sd.schedule.config.to_dict(), recipe.class_steps,
                                            recipe.class_guidance, seed, GROUP]))


def make_class_images(sd: StableDiffusion, prompt: str, paths: list[Path], weights: Path, dtype: torch.dtype, seed: int,
                      rank: int, world_size: int, stop: "StopSignal") -> None:
    """Draw those of `paths` that are not there yet, picture i from seed + i, until the user asks to stop.

    Groups of consecutive pictures go to the ranks in turn: the files are the same for any number of ranks. `weights` is
    the folder of `sd`; in a lower precision `dtype` it is opened again, in half the bytes, which is faster than
    autocast.
    """
    groups = [range(i, min(i + GROUP, len(paths))) for i in range(0, len(paths), GROUP)]
    groups = [group for group in groups[rank::world_size] if not all(paths[i].exists() for i in group)]
    if groups and dtype != sd.dtype:
        sd = load(weights, sd.device, dtype)
    steps, guidance_scale = sd.info.recipe.class_steps, sd.info.recipe.class_guidance
    with tqdm(total=sum(map(len, groups)), desc=f"class images, {prompt!r}", unit="picture",
              disable=rank > 0 or not groups) as progress:
        for group in groups:
            if stop.asked:
                break
            first = (seed + group[0]) % (LAST_SEED + 1)
            images = sd.generate([prompt] * len(group), steps=steps, guidance_scale=guidance_scale, seed=first)
            for i, image in zip(group, images):
                about = describe(prompt, "", Steps=steps, Sampler="DDIM", Seed=seed + i, **{"CFG scale": guidance_scale})
                with written_whole(paths[i]) as temporary:
                    save_png(image, temporary, about)
            progress.update(len(group))

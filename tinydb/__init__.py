"""Stable Diffusion and DreamBooth from scratch, in plain PyTorch.

    import tinydb
    sd = tinydb.load("weights/tiny")  # or runs/dog/model, or any Stable Diffusion 1.x or 2.x folder
    [image] = sd.generate("a red dog on the moon", seed=1)
    image  # a PIL image, which a notebook shows

Several prompts, fewer steps, a picture to draw over: `help(sd.generate)`. Step by step, to watch:

    for latents, predicted in sd.denoise("a red dog on the moon"):
        [image] = sd.decode(predicted)

Its parts are PyTorch modules to look into and to call: sd.text_encoder, sd.unet, sd.vae, with sd.tokenizer and
sd.schedule. `train.py --images DIR --class dog` teaches it your dog; after that "[V] dog" in a prompt is yours.

How well pictures fit prompts, as cosines (pictures, prompts):

    clip = tinydb.load_clip("weights/tiny-clip")  # or any transformers CLIPModel folder
    clip.images([image]) @ clip.text(["a red dog", "a cat on the beach"]).T
"""

from tinydb.config import InputError
from tinydb.pipeline import StableDiffusion, load
from tinydb.scores import CLIP, load_clip

__all__ = ["CLIP", "InputError", "StableDiffusion", "load", "load_clip"]

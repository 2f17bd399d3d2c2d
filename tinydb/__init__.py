"""Stable Diffusion and DreamBooth from scratch, in plain PyTorch.

    import tinydb
    sd = tinydb.load("weights/tiny")
    sd.generate("a red dog on the moon", seed=1)[0]  # a PIL image, which notebooks display
"""

from tinydb.config import InputError
from tinydb.pipeline import StableDiffusion, load

__all__ = ["InputError", "StableDiffusion", "load"]

"""Pictures for people: pixels to images, grids, and the text that a PNG carries along."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

VISIBLE = 128  # pixels: pictures smaller than this are enlarged in a grid


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] -> B images; what lies outside is clipped."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row in `columns` columns; small ones are enlarged by a whole factor."""
    factor = max(1, -(-VISIBLE // min(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        enlarged = image.resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG that says how it was made, in the text chunk that A1111 and its successors read."""
    text = PngInfo()
    text.add_itxt("parameters", parameters)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=text)


def describe(prompt: str, negative: str, **settings: object) -> str:
    """The A1111 `parameters` text: the prompt, the negative prompt, then "Steps: 30, Seed: 1, ..."."""
    lines = [prompt] + ([f"Negative prompt: {negative}"] if negative else [])
    return "\n".join(lines + [", ".join(f"{name}: {value}" for name, value in settings.items())])

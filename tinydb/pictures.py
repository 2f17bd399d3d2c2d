"""Pictures for people: pixels to images, grids, and the text that a PNG carries along."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] -> B images; what lies outside is clipped."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row in `columns` columns."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet

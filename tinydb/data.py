"""Photographs to latents, and everything that is random in a training step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tinydb.config import require
from tinydb.pictures import is_flat, open_picture, to_pixels
from tinydb.vae import AutoencoderKL

ENCODE_BATCH = 2  # at full size the encoder, in fp32, needs a GB for each


def read_pictures(folder: Path, size: int) -> tuple[dict[str, Image.Image], list[str]]:
    """The pictures in a folder by file name, in order, each cut to its centre square of `size` pixels; and a remark on
    each file that is no picture, is flat or is too small. Hidden files, folders inside and texts beside pictures do not
    count."""
    require(folder.is_dir(), f"{folder}: not a folder; expected one with pictures in it")
    pictures, remarks = {}, []
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    picture_stems = {path.stem for path in paths if path.suffix.lower() != ".txt"}
    for path in paths:
        if path.suffix.lower() == ".txt" and path.stem in picture_stems:
            continue
        try:
            image = open_picture(path)
        except ValueError as error:
            remarks.append(f"{path.name} is skipped: {error}")
            continue
        if is_flat(image):
            remarks.append(f"{path.name} is one flat colour: is that what it should show?")
        if min(image.size) * 1.5 < size:
            remarks.append(f"{path.name} is only {image.width}x{image.height}: enlarged to {size}, it will look soft")
        pictures[path.name] = fit(image, size)
    return pictures, remarks


def fit(image: Image.Image, size: int) -> Image.Image:
    """The centre square of `image`, `size` pixels wide. No mirroring anywhere: faces and lettering have a side."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


@dataclass
class Latents:
    """The latents of a set of pictures. The VAE gives a Gaussian for each, mean and std (pictures, C, h, w), and a step
    draws from it. The VAE is frozen and there is no random crop, so encoding each picture once is enough.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, images: Iterable[Image.Image], vae: AutoencoderKL, device: torch.device) -> "Latents":
        """Encode images of one size."""
        images = list(images)
        groups = [images[i : i + ENCODE_BATCH] for i in range(0, len(images), ENCODE_BATCH)]
        encoded = [vae.encode(to_pixels(group).to(device)) for group in groups]
        mean = torch.cat([mean.float().cpu() for mean, _ in encoded])
        std = torch.cat([std.float().cpu() for _, std in encoded])
        return cls(mean, std)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. CUDA copies out of pinned memory while the CPU goes on. On MPS, a copy that does
    not wait may read what is not written yet (pytorch#189690)."""
    if device.type == "cuda":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Examples:
    """Everything random in one training step for one set of pictures, instance or class."""

    indices: Tensor  # (N,), which picture of its set each example is, to find its prompt
    latents: Tensor  # (N, C, h, w)
    noise: Tensor  # (N, C, h, w)
    timesteps: Tensor  # (N,)

    def part(self, index: int, parts: int) -> "Examples":
        """One of `parts` equal parts: the share of a micro-step."""
        tensors = (self.indices, self.latents, self.noise, self.timesteps)
        return Examples(*(tensor.chunk(parts)[index] for tensor in tensors))

    def to(self, device: torch.device) -> "Examples":
        """The same on a device, except `indices`: the prompts are found on the CPU."""
        moved = (to_device(tensor, device) for tensor in (self.latents, self.noise, self.timesteps))
        return Examples(self.indices, *moved)


def random_batch(sets: list[Latents], counts: list[int], num_timesteps: int, seed: int,
                 step: int) -> list[Examples]:
    """A batch: `counts[i]` examples of `sets[i]`, with their noise and timesteps.

    Everything comes from one CPU generator that depends on seed and step alone: a resumed run, and any split of the
    same counts over processes and micro-steps, sees the same numbers.
    """
    # a hash, so that (0, 1) and (1, 0) differ; manual_seed takes 63 bits, of which torch's CPU generator uses 32
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    indices, latents = [], []
    for encoded, count in zip(sets, counts):
        total = len(encoded.mean)
        # whole permutations, so that within a step no picture comes twice before each came once
        passes = [torch.randperm(total, generator=generator) for _ in range(math.ceil(count / total))]
        chosen = torch.cat(passes)[:count]
        posterior_noise = torch.randn(encoded.mean[chosen].shape, generator=generator)
        indices.append(chosen)
        latents.append(encoded.mean[chosen] + encoded.std[chosen] * posterior_noise)
    noise = torch.randn(sum(counts), *latents[0].shape[1:], generator=generator)
    timesteps = torch.randint(num_timesteps, (sum(counts),), generator=generator)
    return [Examples(*of_set) for of_set in zip(indices, latents, noise.split(counts), timesteps.split(counts))]

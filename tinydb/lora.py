"""Low-rank updates (LoRA, arXiv 2106.09685): a subject in a small file, beside a model that stays as it is.

A linear layer W (out, in) gets the product of two thin matrices, A (r, in) and B (out, r); equation 3:

    h = W x + (alpha / r) B A x

A convolution can have one too: A is then a convolution to r channels with its kernel, B one of 1x1.

Training moves A and B alone; drawing adds the product to W, once. lora_files.py reads and writes them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinydb.clip import EncoderLayer
from tinydb.config import require
from tinydb.lora_files import name_in_file, read_lora
from tinydb.unet import DownBlock, PixelLinear, Transformer2DModel, UpBlock


class LowRank(nn.Module):
    """The update of one layer, added to what the layer returns. Here alpha = r, so alpha / r is 1."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator):
        super().__init__()
        out_channels, in_channels = layer.weight.shape[:2]
        if type(layer) is nn.Conv2d:  # not PixelLinear, a linear layer on pixels
            self.lora_down = nn.Conv2d(in_channels, rank, layer.kernel_size, padding=layer.padding, bias=False)  # A
            self.lora_up = nn.Conv2d(rank, out_channels, 1, bias=False)  # B
        else:
            self.lora_down = type(layer)(in_channels, rank, bias=False)  # A
            self.lora_up = type(layer)(rank, out_channels, bias=False)  # B
        self.register_buffer("alpha", torch.tensor(float(rank)))  # other programs read it from the file
        kernel = layer.weight[0, 0].numel()  # 9 of a 3x3 convolution
        # 1 / rank as in diffusers, less for a convolution, which sums over its kernel
        nn.init.normal_(self.lora_down.weight, std=1 / (rank * kernel**0.5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)  # the first step starts from the model as it is
        self.to(layer.weight.device)
        self.enabled = True

    def add(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook: `inputs` holds x and `output` is W x, in the layer's own shapes -> W x + B A x."""
        return output + self.lora_up(self.lora_down(inputs[0])) if self.enabled else output


@contextmanager
def without_updates(updates: nn.ModuleDict | None) -> Iterator[None]:
    """Within it, the layers compute as before training: `updates` are not added."""
    layers = [] if updates is None else updates.values()
    for update in layers:
        update.enabled = False
    try:
        yield
    finally:
        for update in layers:
            update.enabled = True


def adapted_layers(part: str, model: nn.Module, convolutions: bool) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer of the transformers in a "text_encoder" or "unet", by its name in a file; and, if asked for,
    the `convolutions` of those of the UNet's blocks that have no transformer."""
    layers = {}
    for path, block in model.named_modules():
        if isinstance(block, (EncoderLayer, Transformer2DModel)):
            layers |= {name_in_file(part, name): layer for name, layer in block.named_modules(prefix=path)
                       if isinstance(layer, (nn.Linear, PixelLinear))}
        elif convolutions and isinstance(block, (DownBlock, UpBlock)) and not block.attentions:
            layers |= {name_in_file(part, f"{path}.resnets.{i}.{name}"): getattr(resnet, name)
                       for i, resnet in enumerate(block.resnets) for name in ("conv1", "conv2")}
    return layers


def updates_numel(models: dict[str, nn.Module], rank: int, convolutions: bool) -> int:
    """The number of parameters that the updates of these parts have."""
    layers = [layer for part, model in models.items() for layer in adapted_layers(part, model, convolutions).values()]
    return rank * sum(len(layer.weight) + layer.weight[0].numel() for layer in layers)


def attach(models: dict[str, nn.Module], rank: int, convolutions: bool, seed: int) -> dict[str, nn.ModuleDict]:
    """Give the layers of each part low-rank updates, and return those. The models' own weights and names stay."""
    generator = torch.Generator().manual_seed(seed)
    updates = {part: nn.ModuleDict() for part in models}
    for part, model in models.items():
        for name, layer in adapted_layers(part, model, convolutions).items():
            updates[part][name] = LowRank(layer, rank, generator)
            layer.register_forward_hook(updates[part][name].add)  # from here on, the layer returns the sum
    return updates


@torch.no_grad()
def merge_lora(models: dict[str, nn.Module], path: Path, scale: float) -> dict[str, Any]:
    """W += scale (alpha / r) B A in a "text_encoder" and a "unet"; what is merged adds up.

    Returns what the file says of itself. InputError names what does not fit the models, which are then unchanged.
    """
    layers = {name_in_file(part, name): layer for part, model in models.items() for name, layer in model.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))}
    updates, about = read_lora(path)
    require(bool(updates), f"{path}: holds no update; download it again")
    for name, update in updates.items():
        require(name in layers, f"{path}: this model has no layer {name}; give the model that it was made for")
        shapes = [tuple(tensor.shape) for tensor in (update["up"], update["down"], layers[name].weight)]
        up, down, weight = ((shape[0], math.prod(shape[1:])) if shape else (0, 0) for shape in shapes)
        fits = up == (weight[0], down[0]) and down[1] == weight[1] and down[0] > 0  # a convolution's A has its kernel
        require(fits and update.get("alpha", torch.zeros(1)).numel() == 1,
                f"{path}: {name} is {shapes[0]} times {shapes[1]}, and the layer {shapes[2]}; give the model that it "
                "was made for")
    for name, update in updates.items():
        weight = layers[name].weight
        down, up = (update[kind].flatten(1).to(weight.device) for kind in ("down", "up"))
        alpha = update["alpha"].item() if "alpha" in update else len(down)
        weight.copy_(weight.float() + (scale * alpha / len(down) * up @ down).view_as(weight))
    return about

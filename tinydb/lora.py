"""Low-rank updates (LoRA, arXiv 2106.09685): a subject in a file of a few MB, beside a model that stays as it is.

A linear layer W (out, in) gets the product of two thin matrices, A (r, in) and B (out, r); equation 3:

    h = W x + (alpha / r) B A x

A convolution can have one too: A is then a convolution to r channels with its kernel, B one of 1x1.

Training moves A and B alone; drawing adds the product to W, once. Files call them `lora_down`, `lora_up` and `alpha`,
under the path of the layer with _ for dots: the names of kohya's trainer, which diffusers, A1111 and ComfyUI read.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tinydb.clip import EncoderLayer
from tinydb.config import ModelInfo, require
from tinydb.layers import ResnetBlock2D
from tinydb.storage import read_tensors, save_tensors
from tinydb.unet import PixelLinear, Transformer2DModel

LORA_FILE = "lora.safetensors"
PREFIXES = {"text_encoder": "lora_te", "unet": "lora_unet"}
RENAMES = [  # kohya's names for those that diffusers gives, or once gave
    (r"\.processor\.(to_\w+)_lora\.", r".\1.lora."),
    (r"\.to_out\.lora\.", ".to_out.0.lora."),
    (r"\.(?:lora|lora_linear_layer)\.(down|up)\.", r".lora_\1."),
    (r"\.lora_A\.", ".lora_down."),
    (r"\.lora_B\.", ".lora_up."),
    (r"^text_encoder\.(?:text_model\.)?", "lora_te.text_model."),
    (r"^unet\.", "lora_unet."),
]
REFUSED = {  # names that give away what is not ours to add
    r".+[._](hada_w|lokr_w|lora_mid|oft_|dora_scale|on_input|diff(_b)?$).*": "LyCORIS or DoRA",
    r"lora_te[12]_.+|lora_unet_(input|middle|output)_block.+|text_encoder_2\..+": "made for SDXL",
    r"transformer\..+|lora_(unet|transformer)_(double|single|joint)_.+": "made for Flux or Stable Diffusion 3",
}


class LowRank(nn.Module):
    """The update of one layer, added to what the layer returns. Here alpha = r, so nothing scales it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator):
        super().__init__()
        out_channels, in_channels = layer.weight.shape[:2]
        if type(layer) is nn.Conv2d:
            self.lora_down = nn.Conv2d(in_channels, rank, layer.kernel_size, padding=layer.padding, bias=False)  # A
            self.lora_up = nn.Conv2d(rank, out_channels, 1, bias=False)  # B
        else:
            self.lora_down = type(layer)(in_channels, rank, bias=False)  # A
            self.lora_up = type(layer)(rank, out_channels, bias=False)  # B
        self.register_buffer("alpha", torch.tensor(float(rank)))
        kernel = layer.weight[0, 0].numel()  # 9 of a 3x3 convolution
        nn.init.normal_(self.lora_down.weight, std=1 / (rank * kernel**0.5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)  # the first step starts from the model as it is
        self.to(layer.weight.device)
        self.added = True
        layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """W x and the x that went in, (B, L, C_in) -> (B, L, C_out); of a convolution maps (B, C, h, w)."""
        return output + self.lora_up(self.lora_down(inputs[0])) if self.added else output


@contextmanager
def without_updates(updates: nn.ModuleDict | None) -> Iterator[None]:
    """Within it, the layers compute as before training: `updates` are not added."""
    layers = [] if updates is None else updates.values()
    for update in layers:
        update.added = False
    yield
    for update in layers:
        update.added = True


def adapted_layers(part: str, model: nn.Module, convolutions: bool) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer of the transformers in a "text_encoder" or "unet", by its name in a file; and, if asked for,
    the `convolutions` of the residual blocks."""
    layers = {}
    for path, block in model.named_modules():
        if isinstance(block, (EncoderLayer, Transformer2DModel)):
            layers |= {name_in_file(part, name): layer for name, layer in block.named_modules(prefix=path)
                       if isinstance(layer, (nn.Linear, PixelLinear))}
        elif convolutions and isinstance(block, ResnetBlock2D):
            layers |= {name_in_file(part, f"{path}.{name}"): getattr(block, name) for name in ("conv1", "conv2")}
    return layers


def updates_numel(models: dict[str, nn.Module], rank: int, convolutions: bool) -> int:
    """How many numbers the updates of these parts are."""
    layers = [layer for part, model in models.items() for layer in adapted_layers(part, model, convolutions).values()]
    return rank * sum(len(layer.weight) + layer.weight[0].numel() for layer in layers)


def attach(models: dict[str, nn.Module], rank: int, convolutions: bool, seed: int) -> dict[str, nn.ModuleDict]:
    """Give the layers of each part low-rank updates, and return those. The models' own weights and their names stay."""
    generator = torch.Generator().manual_seed(seed)
    return {part: nn.ModuleDict({name: LowRank(layer, rank, generator)
                                 for name, layer in adapted_layers(part, model, convolutions).items()})
            for part, model in models.items()}


def name_in_file(part: str, path: str) -> str:
    """("unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"."""
    return f"{PREFIXES[part]}_{path.replace('.', '_')}"


def save_lora(updates: nn.ModuleDict, path: Path, info: ModelInfo) -> None:
    """Write the updates, and beside them what they were taught and the model that they belong to."""
    about = {name: value for name, value in info.to_dict().items() if name != "recipe"}
    save_tensors(updates.state_dict(), path, tinydb=json.dumps(about))


def read_lora(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A LoRA file of kohya's or diffusers' form: "down" (r, in), "up" (out, r) and, unless r, "alpha" of each layer
    by its name in kohya's; and what `save_lora` wrote beside them. InputError where it is something else."""
    updates: dict[str, dict[str, Tensor]] = {}
    for stored_name, tensor in read_tensors(path).items():
        for pattern, what in REFUSED.items():
            require(re.fullmatch(pattern, stored_name) is None,
                    f"{path}: {what} ({stored_name}); expected a LoRA for Stable Diffusion 1.x or 2.x")
        require(bool(tensor.isfinite().all()), f"{path}: {stored_name} holds NaN or infinity; use an earlier save")
        name = stored_name
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        match = re.fullmatch(r"(lora_(?:unet|te)[._].+?)\.(?:lora_)?(down\.weight|up\.weight|alpha)", name)
        require(match is not None, f"{path}: {stored_name} is no tensor of a LoRA; expected names such as "
                                   "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
        updates.setdefault(match[1].replace(".", "_"), {})[match[2].partition(".")[0]] = tensor.float()
    about, peft = (read_note(path, key) for key in ("tinydb", "lora_adapter_metadata"))
    for name, update in updates.items():
        require(update.keys() >= {"down", "up"}, f"{path}: {name} lacks lora_down or lora_up; download it again")
        part = next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))
        alpha = peft.get(f"{part}.lora_alpha")  # where diffusers writes it
        if isinstance(alpha, (int, float)):
            update.setdefault("alpha", torch.tensor(float(alpha)))
    return updates, about


def read_note(path: Path, key: str) -> dict[str, Any]:
    """The JSON object that a safetensors file holds under `key` of its metadata; empty where there is none."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(key, "{}")
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        note = None
    require(isinstance(note, dict), f"{path}: its metadata {key} is no JSON object; download it again")
    return note


@torch.no_grad()
def merge_lora(models: dict[str, nn.Module], path: Path, scale: float) -> dict[str, Any]:
    """W += scale (alpha / r) B A in a "text_encoder" and a "unet"; what is merged adds up.

    Returns what the file says of itself. InputError names what does not fit the models, which are then unchanged.
    """
    layers = {name_in_file(part, name): layer for part, model in models.items() for name, layer in model.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))}
    updates, about = read_lora(path)
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
        weight.copy_(weight + (scale * alpha / len(down) * up @ down).view_as(weight))
    return about

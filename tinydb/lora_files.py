"""LoRA files: ours, in the form of kohya's trainer, which diffusers, A1111 and ComfyUI read, and those of others.

A layer's two matrices are `lora_down` and `lora_up`, with an `alpha`, under the path of the layer with _ for dots.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tinydb.config import ModelInfo, parse_json, require
from tinydb.storage import LORA_FILE, read_tensors, save_tensors

PREFIXES = {"text_encoder": "lora_te", "unet": "lora_unet"}
RENAMES = [  # kohya's names for those that diffusers gives, or once gave
    (r"\.processor\.(to_\w+)_lora\.", r".\1.lora."),
    (r"\.to_out\.lora\.", ".to_out.0.lora."),
    (r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora."),
    (r"\.(?:lora|lora_linear_layer)\.(down|up)\.", r".lora_\1."),
    (r"\.lora_A\.", ".lora_down."),
    (r"\.lora_B\.", ".lora_up."),
    (r"^text_encoder\.(?:text_model\.)?", "lora_te.text_model."),
    (r"^unet\.", "lora_unet."),
]
REFUSED = {  # names that give away what is not ours to add
    r".+[._](hada_w|lokr_w|lora_mid|oft_|dora_scale|on_input|diff(_b)?$).*": "LyCORIS or DoRA",
    r"lora_te[12]_.+|lora_unet_(input|middle|output)_block.+|text_encoder_2\..+": "made for SDXL",
    r"base_model\..+": "in PEFT's own form, not that of diffusers' save_lora_weights",
    r"transformer\..+|lora_(unet|transformer)_(double|single|joint)_.+": "made for Flux or Stable Diffusion 3",
}


def name_in_file(part: str, path: str) -> str:
    """("unet", "mid_block.attentions.0.proj_in") -> "lora_unet_mid_block_attentions_0_proj_in"."""
    return f"{PREFIXES[part]}_{path.replace('.', '_')}"


def save_lora(updates: nn.ModuleDict, path: Path, info: ModelInfo) -> None:
    """Write the updates, and beside them what they were taught and the model that they belong to."""
    about = {name: value for name, value in info.to_dict().items() if name != "recipe"}
    save_tensors(updates.state_dict(), path, tinydb=json.dumps(about))


def read_lora(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A LoRA file of kohya's or diffusers' form: "down" (r, in), "up" (out, r) and, where the file has it, "alpha"
    (else it is r) of each layer by its name in kohya's; and what `save_lora` wrote beside them. InputError where it is
    something else."""
    require(path.is_file(), f"{path}: no such file; expected a LoRA file, such as OUT/{LORA_FILE} of a run")
    require(path.suffix not in (".bin", ".ckpt", ".pt", ".pth"), f"{path}: a pickle; expected a .safetensors file")
    updates: dict[str, dict[str, Tensor]] = {}
    for stored_name, tensor in read_tensors(path).items():
        for pattern, what in REFUSED.items():
            require(re.fullmatch(pattern, stored_name) is None,
                    f"{path}: {what} ({stored_name}); expected a LoRA for Stable Diffusion 1.x or 2.x")
        tensor = tensor.float()
        require(bool(tensor.isfinite().all()), f"{path}: {stored_name} holds NaN or infinity; use an earlier save")
        name = stored_name
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        match = re.fullmatch(r"(lora_(?:unet|te)[._].+?)\.(?:lora_)?(down\.weight|up\.weight|alpha)", name)
        require(match is not None, f"{path}: {stored_name} is no tensor of a LoRA; expected names such as "
                                   "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
        updates.setdefault(match[1].replace(".", "_"), {})[match[2].partition(".")[0]] = tensor
    about, peft = (read_note(path, key) for key in ("tinydb", "lora_adapter_metadata"))
    for name in ("identifier", "class"):
        require(isinstance(about.get(name), str | None),
                f"{path}: {name} {about.get(name)!r} in its metadata; expected a word")
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        require(not any(peft.get(f"{part}.{name}") for part in PREFIXES),
                f"{path}: {name} in its metadata is not supported; save it in kohya's form, with an alpha for each "
                "layer")
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
        return parse_json((file.metadata() or {}).get(key, "{}"), f"{path}: its metadata {key}")

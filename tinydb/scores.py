"""A CLIP folder to ask: how well pictures fit prompts, and one another."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tinydb.clip import MEAN, STD, CLIPModel, preprocess
from tinydb.config import CLIPConfig, read_json, require, write_json
from tinydb.storage import build_model, read_tensors, save_tensors, written_whole
from tinydb.tokenizer import CLIPTokenizer

BATCH = 16  # pictures or prompts at once


@dataclass
class CLIP:
    """The model, and what makes ids of prompts. `load_clip` opens one."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @torch.inference_mode()
    def text(self, prompts: list[str]) -> Tensor:
        """B prompts -> unit vectors (B, D), on the CPU in float32. What is too long is cut off."""
        ids = self.tokenizer.encode(prompts).to(self.model.logit_scale.device)
        return torch.cat([self.model.text_features(part) for part in ids.split(BATCH)]).float().cpu()

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> Tensor:
        """B RGB pictures of any size -> unit vectors (B, D), on the CPU in float32."""
        side, like = self.model.config.vision_config.image_size, self.model.logit_scale  # its device, its precision
        parts = [preprocess(pictures[i : i + BATCH], side).to(like) for i in range(0, len(pictures), BATCH)]
        return torch.cat([self.model.image_features(pixels) for pixels in parts]).float().cpu()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessor open as well."""
        side = self.model.config.vision_config.image_size
        with written_whole(Path(folder)) as path:
            self.tokenizer.save(path)
            write_json(path / "config.json", self.model.config.to_dict())
            write_json(path / "preprocessor_config.json", {
                "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
                "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side},
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN,
                "image_std": STD, "do_convert_rgb": True})
            save_tensors(self.model.state_dict(), path / "model.safetensors", dtype)


def load_clip(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CLIP:
    """Open a transformers `CLIPModel` folder: OpenAI's, ours, or any with the same preprocessing.

    Raises InputError, one line with the cure, where the folder is not one or is damaged.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder; expected a CLIP (convert_weights.py makes one)")
    config = CLIPConfig.read(folder / "config.json")
    processing = folder / "preprocessor_config.json"
    mean = read_json(processing).get("image_mean", [*MEAN]) if processing.exists() else [*MEAN]
    require(mean == [*MEAN], f"{processing}: image_mean {mean!r} is not supported, only OpenAI's {MEAN}")
    path = folder / "model.safetensors"
    model = build_model(CLIPModel, config, "clip", read_tensors(path), path).to(device, dtype)
    return CLIP(model, CLIPTokenizer.read(folder))

"""Heat maps: where in a picture each word of the prompt is looked at."""

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tinydb.layers import Attention
from tinydb.pictures import grid
from tinydb.unet import BasicTransformerBlock, UNet2DConditionModel


class AttentionMaps:
    """Where in the picture each token of the text is looked at, as the mean over steps, blocks and heads.

        with AttentionMaps(sd.unet, pictures=1) as maps:
            sd.generate("a red dog")
        maps.mean()  # (B, T, h, w), which sums to 1 over the tokens

    `Attention` never holds the matrix softmax(Q K^T / sqrt(d)), so a hook on each cross-attention computes it once
    more; outside of the `with` there is none. Of each batch the last `pictures` count: guidance puts those of the
    negative prompt before them.
    """

    def __init__(self, unet: UNet2DConditionModel, pictures: int):
        self.unet, self.pictures, self.total, self.calls = unet, pictures, 0, 0

    def __enter__(self) -> "AttentionMaps":
        blocks = [module for module in self.unet.modules() if isinstance(module, BasicTransformerBlock)]
        self.hooks = [block.attn2.register_forward_hook(self.add) for block in blocks]
        self.hooks.append(self.unet.register_forward_pre_hook(self.start))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def start(self, unet: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.size = inputs[0].shape[-2:]

    def add(self, attention: Attention, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, text_embeds = (t[-self.pictures :] for t in inputs)
        q, k = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
                for t in (attention.to_q(x), attention.to_k(text_embeds)))  # (B, heads, L or T, d)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)  # (B, L, T)
        height, width = self.size
        while height * width > x.shape[1]:  # the level of the UNet that this is
            height, width = (height + 1) // 2, (width + 1) // 2
        maps = weights.transpose(1, 2).unflatten(2, (height, width))  # (B, T, height, width)
        self.total = self.total + F.interpolate(maps, self.size, mode="bilinear")
        self.calls += 1

    def mean(self) -> Tensor:
        """(B, T, h, w), of the latents' size."""
        return self.total / self.calls


def heat_map(image: Image.Image, values: Tensor) -> Image.Image:
    """The image in grey and, over it, `values` (h, w): black, red, yellow, white from their least to their largest."""
    values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    heat = np.asarray(Image.fromarray(values.float().cpu().numpy()).resize(image.size, Image.Resampling.BICUBIC))
    colors = 255 * np.clip(3 * heat[:, :, None] - (0, 1, 2), 0, 1)  # (H, W, 3): red is full at a third, green at two
    grey = np.asarray(image.convert("L"))[:, :, None]
    return Image.fromarray((0.4 * grey + 0.6 * colors).round().astype(np.uint8))


def attention_sheet(image: Image.Image, words: list[tuple[str, slice]], maps: Tensor) -> Image.Image:
    """A picture and, for each word, where it was looked at, on a scale of its own: `maps` (T, h, w) belong to tokens,
    and `words` name the tokens of each word (`StableDiffusion.words`)."""
    images = [image] + [heat_map(image, maps[tokens].mean(0)) for _, tokens in words]
    return grid(images, min(len(images), 6), ["", *(word for word, _ in words)])

"""CLIP (arXiv 2103.00020): a text encoder and an image encoder that meet in one space of unit vectors.

The text encoder alone is Stable Diffusion's: the UNet attends to its last hidden states. Both together say how well a
picture fits a prompt, or another picture:

    clip = tinydb.load_clip("weights/tiny-clip")
    clip.images(pictures) @ clip.text(prompts).T  # cosines (pictures, prompts)
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tinydb.config import CLIPConfig, TextConfig, VisionConfig
from tinydb.layers import attend
from tinydb.pictures import to_pixels

# The statistics of OpenAI's training pictures: red, green and blue in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SelfAttention(nn.Module):
    """Multi-head self-attention. Where it is causal, a token sees itself and the tokens before it."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, config.CAUSAL
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class MLP(nn.Module):
    """Two linear layers around `gelu`, or around CLIP's approximation of it, x * sigmoid(1.702 x)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class EncoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def empty_embedding(count: int, channels: int) -> nn.Embedding:
    """A table of `count` vectors to be filled from a file: drawing them at random would cost two seconds at the start
    of every program, for nothing."""
    return nn.Embedding.from_pretrained(torch.empty(count, channels), freeze=False)


def encoder(config: TextConfig | VisionConfig) -> nn.ModuleDict:
    """A stack of `EncoderLayer`s, as weight files name it."""
    return nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))})


class TextTransformer(nn.Module):
    """Token ids to one embedding per token. Padding is not masked: Stable Diffusion was trained like that."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": empty_embedding(config.vocab_size, config.hidden_size),
            "position_embedding": empty_embedding(config.max_position_embeddings, config.hidden_size),
        })
        self.encoder = encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> text_embeds (B, T, C)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """The text encoder alone, as Stable Diffusion folders carry it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> text_embeds (B, T, C)."""
        return self.text_model(input_ids)


class VisionEmbeddings(nn.Module):
    """A picture cut into patches, each of which becomes a token (ViT, arXiv 2010.11929), after a class token, which
    gathers what the picture shows."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        channels, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(channels))
        self.patch_embedding = nn.Conv2d(3, channels, patch, stride=patch, bias=False)
        self.position_embedding = empty_embedding((config.image_size // patch) ** 2 + 1, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size) -> (B, 1 + N, C)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, C)
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Pictures to one embedding each."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # the spelling of every weight file
        self.encoder = encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size), as `preprocess` makes them -> (B, C)."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPModel(nn.Module):
    """Both encoders, and the projections into the space that they share."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config.text_config)
        self.vision_model = VisionTransformer(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))  # log of 1 / temperature

    def text_features(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> unit vectors (B, D)."""
        ends = input_ids.argmax(dim=1)  # the first end token, whose id is the highest; it has seen all of the text
        hidden = self.text_model(input_ids)[torch.arange(len(input_ids)), ends]  # (B, C)
        return F.normalize(self.text_projection(hidden), dim=1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, image_size, image_size), as `preprocess` makes them -> unit vectors (B, D)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=1)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> the same with each colour of mean 0 and deviation 1 over CLIP's pictures."""
    mean, std = (torch.tensor(color, device=pixels.device).view(3, 1, 1) for color in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def preprocess(pictures: Iterable[Image.Image], side: int) -> Tensor:
    """RGB pictures of any size -> what the image encoder sees, (B, 3, side, side): the shorter side is resized, the
    middle cut out."""
    squares = []
    for picture in pictures:
        shorter = min(picture.size)
        width, height = (int(side * length / shorter) for length in picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        squares.append(resized.crop((left, top, left + side, top + side)))
    return normalize(to_pixels(squares))

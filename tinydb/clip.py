"""The text encoder of CLIP (arXiv 2103.00020): a causal transformer whose last hidden states the UNet attends to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydb.config import TextConfig


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: a token sees itself and the tokens before it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C / heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around `gelu`, or around CLIP's approximation of it, x * sigmoid(1.702 x)."""

    def __init__(self, config: TextConfig):
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

    def __init__(self, config: TextConfig):
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


class CLIPTextModel(nn.Module):
    """Token ids to one embedding per token. Padding is not masked: Stable Diffusion was trained like that."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": empty_embedding(config.vocab_size, config.hidden_size),
                "position_embedding": empty_embedding(config.max_position_embeddings, config.hidden_size),
            }),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers)),
            }),
            "final_layer_norm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        })

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> text_embeds (B, T, C)."""
        embeddings = self.text_model["embeddings"]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = embeddings["token_embedding"](input_ids) + embeddings["position_embedding"](positions)
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)

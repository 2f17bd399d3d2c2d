"""The UNet of Stable Diffusion (arXiv 2112.10752): from noisy latents, a timestep and a text to the prediction,
the noise or v as the schedule's `prediction_type` says.

    time_embedding --> every ResnetBlock2D        text_embeds --> every cross-attention

    conv_in -> down_blocks[0] ............ skips ............ up_blocks[-1] -> conv_out
                  down_blocks[1] ........ skips ........ up_blocks[-2]
                     ...                                  ...
                        down_blocks[-1] -> mid_block -> up_blocks[0]
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydb.config import UNetConfig
from tinydb.layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timesteps (B,) -> (B, channels), cosines first (arXiv 1706.03762, section 3.5)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None, :]  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The MLP behind the sinusoids."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in) -> (B, C)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """A linear layer gated by the gelu of another one (arXiv 2002.05202)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C_in) -> (B, L, C_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int):
        super().__init__()
        # Identity stands where diffusers has a dropout, so that the last layer is net.2 as in its files
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention among pixels, cross-attention from pixels to words, feed-forward."""

    def __init__(self, channels: int, context_channels: int, heads: int, upcast: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, qkv_bias=False, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, qkv_bias=False, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text_embeds: Tensor) -> Tensor:
        """x (B, H * W, C), text_embeds (B, T, C_text) -> (B, H * W, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text_embeds)
        return x + self.ff(self.norm3(x))


class PixelLinear(nn.Conv2d):
    """A linear layer over the channels of each pixel, whose weight is that of a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H * W, C_in) -> (B, H * W, C_out): the same product as the convolution's, and faster."""
        # permuted first, so that the gradient is laid out like a channels_last weight: DDP would copy it otherwise
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class Transformer2DModel(nn.Module):
    """A transformer block over the pixels of a feature map, between two linear layers, which SD 1.x stores as 1x1
    convolutions."""

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # 1e-5 everywhere else in the UNet
        projection = nn.Linear if config.use_linear_projection else PixelLinear
        self.proj_in, self.proj_out = projection(channels, channels), projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, config.cross_attention_dim, heads, config.upcast_attention)])

    def forward(self, x: Tensor, text_embeds: Tensor) -> Tensor:
        """x (B, C, H, W), text_embeds (B, T, C_text) -> (B, C, H, W)."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, H * W, C)
        for block in self.transformer_blocks:
            h = block(h, text_embeds)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[-2:])


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer where `heads` is given, then a downsampler unless this is the last."""

    def __init__(self, in_channels: int, out_channels: int, heads: int | None, last: bool, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels,
                          4 * config.block_out_channels[0], config.norm_num_groups, config.norm_eps)
            for i in range(config.layers_per_block))
        self.attentions = nn.ModuleList(Transformer2DModel(out_channels, heads, config) for _ in self.resnets if heads)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels, padding=1)])

    def forward(self, x: Tensor, temb: Tensor, text_embeds: Tensor) -> list[Tensor]:
        """The outputs of every stage; the last one goes on down, all of them cross over as skips."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, text_embeds)
            skips.append(x)
        if self.downsamplers:
            skips.append(self.downsamplers[0](x))
        return skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the coarsest level."""

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, 4 * config.block_out_channels[0], config.norm_num_groups, config.norm_eps)
            for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2DModel(channels, heads, config)])

    def forward(self, x: Tensor, temb: Tensor, text_embeds: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, text_embeds)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    """Resnets that each take one skip, transformers where `heads` is given, then an upsampler unless the last."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: list[int], heads: int | None, last: bool,
                 config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D((in_channels if i == 0 else out_channels) + skip, out_channels,
                          4 * config.block_out_channels[0], config.norm_num_groups, config.norm_eps)
            for i, skip in enumerate(skip_channels))
        self.attentions = nn.ModuleList(Transformer2DModel(out_channels, heads, config) for _ in self.resnets if heads)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, text_embeds: Tensor) -> Tensor:
        """Takes its skips off the end of the list; the next one left there tells the size to enlarge to."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, text_embeds)
        if self.upsamplers:
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x


class UNet2DConditionModel(nn.Module):
    """The denoiser of a latent diffusion model; its config decides widths, heads and projections."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, heads, last = config.block_out_channels, config.heads, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]  # what the down path leaves for the up path, in order
        for i, block_type in enumerate(config.down_block_types):
            self.down_blocks.append(DownBlock(
                channels[max(i - 1, 0)], channels[i],
                heads[i] if "CrossAttn" in block_type else None, i == last, config))
            skip_channels += [channels[i]] * (config.layers_per_block + (i < last))  # one more if it halves the size

        self.mid_block = MidBlock(channels[-1], heads[-1], config)

        self.up_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.up_block_types):
            level = last - i
            skips = [skip_channels.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(
                channels[min(level + 1, last)], channels[level], skips,
                heads[level] if "CrossAttn" in block_type else None, level == 0, config))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, text_embeds: Tensor) -> Tensor:
        """latents (B, C, H, W), timesteps (B,), text_embeds (B, T, C_text) -> prediction (B, C, H, W)."""
        temb = timestep_embedding(timesteps, self.config.block_out_channels[0])  # (B, C)
        temb = self.time_embedding(temb.to(latents.dtype))  # (B, 4 C)

        skips = [self.conv_in(latents)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, text_embeds)
        x = self.mid_block(skips[-1], temb, text_embeds)
        for block in self.up_blocks:
            x = block(x, skips, temb, text_embeds)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

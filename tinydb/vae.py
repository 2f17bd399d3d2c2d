"""The autoencoder (arXiv 2112.10752, section 3.1): pictures to latents of 1/8 the side and back.

It owns its scale factor: latents that come out of `encode`, and that `decode` takes, have about unit variance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydb.config import VAEConfig
from tinydb.layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D

EPS = 1e-6  # of every GroupNorm here; the UNet's resnets use 1e-5


class AttentionBlock(Attention):
    """Single-head self-attention among the pixels of a feature map, with its own norm and shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        return x + super().forward(h).transpose(1, 2).unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, None, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """Resnets, then half the size unless this is the last."""

    def __init__(self, in_channels: int, out_channels: int, last: bool, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, None, config.norm_num_groups, EPS)
            for i in range(config.layers_per_block))
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels, padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / 2, W / 2)."""
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if self.downsamplers else x


class UpBlock(nn.Module):
    """One resnet more than the encoder's, then twice the size unless this is the last."""

    def __init__(self, in_channels: int, out_channels: int, last: bool, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, None, config.norm_num_groups, EPS)
            for i in range(config.layers_per_block + 1))
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2 H, 2 W)."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsamplers:
            x = self.upsamplers[0](x, (2 * x.shape[-2], 2 * x.shape[-1]))
        return x


class Encoder(nn.Module):
    """Pictures to the mean and log-variance of their latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], channels[i], i == last, config) for i in range(len(channels)))
        self.mid_block = MidBlock(channels[-1], config.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 * latent_channels, H / factor, W / factor)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, last = config.block_out_channels[::-1], len(config.block_out_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], config.norm_num_groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(channels[max(i - 1, 0)], channels[i], i == last, config) for i in range(len(channels)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, h * factor, w * factor)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. There is no forward: call `encode` or `decode`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents' Gaussian,
        (B, latent_channels, H / factor, W / factor) each."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, latent_channels, h, w) -> pixels (B, 3, h * factor, w * factor), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

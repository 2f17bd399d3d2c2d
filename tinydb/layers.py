"""The blocks that the UNet and the VAE are made of. Module names are the key names of diffusers' weight files."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions, the first shifted by the time embedding (None in the VAE), and a shortcut around both."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), temb (B, C_t) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention softmax(Q K^T / sqrt(d)) V of each head (arXiv 1706.03762, section 3.2).

    Queries (B, L, C), keys and values (B, S, C) -> (B, L, C). `causal`: an output sees its own and earlier places only.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L or S, d)
    if q.device.type == "mps":  # computes wrong numbers of views before torch 2.12: pytorch#181133
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention. Queries come from `x`; keys and values from `context`, or from `x` itself where there is
    none."""

    def __init__(self, channels: int, context_channels: int, heads: int, qkv_bias: bool, upcast: bool = False):
        super().__init__()
        self.heads = heads
        self.upcast = upcast  # SD 2.1's products overflow float16
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, C), context (B, S, C_ctx) -> (B, L, C)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.upcast and q.dtype == torch.float16:
            with torch.autocast(q.device.type, enabled=False):
                out = attend(q.float(), k.float(), v.float(), self.heads).to(x.dtype)
        else:
            out = attend(q, k, v, self.heads)
        return self.to_out[0](out)


class Downsample2D(nn.Module):
    """Halve height and width with a strided convolution.

    `padding=1` in the UNet; `padding=0` in the VAE, which pads right and below only.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), rounded up in the UNet and down in the VAE."""
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample2D(nn.Module):
    """Enlarge to `size` by repeating pixels, then smooth with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C, *size)."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

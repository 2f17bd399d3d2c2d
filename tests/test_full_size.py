"""Stable Diffusion 1.5 and 2.1 at their real sizes, with random weights, against transformers and diffusers.

Reference and ours share each weight in memory, and only one network is there at a time: at most 4 GB.
"""

import math

import pytest
import torch
from conftest import Kind, prefixed, reference_models
from torch import Tensor, nn

from convert_weights import PARTS, SD1, SD2, Description

KINDS = pytest.mark.parametrize("kind", [SD1, SD2], ids=["sd1.5", "sd2.1"])


def fill(model: nn.Module) -> None:
    """Weights that keep activations near unit size: a million random numbers over and over, which takes a second where
    866 million would take ten."""
    numbers = noise(1_000_003)
    for name, parameter in model.named_parameters():
        values = numbers.repeat(math.ceil(parameter.numel() / len(numbers)))[: parameter.numel()].view(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(values * parameter[0].numel() ** -0.5)
        else:  # biases, and norms around 1
            parameter.copy_(0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0))


def both(kind: Description, part: str) -> tuple[nn.Module, nn.Module]:
    """The reference network of a part, and ours with the same random weights."""
    with torch.device("meta"):
        reference = reference_models(Kind(kind.text_encoder, kind.unet, kind.vae, kind.schedule, ""))[part]
        ours = PARTS[part][0](getattr(kind, part)).requires_grad_(False)
    reference = reference.requires_grad_(False).to_empty(device="cpu").eval()
    fill(reference)
    for name, buffer in reference.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1])[None])
    state = {prefixed(name) if part == "text_encoder" else name: tensor
             for name, tensor in reference.named_parameters()}
    ours.load_state_dict(state, assign=True)
    return reference, ours.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_close(ours: Tensor, reference: Tensor) -> None:
    """Within 1e-4 of the reference's largest value, and not because that is all there is."""
    assert ours.shape == reference.shape and reference.isfinite().all()
    assert reference.std() > 1e-3 * reference.abs().max() > 0
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


@KINDS
@torch.inference_mode()
def test_text_encoder(kind):
    reference, ours = both(kind, "text_encoder")
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(2))
    assert_close(ours(ids), reference(ids).last_hidden_state)


@KINDS
@torch.inference_mode()
def test_unet(kind):
    """For pictures of 192x320 pixels: the size of the network counts here, and larger ones take minutes."""
    reference, ours = both(kind, "unet")
    latents, timesteps = noise(1, 4, 24, 40), torch.tensor([501])
    text_embeds = noise(1, 77, kind.unet.cross_attention_dim)
    assert_close(ours(latents, timesteps, text_embeds), reference(latents, timesteps, text_embeds).sample)


@torch.inference_mode()
def test_vae():
    """The same network in SD 1.x and 2.x."""
    reference, ours = both(SD1, "vae")
    pixels, latents, scale = noise(1, 3, 128, 96).clamp(-1, 1), noise(1, 4, 16, 12), SD1.vae.scaling_factor
    mean, std = ours.encode(pixels)
    expected = reference.encode(pixels).latent_dist
    assert_close(mean, expected.mean * scale)
    assert_close(std, expected.std * scale)
    assert_close(ours.decode(latents), reference.decode(latents / scale).sample)

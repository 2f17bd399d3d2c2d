"""The three networks compute what those of diffusers and transformers compute, forward and backward."""

import copy
import math
from collections.abc import Iterator
from dataclasses import fields

import diffusers
import pytest
import torch
from conftest import Kind, prefixed, reference_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig

from convert_weights import SD1, SD2
from tinydb.clip import CLIPTextModel
from tinydb.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from tinydb.layers import Attention
from tinydb.unet import Transformer2DModel, UNet2DConditionModel
from tinydb.vae import AutoencoderKL

# Stable Diffusion 1.5 and 2.1 at their real sizes, as convert_weights.py builds them
SD15, SD21 = (Kind(known.text_encoder, known.unet, known.vae, known.schedule, "") for known in (SD1, SD2))
pytestmark = pytest.mark.usefixtures("one_thread")  # on a busy machine, two wait for each other

real_sizes = pytest.mark.parametrize("kind", [SD15, SD21], ids=["sd1.5", "sd2.1"])


def our_models(kind: Kind) -> dict[str, nn.Module]:
    """The three networks without memory behind them."""
    with torch.device("meta"):
        return {"text_encoder": CLIPTextModel(kind.text), "unet": UNet2DConditionModel(kind.unet),
                "vae": AutoencoderKL(kind.vae)}


def assert_close(ours: Tensor, reference: Tensor) -> None:
    """Within 1e-4 of the reference's largest value."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


def assert_gradients_close(ours: nn.Module, reference: nn.Module, name_of=str) -> None:
    """Each tensor's gradient within 1e-3 of its norm; tensors whose gradient is rounding noise are measured
    against the whole model's. `name_of` makes our names of the reference's."""
    expected = {name_of(name): parameter.grad for name, parameter in reference.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    floor = 1e-6 * torch.cat([grad.flatten() for grad in expected.values()]).norm()
    assert found.keys() == expected.keys()
    wrong = [name for name, grad in expected.items()
             if (found[name] - grad).norm() > 1e-3 * grad.norm().clamp(min=floor)]
    assert not wrong


def trainable(model: nn.Module) -> nn.Module:
    """A copy with gradients, so that other tests keep the model as it was loaded."""
    return copy.deepcopy(model).requires_grad_(True)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def token_ids(pair) -> Tensor:
    return torch.randint(pair.config.text.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1))


def unet_inputs(pair, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of another timestep for each of two pictures, and their texts."""
    text_embeds = noise(2, 77, pair.config.unet.cross_attention_dim)
    return noise(2, pair.config.unet.in_channels, *size), torch.tensor([1, 981]), text_embeds


def test_text_encoder_output(pair):
    with torch.inference_mode():
        assert_close(pair.sd.text_encoder(token_ids(pair)), pair.reference.text_encoder(token_ids(pair))[0])


def test_text_encoder_gradients(pair):
    ours, reference = trainable(pair.sd.text_encoder), trainable(pair.reference.text_encoder)
    ours(token_ids(pair)).square().mean().backward()
    reference(token_ids(pair))[0].square().mean().backward()
    assert_gradients_close(ours, reference, prefixed)


@pytest.mark.parametrize("size", [(8, 12), (7, 5)], ids=str)
def test_unet_output(pair, size):
    inputs = unet_inputs(pair, size)
    with torch.inference_mode():
        assert_close(pair.sd.unet(*inputs), pair.reference.unet(*inputs).sample)


def test_unet_gradients(pair):
    inputs = unet_inputs(pair)
    ours, reference = trainable(pair.sd.unet), trainable(pair.reference.unet)
    ours(*inputs).square().mean().backward()
    reference(*inputs).sample.square().mean().backward()
    assert_gradients_close(ours, reference)


def test_vae_encode(pair):
    pixels = noise(2, 3, 48, 16).clamp(-1, 1)
    with torch.inference_mode():
        mean, std = pair.sd.vae.encode(pixels)
        reference = pair.reference.vae.encode(pixels).latent_dist
    assert_close(mean, reference.mean * pair.config.vae.scaling_factor)
    assert_close(std, reference.std * pair.config.vae.scaling_factor)


def test_vae_decode(pair):
    latents = noise(2, pair.config.vae.latent_channels, 3, 5)
    with torch.inference_mode():
        reference = pair.reference.vae.decode(latents / pair.config.vae.scaling_factor).sample
        assert_close(pair.sd.vae.decode(latents), reference)


def test_vae_log_variance_is_clamped(pairs):
    """To -30 ... 20, as in diffusers: whatever the network says, the standard deviation is a finite number."""
    vae = copy.deepcopy(pairs("sd1").sd.vae)
    vae.quant_conv.weight.data.zero_()
    for logvar, clamped in ((1000.0, 20), (-1000.0, -30)):
        vae.quant_conv.bias.data.fill_(logvar)
        _, std = vae.encode(torch.zeros(1, 3, 8, 8))
        torch.testing.assert_close(std, torch.full_like(std, math.exp(clamped / 2) * vae.config.scaling_factor),
                                   rtol=1e-5, atol=0)


@pytest.fixture
def sums_in_float16() -> Iterator[None]:
    """Attention as on a device whose products overflow float16; the usual kernels add up in float32."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.mark.parametrize("autocast", [False, True])
@torch.inference_mode()
def test_large_attention_products_stay_finite(sums_in_float16, autocast):
    """SD 2.1 has them, and says so: `upcast_attention`. Without it there is nothing but NaN."""
    for upcast in (True, False):
        attention = Attention(64, 64, heads=2, qkv_bias=False, upcast=upcast)
        for projection in (attention.to_q, attention.to_k):
            projection.weight.copy_(300 * torch.eye(64))
        x = noise(1, 9, 64)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            found = attention(x) if autocast else attention.half()(x.half())
        assert found.dtype == torch.float16 and found.isfinite().all() == upcast


@real_sizes
def test_tensor_names_and_shapes_at_real_size(kind):
    """The names are those of the weight files, where the text encoder's start with `text_model.`."""
    with torch.device("meta"):
        references = reference_models(kind)
    for part, ours in our_models(kind).items():
        expected = {prefixed(name) if part == "text_encoder" else name: tensor.shape
                    for name, tensor in references[part].state_dict().items()}
        assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected


@pytest.mark.parametrize("kind, counts", [
    (SD15, {"text_encoder": (196, 123_060_480), "unet": (686, 859_520_964), "vae": (248, 83_653_863)}),
    (SD21, {"text_encoder": (372, 340_387_840), "unet": (686, 865_910_724), "vae": (248, 83_653_863)}),
], ids=["sd1.5", "sd2.1"])
def test_tensor_and_parameter_counts(kind, counts):
    states = {part: model.state_dict() for part, model in our_models(kind).items()}
    assert {part: (len(state), sum(tensor.numel() for tensor in state.values()))
            for part, state in states.items()} == counts


def test_group_norm_eps():
    """1e-6 in the VAE and before the UNet's transformers, 1e-5 elsewhere: too little to show on random weights."""
    vae, unet = our_models(SD15)["vae"], our_models(SD15)["unet"]
    assert {module.eps for module in vae.modules() if isinstance(module, nn.GroupNorm)} == {1e-6}
    transformers = {module.norm for module in unet.modules() if isinstance(module, Transformer2DModel)}
    others = {module for module in unet.modules() if isinstance(module, nn.GroupNorm)} - transformers
    assert {norm.eps for norm in transformers} == {1e-6} and {norm.eps for norm in others} == {1e-5}


def test_defaults_are_those_of_diffusers_and_transformers():
    """A config file may leave out what is the default."""
    with torch.device("meta"):
        theirs = {TextConfig: CLIPTextConfig(), UNetConfig: diffusers.UNet2DConditionModel().config,
                  VAEConfig: diffusers.AutoencoderKL().config, ScheduleConfig: diffusers.DDIMScheduler().config}
    for config_class, defaults in theirs.items():
        for field in fields(config_class):
            expected = getattr(defaults, field.name)
            if expected is not None:  # diffusers leaves the UNet's sample_size open
                expected = tuple(expected) if isinstance(expected, list) else expected
                assert getattr(config_class(), field.name) == expected, field.name

"""The three networks compute what those of diffusers and transformers compute, forward and backward."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Kind, prefixed, reference_models
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from tinydb.clip import CLIPTextModel
from tinydb.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from tinydb.layers import Attention, Downsample2D
from tinydb.unet import Transformer2DModel, UNet2DConditionModel, timestep_embedding
from tinydb.vae import AutoencoderKL

SD15 = Kind(
    TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    UNetConfig(cross_attention_dim=768),
    VAEConfig(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
              block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
    ScheduleConfig(), "<|endoftext|>")
SD2 = replace(
    SD15,
    text=TextConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23,
                    hidden_act="gelu"),
    unet=UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True))

real_sizes = pytest.mark.parametrize("kind", [SD15, SD2], ids=["sd1.5", "sd2"])


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


def token_ids(pair) -> Tensor:
    return torch.randint(pair.config.text.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1))


def unet_inputs(pair, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of another timestep for each of two pictures, and their texts."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, pair.config.unet.in_channels, *size, generator=generator)
    text_embeds = torch.randn(2, 77, pair.config.unet.cross_attention_dim, generator=generator)
    return latents, torch.tensor([1, 981]), text_embeds


def test_text_encoder_output(pair):
    with torch.inference_mode():
        assert_close(pair.sd.text_encoder(token_ids(pair)), pair.reference.text_encoder(token_ids(pair))[0])


def test_text_encoder_gradients(pair):
    ours, reference = trainable(pair.sd.text_encoder), trainable(pair.reference.text_encoder)
    ours(token_ids(pair)).square().mean().backward()
    reference(token_ids(pair))[0].square().mean().backward()
    assert_gradients_close(ours, reference, prefixed)


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (7, 5), (9, 10)], ids=str)
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


@pytest.mark.parametrize("size", [(32, 32), (48, 16)], ids=["square", "wide"])
def test_vae_encode(pair, size):
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.inference_mode():
        mean, std = pair.sd.vae.encode(pixels)
        reference = pair.reference.vae.encode(pixels).latent_dist
    assert_close(mean, reference.mean * pair.config.vae.scaling_factor)
    assert_close(std, reference.std * pair.config.vae.scaling_factor)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=["square", "wide"])
def test_vae_decode(pair, size):
    shape = (2, pair.config.vae.latent_channels, *size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        reference = pair.reference.vae.decode(latents / pair.config.vae.scaling_factor).sample
        assert_close(pair.sd.vae.decode(latents), reference)


def test_vae_log_variance_is_clamped(pairs):
    """At float32's limits the standard deviation stays finite, as in diffusers."""
    vae = copy.deepcopy(pairs("sd1").sd.vae)
    vae.quant_conv.weight.data.zero_()
    vae.quant_conv.bias.data.fill_(1000.0)
    _, std = vae.encode(torch.zeros(1, 3, 8, 8))
    assert torch.allclose(std, torch.tensor(20.0 / 2).exp() * vae.config.scaling_factor)


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
    (SD2, {"text_encoder": (372, 340_387_840), "unet": (686, 865_910_724), "vae": (248, 83_653_863)}),
], ids=["sd1.5", "sd2"])
def test_tensor_and_parameter_counts(kind, counts):
    states = {part: model.state_dict() for part, model in our_models(kind).items()}
    assert {part: (len(state), sum(tensor.numel() for tensor in state.values()))
            for part, state in states.items()} == counts


@real_sizes
def test_group_norm_eps(kind):
    models = our_models(kind)
    eps = {part: [module.eps for module in models[part].modules() if isinstance(module, nn.GroupNorm)]
           for part in ("vae", "unet")}
    assert eps["vae"] == [1e-6] * 52
    assert sorted(eps["unet"]) == [1e-6] * 16 + [1e-5] * 45
    transformers = [module for module in models["unet"].modules() if isinstance(module, Transformer2DModel)]
    assert [module.norm.eps for module in transformers] == [1e-6] * 16


@pytest.mark.parametrize("kind, shape", [(SD15, (320, 320, 1, 1)), (SD2, (320, 320))], ids=["sd1.5", "sd2"])
def test_transformer_projections(kind, shape):
    """1x1 convolutions in Stable Diffusion 1, linear layers in 2."""
    transformer = our_models(kind)["unet"].down_blocks[0].attentions[0]
    assert transformer.proj_in.weight.shape == transformer.proj_out.weight.shape == shape


@pytest.mark.parametrize("kind, heads", [(SD15, {8}), (SD2, {5, 10, 20})], ids=["sd1.5", "sd2"])
def test_attention_head_dim_is_the_number_of_heads(kind, heads):
    modules = [module for module in our_models(kind)["unet"].modules() if isinstance(module, Attention)]
    assert {module.heads for module in modules} == heads


@pytest.mark.parametrize("padding, seen", [(0, (0, 0)), (1, (1, 1))], ids=["vae", "unet"])
def test_downsample_padding(padding, seen):
    """The VAE pads right and below only: the top left pixel meets the kernel's corner, not its centre."""
    downsample = Downsample2D(1, padding)
    impulse = torch.zeros(1, 1, 4, 4)
    impulse[0, 0, 0, 0] = 1
    with torch.inference_mode():
        corner = downsample(impulse)[0, 0, 0, 0] - downsample.conv.bias[0]
    assert torch.isclose(corner, downsample.conv.weight[0, 0][seen])


def test_vae_downsamples_with_the_lopsided_padding(pairs):
    paddings = {m.conv.padding for m in pairs("sd1").sd.vae.modules() if isinstance(m, Downsample2D)}
    assert paddings == {(0, 0)}


@pytest.mark.parametrize("channels", [32, 320])
def test_time_embedding(channels):
    """Cosines first, divided by half the channels."""
    timesteps = torch.tensor([0, 1, 500, 999])
    ours = timestep_embedding(timesteps, channels)
    torch.testing.assert_close(ours, get_timestep_embedding(timesteps, channels, True, 0))
    assert ours[0].tolist() == [1.0] * (channels // 2) + [0.0] * (channels // 2)


def test_sd21_attention_in_float16_stays_finite():
    """Its products exceed 65504, float16's largest number, so they are taken in float32."""
    attention = Attention(16, 16, heads=2, qkv_bias=False, upcast=True).half()
    with torch.no_grad():
        attention.to_q.weight.copy_(100 * torch.eye(16))
        attention.to_k.weight.copy_(100 * torch.eye(16))
        assert attention(torch.ones(1, 3, 16, dtype=torch.float16) * 10).isfinite().all()

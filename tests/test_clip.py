"""Both halves of CLIP compute what transformers computes, on folders that transformers wrote."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import edit_json, edit_tensors, reference_tokenizer, refusal, save_clip, vocabulary
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import convert_weights
import tinydb
from tinydb.clip import CLIPModel, preprocess
from tinydb.config import CLIPConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a photo of the dog", "red cat! thing, é", "", "a " * 100]
# ViT-B/32 and ViT-L/14: their real widths and heads; `layers` of them, and how they describe themselves
B32 = {"text": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
       "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}}
L14 = {"text": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
       "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}}


def reference_config(shape: dict, text_layers: int, vision_layers: int, projection: int) -> transformers.CLIPConfig:
    """As OpenAI's files are: the end token is said to be 2, which it is not."""
    text = {**shape["text"], "num_hidden_layers": text_layers, "vocab_size": len(vocabulary()), "eos_token_id": 2}
    return transformers.CLIPConfig(text_config=text, projection_dim=projection,
                                   vision_config={**shape["vision"], "num_hidden_layers": vision_layers})


def pictures() -> list[Image.Image]:
    """One wider than high, one higher than wide, one smaller than what CLIP looks at; neither of even sides."""
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))
            for i, size in enumerate([(301, 517), (403, 229), (63, 41)])]


@torch.inference_mode()
def features(model: transformers.CLIPModel, folder: Path) -> tuple[Tensor, Tensor]:
    """What transformers makes of the pictures and of PROMPTS."""
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt").pixel_values
    ids = reference_tokenizer("<|endoftext|>")(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    output = model(input_ids=ids.input_ids, pixel_values=pixels)
    return output.image_embeds, output.text_embeds


@pytest.mark.parametrize("shape, projection", [(B32, 512), (L14, 768)], ids=["b32", "l14"])
def test_unit_vectors_are_those_of_transformers(tmp_path, shape, projection):
    reference = save_clip(tmp_path, reference_config(shape, 2, 2, projection))
    clip, (images, text) = tinydb.load_clip(tmp_path), features(reference, tmp_path)
    assert torch.allclose(clip.images(pictures()).norm(dim=1), torch.ones(3))
    assert (clip.images(pictures()) - images).abs().max() <= 1e-4 * images.abs().max()
    assert (clip.text(PROMPTS) - text).abs().max() <= 1e-4 * text.abs().max()


@pytest.fixture
def folder(small_clip, tmp_path) -> Path:
    """A small CLIP to damage."""
    return Path(shutil.copytree(small_clip, tmp_path / "clip"))


def test_preprocessing_is_that_of_transformers(folder):
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt").pixel_values
    assert torch.allclose(preprocess(pictures(), 32), pixels, atol=1e-6)


@pytest.mark.parametrize("shape, text, vision, projection, tensors, parameters", [
    (B32, 12, 12, 512, 398, 151_277_313), (L14, 12, 24, 768, 590, 427_616_513)], ids=["b32", "l14"])
def test_names_and_shapes_are_those_of_published_files(shape, text, vision, projection, tensors, parameters):
    config = reference_config(shape, text, vision, projection)
    config.text_config.vocab_size = 49408
    with torch.device("meta"):
        reference = transformers.CLIPModel(config)
        ours = CLIPModel(CLIPConfig.from_dict(config.to_dict(), "config.json"))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == tensors and sum(shape.numel() for shape in shapes.values()) == parameters


def test_what_is_saved_opens_in_transformers_again(folder, tmp_path):
    clip = tinydb.load_clip(folder)
    clip.save(tmp_path / "again")
    images, text = features(transformers.CLIPModel.from_pretrained(tmp_path / "again"), tmp_path / "again")
    assert torch.allclose(clip.images(pictures()), images, atol=1e-6)
    assert torch.allclose(clip.text(PROMPTS), text, atol=1e-6)
    saved = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "again").to_dict()
    assert saved["size"] == {"shortest_edge": 32} and saved["crop_size"] == {"height": 32, "width": 32}


def half_config(folder: Path, half: str) -> dict:
    """The entries of text_config or vision_config."""
    return json.loads((folder / "config.json").read_text())[half]


def test_older_files_open(folder):
    """They repeat the halves under another name, which decides, and carry buffers that are no weights."""
    text = half_config(folder, "text_config")
    edit_json(folder / "config.json", text_config_dict=text, text_config={"num_hidden_layers": 7})
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors | {
        f"{half}_model.embeddings.position_ids": torch.arange(9.0)[None] for half in ("text", "vision")})
    assert tinydb.load_clip(folder).text(["a dog"]).shape == (1, 16)


@pytest.mark.parametrize("half", ["text_config", "vision_config"])
def test_what_the_older_name_of_a_half_leaves_out_is_the_usual(half):
    """And not what the half itself says: as transformers reads it."""
    entries = {"model_type": "clip", half: {"hidden_size": 96, "num_hidden_layers": 7, "hidden_act": "gelu"},
               f"{half}_dict": {"hidden_size": 48, "num_attention_heads": 4}}
    ours = getattr(CLIPConfig.from_dict(entries, "config.json"), half)
    reference = getattr(transformers.CLIPConfig(**entries), half)
    assert (ours.hidden_size, ours.num_hidden_layers, ours.hidden_act) == (48, 12, "quick_gelu")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    assert [getattr(ours, name) for name in names] == [getattr(reference, name) for name in names]


def test_a_folder_that_is_no_clip_is_refused(folder, tmp_path, pairs):
    assert "not a folder" in refusal(tinydb.load_clip, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no such file" in refusal(tinydb.load_clip, tmp_path / "empty")
    assert "config.json" in refusal(tinydb.load_clip, pairs("sd1").folder)
    assert "'clip_text_model', expected 'clip'" in refusal(tinydb.load_clip, pairs("sd1").folder / "text_encoder")
    edit_tensors(folder / "model.safetensors", lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name})
    assert "2 tensors do not fit the model: missing vision_model.post_layernorm" in refusal(tinydb.load_clip, folder)


@pytest.mark.parametrize("half, change, expected", [
    ("vision_config", {"hidden_act": "relu"}, "vision_config: hidden_act 'relu': expected quick_gelu or gelu"),
    ("vision_config", {"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
    ("vision_config", {"patch_size": 33}, "patch_size 33 is more than image_size 32"),
    ("vision_config", {"num_channels": 4}, "num_channels = 4 is not supported"),
    ("text_config", {"hidden_size": 0}, "text_config: hidden_size 0: expected 1 or more"),
    (None, {"projection_dim": "512"}, "projection_dim '512': expected int"),
    (None, {"vision_config": [1]}, "vision_config: expected an object of settings"),
], ids=str)
def test_a_config_that_cannot_be_built_is_refused_by_name(folder, half, change, expected):
    edit_json(folder / "config.json", **({half: half_config(folder, half) | change} if half else change))
    assert expected in refusal(tinydb.load_clip, folder)


@pytest.mark.parametrize("change", [{"max_position_embeddings": 20}, {"vocab_size": 300}], ids=str)
def test_a_tokenizer_of_another_clip_is_refused(folder, change):
    edit_json(folder / "config.json", text_config=half_config(folder, "text_config") | change)
    assert "tokenizer and text encoder do not fit" in refusal(tinydb.load_clip, folder)


def with_processor(folder: Path) -> Path:
    """The folder as transformers' CLIPProcessor writes it: pictures' settings are in another file."""
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    transformers.CLIPProcessor(processor, reference_tokenizer("<|endoftext|>")).save_pretrained(folder)
    assert (folder / "processor_config.json").exists() and not (folder / "preprocessor_config.json").exists()
    return folder


def test_a_folder_that_a_processor_wrote_opens(small_clip, folder):
    ours, expected = tinydb.load_clip(with_processor(folder)), tinydb.load_clip(small_clip)
    assert torch.equal(ours.text(PROMPTS), expected.text(PROMPTS))
    assert torch.equal(ours.images(pictures()), expected.images(pictures()))


@pytest.mark.parametrize("size, crop_size", [(32, 32), ({"shortest_edge": 32}, {"height": 32, "width": 32})], ids=str)
def test_usual_preprocessing_is_written_in_two_ways(folder, size, crop_size):
    edit_json(folder / "preprocessor_config.json", size=size, crop_size=crop_size)
    assert tinydb.load_clip(folder).side == 32


@pytest.mark.parametrize("change", [
    {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [0.5, 0.5, 0.5]}, {"size": {"shortest_edge": 64}}, {"size": 64},
    {"do_center_crop": False}, {"crop_size": {"height": 32, "width": 64}}, {"resample": 2},
], ids=str)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_other_preprocessing_is_refused(folder, file, change):
    """By the name of the file and of the setting."""
    [(name, value)] = change.items()
    if file == "processor_config.json":
        inside = json.loads((with_processor(folder) / file).read_text())["image_processor"]
        change = {"image_processor": inside | change}
    edit_json(folder / file, **change)
    assert f"{file}: {name} {value} is not supported" in refusal(tinydb.load_clip, folder)


def test_more_prompts_than_at_once(small_clip):
    clip = tinydb.load_clip(small_clip)
    prompts = [f"{'the ' * i}dog" for i in range(17)]
    one_by_one = torch.cat([clip.text([prompt]) for prompt in prompts])
    torch.testing.assert_close(clip.text(prompts), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_older_folders_are_converted(folder, tmp_path, command, half):
    """Pickled, as OpenAI's own are, and in half precision on request."""
    reference = tinydb.load_clip(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, out, err = command("convert_weights.py", str(folder), str(tmp_path / "new"), *["--half"] * half)
    assert (code, err) == (0, "") and out.splitlines()[-1].endswith("new: written")
    assert next(iter(load_file(tmp_path / "new" / "model.safetensors").values())).dtype == (
        torch.float16 if half else torch.float32)
    similar = (tinydb.load_clip(tmp_path / "new").text(PROMPTS) * reference.text(PROMPTS)).sum(1)
    assert similar == pytest.approx(1, abs=1e-4 if half else 1e-6)


def test_a_clip_that_cannot_be_converted_is_refused(folder, tmp_path, command):
    code, _, err = command("convert_weights.py", str(folder), str(tmp_path / "clip.safetensors"))
    assert code == 2 and "a CLIP is a folder" in err
    edit_tensors(folder / "model.safetensors", lambda tensors: {
        **tensors, "visual_projection.weight": tensors["visual_projection.weight"] * float("nan")})
    code, _, err = command("convert_weights.py", str(folder), str(tmp_path / "new"))
    assert code == 2 and "visual_projection.weight of the clip holds NaN" in err and not (tmp_path / "new").exists()
    (folder / "model.safetensors").unlink()
    code, _, err = command("convert_weights.py", str(folder), str(tmp_path / "new"))
    assert code == 2 and "no weights of the clip; expected model.safetensors" in err


@pytest.mark.parametrize("processor", ["preprocessor_config.json", "processor_config.json"])
def test_what_is_fetched_of_a_clip_on_the_hub(processor):
    """Settings, tokenizer and one set of weights, whichever transformers wrote them."""
    small = ["added_tokens.json", "config.json", "merges.txt", processor, "special_tokens_map.json", "tokenizer.json",
             "tokenizer_config.json", "vocab.json"]
    present = [*small, "flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"]
    patterns = convert_weights.needed_files("openai/clip", present)
    assert sorted(name for name in present if any(fnmatch(name, pattern) for pattern in patterns)) == sorted(
        [*small, "pytorch_model.bin"])

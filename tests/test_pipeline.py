"""A model folder in, pictures out: the same as diffusers draws, reproducible, and saved as it was loaded."""

import json
import shutil
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Pair, difference, edit_json, edit_tensors, names, prefixed, refusal
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tinydb
from tinydb.attention import AttentionMaps
from tinydb.config import Recipe
from tinydb.cli import choose_device, choose_dtype

PROMPT = "a photo of ohwx dog"
pytestmark = pytest.mark.usefixtures("one_thread")  # on a busy machine, two wait for each other


def starting_noise(pair: Pair, seed: int = 0) -> Tensor:
    shape = (1, pair.config.unet.in_channels, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_images(pipeline: StableDiffusionPipeline, latents: Tensor, **settings) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, latents=latents, **settings).images


def assert_same(sd: tinydb.StableDiffusion, other: tinydb.StableDiffusion) -> None:
    """Equal tensors, configs, tokenizer and notes."""
    for part in ("text_encoder", "unet", "vae"):
        ours, theirs = getattr(sd, part), getattr(other, part)
        assert ours.config == theirs.config
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert sd.schedule.config == other.schedule.config
    assert (sd.tokenizer.vocab, sd.tokenizer.merges, sd.tokenizer.pad, sd.tokenizer.max_length) == (
        other.tokenizer.vocab, other.tokenizer.merges, other.tokenizer.pad, other.tokenizer.max_length)
    assert sd.info == other.info


def test_picture_is_the_one_that_diffusers_draws(pair):
    latents = starting_noise(pair)
    expected = reference_images(pair.reference, latents, num_inference_steps=20, guidance_scale=7.5)
    images = pair.sd.generate("a photo of [V] dog", steps=20, guidance_scale=7.5, latents=latents)  # ohwx by default
    assert np.asarray(expected[0]).std() > 20  # there is something to compare
    assert difference(images, expected) <= 2


def test_negative_prompt(pairs):
    pair, latents = pairs("sd1"), starting_noise(pairs("sd1"))
    expected = reference_images(pair.reference, latents, num_inference_steps=5, guidance_scale=3.0,
                                negative_prompt="the cat")
    options = {"steps": 5, "guidance_scale": 3.0, "latents": latents}
    assert difference(pair.sd.generate(PROMPT, negative="the cat", **options), expected) <= 2
    assert difference(pair.sd.generate(PROMPT, **options), expected) > 2


def test_dpm_draws_the_picture_that_diffusers_draws(pair):
    latents, theirs = starting_noise(pair), copy(pair.reference)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config, timestep_spacing="linspace")
    expected = reference_images(theirs, latents, num_inference_steps=8, guidance_scale=7.5)
    images = pair.sd.generate("a photo of [V] dog", steps=8, guidance_scale=7.5, latents=latents, sampler="dpm")
    assert difference(images, expected) <= 2


def test_guidance_stops_as_in_diffusers(pair):
    """Its documentation does it by a callback, which leaves the negative prompt out after the third step."""
    def stop(pipeline, step, timestep, tensors):
        if step == 2:
            pipeline._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    latents = starting_noise(pair)
    expected = reference_images(pair.reference, latents, num_inference_steps=8, guidance_scale=7.5,
                                callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    options = {"steps": 8, "guidance_scale": 7.5, "latents": latents}
    assert difference(pair.sd.generate(PROMPT, guidance_stop=0.4, **options), expected) <= 2
    assert difference(pair.sd.generate(PROMPT, **options), expected) > 2


@pytest.mark.parametrize("strength", [0.39, 1.0])
def test_drawing_over_a_picture_as_diffusers_does(pair, strength):
    """With strength 0.39 the last 3 of 10 steps."""
    theirs = StableDiffusionImg2ImgPipeline(**pair.reference.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    init = Image.radial_gradient("L").convert("RGB").resize((24, 16))
    options = {"guidance_scale": 4.0, "strength": strength}
    expected = theirs(PROMPT, image=init, num_inference_steps=10, generator=[torch.Generator().manual_seed(3)],
                      **options).images
    assert difference(pair.sd.generate(PROMPT, init=init, steps=10, seed=3, **options), expected) <= 2


@pytest.mark.parametrize("strength, steps", [(0.01, 1), (0.19, 1), (0.2, 2), (0.99, 9), (1.0, 10)])
def test_steps_over_a_picture(pairs, strength, steps):
    """Rounded down as in diffusers, but one at the least."""
    init = Image.radial_gradient("L").convert("RGB").resize((16, 16))
    ways = pairs("nano").sd.denoise(PROMPT, init=init, steps=10, strength=strength, guidance_scale=1.0)
    assert len(list(ways)) == steps


@pytest.mark.filterwarnings("ignore:The configuration file of the unet")  # diffusers says what it corrects
def test_side_in_folders_before_diffusers_0_9(pairs, tmp_path):
    """Was written as 32 where the model has 64; diffusers' pipeline corrects it as well."""
    folder = shutil.copytree(pairs("sd1").folder, tmp_path / "old")
    edit_json(folder / "unet" / "config.json", sample_size=32, _diffusers_version="0.4.0")
    sd, theirs = tinydb.load(folder), StableDiffusionPipeline.from_pretrained(folder)
    assert sd.resolution == theirs.unet.config.sample_size * theirs.vae_scale_factor
    edit_json(folder / "unet" / "config.json", sample_size=32, _diffusers_version="0.30.0")
    assert tinydb.load(folder).resolution * 2 == sd.resolution


def test_folder_of_the_image_to_image_pipeline(pairs, tmp_path):
    """It has the same parts."""
    StableDiffusionImg2ImgPipeline(**pairs("sd1").reference.components).save_pretrained(tmp_path / "other")
    assert tinydb.load(tmp_path / "other").unet.config == pairs("sd1").sd.unet.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_we_save_opens_in_diffusers(pairs, tmp_path, dtype):
    """As it stands, whatever the precision on disk, and draws the picture that we draw from it."""
    pairs("sd2").sd.save(tmp_path / "saved", dtype)
    pipeline, latents = StableDiffusionPipeline.from_pretrained(tmp_path / "saved"), starting_noise(pairs("sd2"))
    expected = reference_images(pipeline, latents, num_inference_steps=4, guidance_scale=7.5)
    images = tinydb.load(tmp_path / "saved").generate(PROMPT, steps=4, guidance_scale=7.5, latents=latents)
    assert difference(images, expected) <= 2


def test_save_and_load_round_trip(pair, tmp_path):
    info = replace(pair.sd.info, identifier="zwx", class_noun="dog", step=3,
                   base={"name": "x", "licence": "y"}, recipe=Recipe(steps=5, guidance=2.0))
    taught = replace(pair.sd, info=info)
    taught.save(tmp_path / "saved")
    assert_same(tinydb.load(tmp_path / "saved"), taught)
    assert names(tmp_path) == ["saved"]  # nothing temporary is left


def test_saving_over_the_folder_that_was_loaded(folder):
    """The weights are memory-mapped from the very files that are being replaced."""
    sd = tinydb.load(folder)
    (folder / "old").touch()
    sd.save(folder)
    assert_same(tinydb.load(folder), sd)
    assert not (folder / "old").exists()


def test_failed_save_leaves_the_old_folder(folder, monkeypatch):
    sd = tinydb.load(folder)
    monkeypatch.setattr(sd.tokenizer, "save", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sd.save(folder)
    assert_same(tinydb.load(folder), sd)
    assert names(folder.parent) == [folder.name]


def test_half_precision_folder_loads_as_float32(pairs, tmp_path):
    sd = pairs("sd2").sd
    sd.save(tmp_path / "half", torch.float16)
    stored = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    loaded = tinydb.load(tmp_path / "half")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for part in ("text_encoder", "unet", "vae"):
        expected = {name: tensor.half().float() for name, tensor in getattr(sd, part).state_dict().items()}
        torch.testing.assert_close(dict(getattr(loaded, part).state_dict()), expected, rtol=0, atol=0)


def test_what_we_write_is_the_form_that_everything_reads(pairs, tmp_path):
    """`text_model.` and `to_q` names, metadata, float32 text encoder, DDIM, vocab.json and merges.txt."""
    pairs("sd1").sd.save(tmp_path / "saved", torch.float16)
    text = load_file(tmp_path / "saved/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in text)
    assert b'"format":"pt"' in (tmp_path / "saved/vae/diffusion_pytorch_model.safetensors").read_bytes()[:500]
    assert json.loads((tmp_path / "saved/text_encoder/config.json").read_text())["dtype"] == "float32"
    scheduler = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    expected = {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False,
                "set_alpha_to_one": False}
    assert scheduler.items() >= expected.items()
    assert {"vocab.json", "merges.txt"} <= set(names(tmp_path / "saved/tokenizer"))


def test_same_seed_same_picture(pairs):
    """Bit for bit, and another seed is another picture."""
    first, again, other = (pairs("tiny").sd.generate(PROMPT, steps=3, seed=seed) for seed in (5, 5, 6))
    assert difference(first, again) == 0
    assert difference(first, other) > 20


def test_a_picture_of_a_batch_is_the_one_drawn_alone(pairs):
    """Picture i uses seed + i, whatever is drawn beside it."""
    prompts = [PROMPT, "the red cat", ""]
    batch = pairs("sd1").sd.generate(prompts, seed=5, steps=3)
    alone = [pairs("sd1").sd.generate(prompt, seed=5 + i, steps=3)[0] for i, prompt in enumerate(prompts)]
    assert difference(batch, alone) <= 1
    assert difference(batch[:1], batch[1:2]) > 20


def test_size_is_width_and_height(pairs):
    """Without a size, that of the latents, or else what the model was trained at."""
    sd = pairs("sd1").sd
    assert sd.generate(PROMPT, steps=1, size=(80, 48))[0].size == (80, 48)
    assert sd.generate(PROMPT, steps=1, latents=torch.zeros(1, 4, 5, 6))[0].size == (48, 40)
    assert sd.generate(PROMPT, steps=1)[0].size == (64, 64)


def test_recipe_decides_what_is_not_given(pairs):
    info = replace(pairs("tiny").sd.info, recipe=Recipe(sample_steps=2, guidance=3.0))
    sd = replace(pairs("tiny").sd, info=info)
    assert difference(sd.generate(PROMPT), sd.generate(PROMPT, steps=2, guidance_scale=3.0)) == 0
    assert difference(sd.generate(PROMPT), sd.generate(PROMPT, guidance_scale=0.0)) > 2


def test_denoise_yields_every_step(pairs):
    """The latents, and beside them the prediction, to which they come ever closer."""
    steps = list(pairs("tiny").sd.denoise(PROMPT, steps=4))
    distances = [(latents - clean).std().item() for latents, clean in steps]
    assert distances == sorted(distances, reverse=True) and distances[0] > 10 * distances[3] and len(steps) == 4
    last, _ = steps[3]
    assert difference(pairs("tiny").sd.decode(last), pairs("tiny").sd.generate(PROMPT, steps=4)) == 0


class Recorder(AttnProcessor):
    """diffusers' attention, which keeps the mean over heads of the probabilities that it works out."""

    def __init__(self):
        self.found = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **settings):
        if encoder_hidden_states is not None:
            query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            scores = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key))
            self.found.append(scores.unflatten(0, (-1, attn.heads)).mean(1))
        return super().__call__(attn, hidden_states, encoder_hidden_states, **settings)


@torch.inference_mode()
def test_attention_maps(pairs):
    """The mean of what diffusers' attention works out, of the conditional half; odd sizes are enlarged like others."""
    pair, recorder = pairs("sd1"), Recorder()
    latents, text_embeds = torch.randn(4, 4, 5, 6), pair.sd.encode_prompt(["", "the", PROMPT, "the red cat"])
    with AttentionMaps(pair.sd.unet, pictures=2) as maps:
        for t in (700, 300):
            pair.sd.unet(latents, torch.full((4,), t), text_embeds)
    processors = pair.reference.unet.attn_processors
    pair.reference.unet.set_attn_processor(recorder)
    for t in (700, 300):
        pair.reference.unet(latents, t, text_embeds)
    pair.reference.unet.set_attn_processor(processors)
    sizes = {30: (5, 6), 9: (3, 3), 4: (2, 2)}
    expected = torch.stack([torch.nn.functional.interpolate(
        found[2:].transpose(1, 2).unflatten(2, sizes[found.shape[1]]), (5, 6), mode="bilinear")
        for found in recorder.found]).mean(0)
    torch.testing.assert_close(maps.mean(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(maps.mean().sum(1), torch.ones(2, 5, 6))


def test_attention_is_watched_inside_the_with_only(pairs):
    """With guidance it is the prompt's; afterwards no hook is left, and the picture never changes."""
    sd, options = pairs("tiny").sd, {"steps": 1, "seed": 3}
    plain = sd.generate(PROMPT, guidance_scale=4.0, **options)
    found = []
    for scale in (1.0, 4.0):
        with AttentionMaps(sd.unet, pictures=1) as maps:
            sd.generate(PROMPT, guidance_scale=scale, negative="the cat", **options)
        found.append(maps.mean())
    torch.testing.assert_close(*found)
    calls = maps.calls
    assert difference(sd.generate(PROMPT, guidance_scale=4.0, **options), plain) == 0 and maps.calls == calls
    with AttentionMaps(sd.unet, pictures=1):
        assert difference(sd.generate(PROMPT, guidance_scale=4.0, **options), plain) == 0


def test_words_and_their_tokens(pairs):
    sd = replace(pairs("tiny").sd, info=replace(pairs("tiny").sd.info, identifier="zwx"))
    ids = sd.tokenizer.encode("the zwx, dog")[0].tolist()
    words = sd.words("the [V],  dog")
    assert [word for word, _ in words] == ["the", "[V],", "dog"]
    assert sum([ids[tokens] for _, tokens in words], []) == ids[1 : ids.index(sd.tokenizer.vocab["<|endoftext|>"])]
    assert len(sd.words("dog " * 80)) == 75


def test_more_pictures_than_are_decoded_at_once(pairs):
    latents = torch.randn(10, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    one_by_one = [pairs("tiny").sd.decode(latents[i : i + 1])[0] for i in range(10)]
    assert difference(pairs("tiny").sd.decode(latents), one_by_one) <= 1


@pytest.mark.parametrize("settings, words", [
    ({"steps": 0}, "--steps 0: expected 1 or more"), ({"steps": 1000}, "steps 1000: expected 1 to 999"),
    ({"size": (0, 64)}, "--size (0, 64): expected 1 or more"), ({"size": (60, 64)}, "size 60x64"),
    ({"size": (64,)}, "--size (64,): expected width and height"), ({"guidance_stop": 1.5}, "--guidance-stop 1.5"),
    ({"guidance_scale": float("nan")}, "--guidance nan"), ({"seed": -1}, "--seed -1"),
    ({"strength": 0.0}, "--strength 0.0: expected more than 0"),
    ({"sampler": "nonsense"}, "--sampler 'nonsense': expected ddim or dpm"),
    ({"latents": torch.zeros(2, 4, 8, 8)}, "latents of shape (2, 4, 8, 8) for 1 prompts; expected (1, 4, h, w)"),
    ({"latents": torch.zeros(1, 8, 8, 8)}, "latents of shape (1, 8, 8, 8) for 1 prompts"),
    ({"init": Image.new("RGB", (16, 16)), "latents": torch.zeros(1, 4, 8, 8)}, "init and latents: both say where"),
    ({"init": Image.new("RGB", (20, 16))}, "init of 20x16"), ({"steps": "many"}, "--steps 'many': expected int"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_drawn(pairs, settings, words):
    """A call from Python is checked as a command line is, and the message names the option."""
    assert words in refusal(pairs("sd1").sd.generate, "dog", **settings)
    assert "no prompt" in refusal(pairs("sd1").sd.generate, [])


def test_device_and_precision():
    assert choose_device("cpu") == torch.device("cpu")
    assert "--device cpu" in refusal(choose_device, "tpu9")
    cpu = torch.device("cpu")
    assert [choose_dtype(name, cpu) for name in ("auto", "fp32", "bf16", "fp16")] == [
        torch.float32, torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------ folders that others have written


POSITIONS = torch.arange(77)[None]
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names before diffusers 0.17."""
    for new, old in OLD_ATTENTION.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                   for name, tensor in tensors.items()}
    assert sum(".query." in name for name in tensors) == 4
    return tensors


@pytest.mark.parametrize("part, edit", [
    ("text_encoder", lambda tensors: {prefixed(name): tensor for name, tensor in tensors.items()}),
    ("text_encoder", lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()}),
    ("text_encoder", lambda tensors: {**tensors, "text_model.embeddings.position_ids": POSITIONS}),
    ("text_encoder", lambda tensors: {**tensors, "embeddings.position_ids": POSITIONS.float()}),
    ("vae", old_attention_names),
], ids=["text_model.", "without text_model.", "text_model. position_ids", "position_ids", "query key value"])
def test_folders_that_name_their_tensors_otherwise(folder, pairs, part, edit):
    file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
    edit_tensors(folder / part / file, edit)
    assert_same(tinydb.load(folder), pairs("sd1").sd)


def test_folder_with_the_older_tokenizer_files(folder, pairs):
    """What transformers 5 saved is tokenizer.json only; before it were vocab.json and merges.txt."""
    sd = pairs("sd1").sd
    assert not (folder / "tokenizer/vocab.json").exists()
    sd.tokenizer.save(folder / "tokenizer")
    (folder / "tokenizer/tokenizer.json").unlink()
    assert_same(tinydb.load(folder), sd)


def test_config_with_only_what_differs_from_the_defaults(folder, pairs):
    """As diffusers reads it: an entry that is not there has diffusers' default."""
    path = folder / "vae/config.json"
    entries = json.loads(path.read_text())
    defaults = {"scaling_factor", "act_fn", "in_channels", "use_quant_conv"}
    path.write_text(json.dumps({key: entries[key] for key in entries.keys() - defaults}))
    assert_same(tinydb.load(folder), pairs("sd1").sd)
    edit_json(path, scaling_factor=0.5)
    assert tinydb.load(folder).vae.config.scaling_factor == 0.5


def test_steps_and_guidance_are_fp32_in_any_precision(pairs):
    """The network alone is low; to amplify a difference of rounded numbers amplifies what was rounded."""
    sd = tinydb.load(pairs("sd1").folder, dtype=torch.bfloat16)
    seen = []
    sd.unet.register_forward_hook(lambda unet, inputs, output: seen.append((inputs[0], output)))
    [(latents, clean)] = sd.denoise("a dog", steps=1, guidance_scale=7.3, sampler="dpm")
    [(noisy, prediction)] = seen
    assert noisy.dtype == prediction.dtype == torch.bfloat16 and latents.dtype == torch.float32
    uncond, cond = prediction.float().chunk(2)
    start = sd.initial_latents([torch.Generator().manual_seed(0)], None)
    expected, _ = sd.schedule.clean_and_noise(uncond + 7.3 * (cond - uncond), start, torch.tensor([999]))
    torch.testing.assert_close(clean, expected, rtol=1e-5, atol=1e-5)

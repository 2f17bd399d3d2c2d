"""What cannot be used is refused in one line that names the thing and the cure."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, UNET, VAE, edit_json, edit_tensors, files, refusal
from torch import Tensor

import tinydb
from convert_weights import read_folder
from tinydb.config import InputError, ModelInfo, Recipe, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, write_json

SCHEDULER = "scheduler/scheduler_config.json"


def assert_refused(folder: Path, *words: str) -> None:
    """Loading raises InputError whose line holds all the words."""
    text = refusal(tinydb.load, folder)
    assert [word for word in words if word not in text] == [], text


def test_no_such_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: not a folder", "convert_weights.py")


def test_a_file_is_no_folder(folder):
    assert_refused(folder / "model_index.json", "model_index.json: not a folder")


def test_folder_that_is_not_a_model(tmp_path):
    assert_refused(tmp_path, "model_index.json: no such file", "convert_weights.py")


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  SCHEDULER, UNET, "text_encoder/model.safetensors"])
def test_missing_file(folder, part):
    (folder / part).unlink()
    assert_refused(folder, f"{part}: no such file", "convert_weights.py")


@pytest.mark.parametrize("file, changes, words", [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, ["XLPipeline", "1.x and 2.x"]),
    ("unet/config.json", {"addition_embed_type": "text_time"}, ["unet/config.json", "SDXL", "1.x and 2.x"]),
    ("unet/config.json", {"in_channels": 9}, ["in_channels 9", "inpainting", "text-to-image model"]),
    ("unet/config.json", {"act_fn": "mish"}, ["unet/config.json", "act_fn = 'mish'", "'silu'"]),
    ("unet/config.json", {"encoder_hid_dim": 768}, ["unet/config.json", "encoder_hid_dim = 768"]),
    ("unet/config.json", {"time_cond_proj_dim": 256}, ["unet/config.json", "time_cond_proj_dim = 256"]),
    ("unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type = 'timestep'", "1.x or 2.x"]),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]},
     ["down_block_types", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
    ("unet/config.json", {"attention_head_dim": [4, 4]}, ["head counts are 3, 3, 3, 2"]),
    ("unet/config.json", {"attention_head_dim": 5}, ["32 channels", "5 heads"]),
    ("unet/config.json", {"cross_attention_dim": 48}, ["22 tensors do not fit", "(32, 48)"]),
    ("vae/config.json", {"act_fn": "gelu"}, ["vae/config.json", "act_fn = 'gelu'", "'silu'"]),
    ("vae/config.json", {"latent_channels": 16}, ["vae", "16"]),
    ("vae/config.json", {"shift_factor": 0.1}, ["vae/config.json", "shift_factor = 0.1"]),
    ("text_encoder/config.json", {"hidden_act": "relu"}, ["hidden_act 'relu'", "quick_gelu or gelu"]),
    ("text_encoder/config.json", {"hidden_size": 48}, ["text_encoder", "(48,)"]),
    ("text_encoder/config.json", {"use_attention_mask": True}, ["text_encoder/config.json", "use_attention_mask"]),
    (SCHEDULER, {"prediction_type": "sample"}, ["prediction_type 'sample'", "epsilon"]),
    (SCHEDULER, {"beta_schedule": "squaredcos_cap_v2"}, ["squaredcos_cap_v2", "linear"]),
    (SCHEDULER, {"trained_betas": [0.1]}, ["scheduler_config.json", "trained_betas"]),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["scheduler_config.json", "FlowMatchEuler"]),
    (SCHEDULER, {"_class_name": "EDMDPMSolverMultistepScheduler"}, ["EDMDPMSolver", "DDPM"]),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "False"]),
    (SCHEDULER, {"timestep_type": "continuous"}, ["scheduler_config.json", "timestep_type", "'discrete'"]),
], ids=str)
def test_unsupported_setting(folder, file, changes, words):
    edit_json(folder / file, **changes)
    assert_refused(folder, *words)


@pytest.mark.parametrize("file, changes", [
    ("unet/config.json", {"block_out_channels": 64}), ("unet/config.json", {"attention_head_dim": 0}),
    ("unet/config.json", {"layers_per_block": True}), ("unet/config.json", {"norm_num_groups": "many"}),
    ("unet/config.json", {"layers_per_block": [1, 2, 2]}),
    ("vae/config.json", {"norm_num_groups": 3}), ("text_encoder/config.json", {"num_hidden_layers": "two"}),
    (SCHEDULER, {"beta_start": "small"}), ("tinydb.json", {"recipe": [3]}), ("tinydb.json", {"recipe": {"steps": "3"}}),
    ("tinydb.json", {"identifier": 3}), ("tinydb.json", {"base": "SD"}), ("unet/config.json", {"sample_size": -8}),
    ("unet/config.json", {"layers_per_block": 10**6}), ("vae/config.json", {"scaling_factor": float("nan")}),
    ("text_encoder/config.json", {"vocab_size": 10**12}), (SCHEDULER, {"num_train_timesteps": 10**12}),
], ids=str)
def test_senseless_setting(folder, file, changes):
    (folder / "tinydb.json").write_text("{}")
    edit_json(folder / file, **changes)
    assert_refused(folder, file)


@pytest.mark.parametrize("value", ["x", "", -1, 0, 10**30, 0.5, float("nan"), float("inf"), True, [], [1], {}, {"x": 1},
                                   ["x"], [[]], [None], 10**400], ids=repr)
def test_whatever_an_entry_holds_it_is_taken_or_refused(tmp_path, value):
    """By InputError; no other exception gets as far as the user."""
    for config_class in (TextConfig, UNetConfig, VAEConfig, ScheduleConfig):
        for name in config_class().to_dict():
            try:
                config_class.from_dict({**config_class().to_dict(), name: value}, "config.json")
            except InputError as error:
                assert str(error).startswith("config.json: "), error
    for entries in [{name: value} for name in ModelInfo().to_dict()] + [
            {"recipe": {name: value}} for name in ModelInfo().to_dict()["recipe"]]:
        write_json(tmp_path / "tinydb.json", entries)
        try:
            ModelInfo.read(tmp_path / "tinydb.json")
        except InputError as error:
            assert str(error).startswith(str(tmp_path / "tinydb.json")), error


@pytest.mark.parametrize("value", [[1] * 10**5, ["DownBlock2D"] * 10**5, "x" * 10**6], ids=["ints", "names", "text"])
def test_long_values_are_refused_at_once_in_a_short_message(value):
    for config_class in (TextConfig, UNetConfig, VAEConfig):
        refused = []
        for name in config_class().to_dict():
            try:
                config_class.from_dict({name: value}, "config.json")
            except InputError as error:
                refused.append(str(error))
        assert len(refused) > 5 and all(len(message) < 500 for message in refused)


@pytest.mark.parametrize("file", ["unet/config.json", "tinydb.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.write_bytes(b" " * (2**26 + 1)),
                                  lambda path: path.write_bytes(b"[" * 200_000)],
                         ids=["folder", "device", "large", "deep"])
def test_what_is_no_text_or_without_end_is_not_read(folder, file, make):
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    assert_refused(folder, file)


def test_notes_of_another_version(folder):
    """What an older one does not say has its default; what a newer one says besides is passed over."""
    (folder / "tinydb.json").write_text('{"class": "dog", "future": 1, "recipe": {"steps": 5, "stepz": 3}}')
    assert tinydb.load(folder).info == ModelInfo(class_noun="dog", recipe=Recipe(steps=5))


def test_every_tensor_that_does_not_fit_is_listed_at_once(folder):
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["conv_in.bias"], tensors["mid_block.resnets.0.norm1.weight"]
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :, :1]
        return {**tensors, "add_embedding.linear_1.bias": torch.zeros(7)}

    edit_tensors(folder / UNET, damage)
    assert_refused(folder, UNET, "4 tensors", "missing conv_in.bias (32,)",
                   "missing mid_block.resnets.0.norm1.weight (64,)",
                   "unexpected add_embedding.linear_1.bias (7,)",
                   "conv_out.weight is (4, 32, 1, 3)", "(4, 32, 3, 3)")


def test_a_long_list_of_tensors_is_cut(folder):
    edit_tensors(folder / UNET, lambda tensors: {f"{name}.{'x' * 100}": tensor for name, tensor in tensors.items()})
    text = refusal(tinydb.load, folder)
    assert re.search(r" \d+ tensors do not fit .+ and \d+ more", text) and len(text) < 3000


@pytest.mark.parametrize("inside", [["snapshots/1a2b"], ["a", "b"]], ids=str)
@pytest.mark.parametrize("read", [tinydb.load, read_folder])
def test_the_folder_around_a_model(folder, tmp_path, inside, read):
    """Which of them is meant? That of a finished run, where there is one."""
    for name in inside:
        shutil.copytree(folder, tmp_path / "run" / name)
    text = refusal(read, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "run" / "model")
    read(tmp_path / "run")
    assert [name for name in inside if f"run/{name}" not in text] == [] and text.endswith("give that")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:keep])
    assert_refused(folder, UNET, "not a whole safetensors file", "again")


def test_git_lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
    (folder / UNET).write_text(pointer)
    assert_refused(folder, UNET, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("content", [b"", b'{"in_channels": 4', b"\xff\xfe\x00", b"[1, 2]",
                                     b'{"a":' + 200_000 * b"[" + 200_000 * b"]" + b"}",
                                     b"{" + 101_000_000 * b" " + b"}"],
                         ids=["empty", "truncated", "binary", "a list", "nested", "huge"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_damaged_json(folder, file, content):
    (folder / file).write_bytes(content)
    assert_refused(folder, file)


@pytest.mark.parametrize("file", ["model_index.json", "tinydb.json", "vae/config.json", UNET, "tokenizer/merges.txt"])
def test_pipe_in_place_of_a_file(folder, pairs, file):
    """It would be read forever."""
    pairs("sd1").sd.tokenizer.save(folder / "tokenizer")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    assert_refused(folder, file.split("/")[0], "not a file")


def test_tensor_under_two_names(folder, pairs):
    """Of which one would be taken, and nobody knows which."""
    name = "decoder.mid_block.attentions.0.{}.weight"
    for file, names in ((TEXT, ("text_model.final_layer_norm.bias", "final_layer_norm.bias")),
                        (VAE, (name.format("to_q"), name.format("query")))):
        def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {names[1]: next(tensors[n] for n in names if n in tensors) + 1, **tensors, names[0]: torch.ones(1)}

        shutil.copytree(pairs("sd1").folder, folder, dirs_exist_ok=True)
        edit_tensors(folder / file, add)
        assert_refused(folder, "a second tensor for", names[0])


def remove_merges(folder: Path) -> None:
    (folder / "merges.txt").unlink()


def damage_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nonetoken\n")


def strange_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nq q\n")


def binary_merges(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"\xff\xfe\x00")


def remove_end_token(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({t: i for t, i in vocab.items() if t != "<|endoftext|>"}))


def unknown_pad(folder: Path) -> None:
    edit_json(folder / "special_tokens_map.json", pad_token="[PAD]")


@pytest.mark.parametrize("damage, words", [
    (remove_merges, ["merges.txt"]), (damage_merges, ["merges"]), (strange_merges, ["merges"]),
    (binary_merges, ["merges"]), (remove_end_token, ["<|endoftext|>", "vocab.json"]),
    (unknown_pad, ["[PAD]"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_tokenizer(folder, pairs, damage, words):
    pairs("sd1").sd.tokenizer.save(folder / "tokenizer")
    damage(folder / "tokenizer")
    assert_refused(folder, "tokenizer", *words)


@pytest.mark.parametrize("changes", [
    {"model_max_length": "long"}, {"model_max_length": [77]}, {"model_max_length": -5}, {"model_max_length": 1e400},
    {"pad_token": 3}, {"pad_token": {"content": []}}, {"pad_token": ["!"]}, {"added_tokens_decoder": [1]},
    {"added_tokens_decoder": {"x": {"content": "a"}}}, {"added_tokens_decoder": {"-9": {"content": "a"}}},
    {"added_tokens_decoder": {"999999": {"content": "<cat>"}}}, {"added_tokens_decoder": {"9": {"content": {}}}},
], ids=str)
def test_senseless_tokenizer_settings(folder, changes):
    (folder / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", **changes)
    assert "tokenizer" in refusal(tinydb.load, folder)


@pytest.mark.parametrize("model", [
    None, [], {"vocab": [], "merges": []}, {"vocab": {"a": 1}}, {"vocab": 3, "merges": 3},
    {"vocab": {"a": "b"}, "merges": [["a"]]}, {"vocab": {"a": -1}, "merges": {"a": 1}},
], ids=str)
def test_senseless_tokenizer_model(folder, model):
    edit_json(folder / "tokenizer" / "tokenizer.json", model=model)
    assert "tokenizer" in refusal(tinydb.load, folder)


def test_tokenizer_without_files(folder):
    (folder / "tokenizer/tokenizer.json").unlink()
    assert_refused(folder, "tokenizer", "no such file")


def test_text_encoder_of_another_width(folder, pairs):
    other = pairs("sd2").folder / "text_encoder"
    for file in ("config.json", "model.safetensors"):
        (folder / "text_encoder" / file).write_bytes((other / file).read_bytes())
    assert_refused(folder, "48 wide", "attends to 32", "two models")


def test_tokenizer_of_a_larger_vocabulary(folder):
    def shrink(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[:500] if "token_emb" in name else tensor for name, tensor in tensors.items()}

    edit_tensors(folder / "text_encoder/model.safetensors", shrink)
    edit_json(folder / "text_encoder/config.json", vocab_size=500)
    assert_refused(folder, "tokenizer", "below 500", "two models")


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_other_files_are_not_saved_over(nano, small_clip, tmp_path, kind):
    """They stay; over a model of the kind, and into an empty folder, it is saved."""
    opened = tinydb.load(nano) if kind == "model" else tinydb.load_clip(small_clip)
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    (home / "diary.txt").write_text("today")
    assert f"{home}: a folder with other files, which would be lost" in refusal(opened.save, home)
    assert files(home) == {"diary.txt": b"today"}
    other.mkdir()
    opened.save(other)
    first = files(other)
    opened.save(other)
    assert files(other) == first and len(first) > 5


def test_a_folder_of_another_kind_is_not_saved_over(nano, small_clip, tmp_path):
    model, clip = tinydb.load(nano), tinydb.load_clip(small_clip)
    for first, second in ((model, clip), (clip, model)):
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        first.save(tmp_path / "folder")
        before = files(tmp_path / "folder")
        assert "which would be lost" in refusal(second.save, tmp_path / "folder")
        assert files(tmp_path / "folder") == before

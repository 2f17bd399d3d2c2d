"""Every conversion of convert_weights.py, on narrow models of each kind, and everything that it refuses."""

import functools
import json
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MERGES, Pair, edit_json, edit_tensors, vocabulary
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert_weights
import tinydb
from convert_weights import PARTS, SD1, SD2, Description, Settings, single_file_names
from tinydb.config import InputError
from tinydb.tokenizer import CLIPTokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
BUFFERS = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
           "logvar", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
           "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]


def convert(src: Path, dst: Path, **options) -> Path:
    """Run the command in this process."""
    convert_weights.main(Settings(str(src), str(dst), **options))
    return dst


def refusal(src: Path, dst: Path, **options) -> str:
    """The one line that a conversion ends with; it leaves nothing behind."""
    before = sorted(dst.parent.iterdir())
    with pytest.raises(InputError) as caught:
        convert(src, dst, **options)
    assert sorted(dst.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def part_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(folder / part / convert_weights.WEIGHT_FILES[part])


def assert_same(folder: Path, other: Path) -> None:
    """The same files with the same text and the same tensors, their precision included."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in files:
        if name.suffix == ".safetensors":
            tensors, others = load_file(folder / name), load_file(other / name)
            assert tensors.keys() == others.keys()
            assert all(tensors[key].dtype == others[key].dtype and tensors[key].equal(others[key]) for key in tensors)
        else:
            assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture
def ours(pair: Pair, tmp_path) -> Path:
    """The model folder that we make of what diffusers saved."""
    return convert(pair.folder, tmp_path / "ours")


@pytest.fixture(scope="module")
def sd1(pairs, tmp_path_factory) -> Path:
    return convert(pairs("sd1").folder, tmp_path_factory.mktemp("converted") / "sd1")


@pytest.fixture
def narrow(pairs, monkeypatch):
    """Takes the small models for the real ones, so that files of other programs can be small."""
    for name, kind in (("SD1", "sd1"), ("SD2", "sd2")):
        config, real = pairs(kind).config, getattr(convert_weights, name)
        unet = replace(config.unet, upcast_attention=False)  # what SD 2.1 at 768 pixels has is for the program to set
        monkeypatch.setattr(convert_weights, name, Description(config.text, unet, config.vae, real.schedule, real.info))


@pytest.fixture(scope="module")
def foreign(pairs, tmp_path_factory) -> Callable[[str], dict[str, Tensor]]:
    """foreign(kind): the tensors of a file that another program wrote, ours without what tells that it is ours."""
    @functools.cache
    def tensors(kind: str) -> dict[str, Tensor]:
        return load_file(convert(pairs(kind).folder, tmp_path_factory.mktemp("foreign") / f"{kind}.safetensors"))

    return lambda kind: dict(tensors(kind))


# ---- to and fro

@pytest.mark.parametrize("half", [False, True])
def test_round_trip(ours, tmp_path, half):
    folder = convert(ours, tmp_path / "half", half=True) if half else ours
    file = convert(folder, tmp_path / "model.safetensors")
    assert_same(folder, convert(file, tmp_path / "back"))


def test_round_trip_of_the_model_in_the_box(tmp_path):
    folder = convert(TINY, tmp_path / "folder")
    assert_same(folder, convert(convert(folder, tmp_path / "tiny.safetensors"), tmp_path / "back"))


def test_folder_keeps_what_it_says(ours, pair, tmp_path):
    """tinydb.json, schedule and tokenizer survive; the picture is that of the folder we started from."""
    edit_json(ours / "tinydb.json", **{"identifier": "zwx", "class": "dog", "base": {"name": "x", "license": "y"}})
    back = tinydb.load(convert(convert(ours, tmp_path / "x.safetensors"), tmp_path / "back"))
    assert back.info.identifier == "zwx" and back.info.class_noun == "dog" and back.info.base["license"] == "y"
    assert back.schedule.config == pair.sd.schedule.config
    assert back.tokenizer.encode("ohwx dog!").equal(pair.sd.tokenizer.encode("ohwx dog!"))
    images = [sd.generate("a red dog", steps=2, seed=3)[0] for sd in (back, pair.sd)]
    assert images[0].tobytes() == images[1].tobytes()


def assert_diffusers_takes_both_alike(model: Path, file: Path) -> None:
    """from_single_file, offline, gives the very tensors and picture of from_pretrained."""
    single = StableDiffusionPipeline.from_single_file(str(file), config=str(model), local_files_only=True)
    folder = StableDiffusionPipeline.from_pretrained(model)
    images = []
    for pipeline in (single, folder):
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline("a red dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                               output_type="np").images)
    for part in PARTS:
        states = [getattr(pipeline, part).state_dict() for pipeline in (single, folder)]
        assert states[0].keys() == states[1].keys()
        assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert np.array_equal(*images)


def test_diffusers_opens_the_single_file(ours, tmp_path):
    assert_diffusers_takes_both_alike(ours, convert(ours, tmp_path / "model.safetensors"))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_opens_what_was_trained(pairs, teach, tmp_path, kind):
    """A converted folder, taught by train.py with the SD recipe, as a folder and as a single file."""
    folder = convert(pairs(kind).folder, tmp_path / "converted")
    model = teach(tmp_path / "run", weights=str(folder), steps=1, prior_weight=0.0, save_every=0) / "model"
    before, after = (part_tensors(path, "unet") for path in (folder, model))
    assert not all(before[name].equal(after[name]) for name in before)
    assert_diffusers_takes_both_alike(model, convert(model, tmp_path / "trained.safetensors"))


@pytest.mark.parametrize("kind, counts", [(SD1, (196, 686, 248)), (SD2, (280, 686, 248))], ids=["sd1.5", "sd2"])
def test_names_of_the_real_models(kind, counts):
    """LDM's names, all different, of all our tensors; those of user_needs.md E1 and E3 by hand."""
    with torch.device("meta"):
        names = [single_file_names(part, PARTS[part][0](getattr(kind, part))) for part in PARTS]
    assert tuple(len(part) for part in names) == counts
    assert [sum(len(ours) for ours in part.values()) for part in names] == [counts[0] if kind is SD1 else 372, 686, 248]
    flat = {name: ours[0] for part in names for name, ours in part.items()}
    expected = {
        UNET + "time_embed.2.weight": "time_embedding.linear_2.weight",
        UNET + "input_blocks.0.0.weight": "conv_in.weight",
        UNET + "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        UNET + "input_blocks.8.1.proj_in.weight": "down_blocks.2.attentions.1.proj_in.weight",
        UNET + "input_blocks.9.0.op.weight": "down_blocks.2.downsamplers.0.conv.weight",
        UNET + "middle_block.2.emb_layers.1.bias": "mid_block.resnets.1.time_emb_proj.bias",
        UNET + "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        UNET + "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias":
            "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
        UNET + "out.0.weight": "conv_norm_out.weight",
        VAE + "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
        VAE + "encoder.mid.block_2.norm1.bias": "encoder.mid_block.resnets.1.norm1.bias",
        VAE + "decoder.up.3.block.2.conv1.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
        VAE + "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        VAE + "decoder.up.0.block.0.nin_shortcut.weight": "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
        VAE + "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        VAE + "decoder.norm_out.bias": "decoder.conv_norm_out.bias",
        VAE + "post_quant_conv.weight": "post_quant_conv.weight",
    }
    if kind is SD1:
        expected[CLIP + "encoder.layers.11.mlp.fc2.bias"] = "text_model.encoder.layers.11.mlp.fc2.bias"
    else:
        resblock = "cond_stage_model.model.transformer.resblocks.22."
        layer = "text_model.encoder.layers.22."
        expected |= {resblock + "attn.in_proj_bias": layer + "self_attn.q_proj.bias",
                     resblock + "mlp.c_fc.weight": layer + "mlp.fc1.weight",
                     resblock + "ln_2.bias": layer + "layer_norm2.bias",
                     "cond_stage_model.model.positional_embedding": "text_model.embeddings.position_embedding.weight",
                     "cond_stage_model.model.ln_final.weight": "text_model.final_layer_norm.weight"}
    assert {name: flat.get(name) for name in expected} == expected


def test_single_file_for_other_programs(ours, tmp_path):
    """Shapes and metadata as A1111 and ComfyUI want them, in a file that other users may read as well."""
    file = convert(ours, tmp_path / "model.safetensors")
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    tensors = load_file(file)
    assert tensors[VAE + "encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)
    assert not any("position_ids" in name for name in tensors)


def test_half(sd1, tmp_path):
    folder, file = convert(sd1, tmp_path / "half", half=True), convert(sd1, tmp_path / "half.safetensors", half=True)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    for part in PARTS:
        full, half = part_tensors(sd1, part), part_tensors(folder, part)
        assert all(half[name].equal(full[name].half()) for name in full)
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert StableDiffusionPipeline.from_pretrained(folder).text_encoder.dtype == torch.float32


def test_half_needs_half_of_the_disk(sd1, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(convert_weights, "check_free_disk", lambda path, size, cure: needed.append(size))
    for half in (False, True):
        convert(sd1, tmp_path / f"half-{half}", half=half)
    assert needed[1] == needed[0] / 2


# ---- what other programs wrote

@pytest.mark.parametrize("position_ids", [torch.arange(77)[None], torch.arange(77.0)[None]])
def test_foreign_sd1(foreign, narrow, sd1, tmp_path, capsys, position_ids):
    """EMA, schedule buffers, position_ids and what the first DreamBooth code left are dropped, nothing else. What is
    dropped may be broken."""
    extra = {name: torch.rand(1000) for name in BUFFERS}
    extra |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
              "model_ema.diffusion_modeltime_embed0weight": torch.full((3,), torch.nan),
              "embedding_manager.string_to_param_dict.*": torch.rand(1, 768),
              "embedding_manager.initial_embeddings.sks": torch.rand(1, 768),
              CLIP + "embeddings.position_ids": position_ids}
    save_file({**foreign("sd1"), **extra}, tmp_path / "other.safetensors")
    folder = convert(tmp_path / "other.safetensors", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    assert "19 more are no weights" in capsys.readouterr().out
    info = json.loads((folder / "tinydb.json").read_text())
    assert info["base"] == {"name": "Stable Diffusion 1.x", "license": "CreativeML Open RAIL-M"}
    (folder / "tinydb.json").write_bytes((sd1 / "tinydb.json").read_bytes())
    assert_same(sd1, folder)


def test_foreign_without_text_model(foreign, narrow, sd1, tmp_path):
    tensors = {name.replace("text_model.", ""): tensor for name, tensor in foreign("sd1").items()}
    torch.save(tensors, tmp_path / "other.ckpt")
    folder = convert(tmp_path / "other.ckpt", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    assert part_tensors(folder, "text_encoder").keys() == part_tensors(sd1, "text_encoder").keys()


@pytest.mark.parametrize("spread, says, asked, expected", [
    (0.2, None, None, "v_prediction"), (0.05, None, None, "epsilon"),
    (0.05, "v", None, "v_prediction"), (0.2, "epsilon", None, "epsilon"), (0.2, "who knows", None, "v_prediction"),
    (0.05, None, "v_prediction", "v_prediction"), (0.2, "v", "epsilon", "epsilon")])
def test_foreign_sd2(foreign, pairs, narrow, tmp_path, capsys, spread, says, asked, expected):
    """The last OpenCLIP layer is dropped, "!" pads, and the prediction type is as asked, as the file says, or guessed
    aloud."""
    blocks = "cond_stage_model.model."
    bias = torch.linspace(-1, 1, 32)
    extra = {blocks + "transformer.resblocks.23.ln_1.weight": torch.rand(3), blocks + "logit_scale": torch.tensor(4.6),
             blocks + "text_projection": torch.rand(2, 2),
             UNET + "output_blocks.8.1.transformer_blocks.0.norm1.bias": spread * bias / bias.std(correction=0)}
    save_file({**foreign("sd2"), **extra}, tmp_path / "other.safetensors",
              {"modelspec.prediction_type": says} if says else None)
    sd = tinydb.load(convert(tmp_path / "other.safetensors", tmp_path / "back", prediction=asked,
                             tokenizer=str(pairs("sd1").folder / "tokenizer")))
    assert sd.schedule.config.prediction_type == expected
    of_768 = expected == "v_prediction"
    assert sd.unet.config.upcast_attention == of_768 and (sd.vae.config.sample_size == 768) == of_768
    assert sd.unet.config.sample_size == (96 if of_768 else 8)
    assert sd.tokenizer.encode("dog")[0, -1] == 0
    for ours, reference in ((sd.text_encoder, pairs("sd2").sd.text_encoder), (sd.vae, pairs("sd2").sd.vae)):
        assert all(tensor.equal(reference.state_dict()[name]) for name, tensor in ours.state_dict().items())
    said = capsys.readouterr().out
    assert ("standard deviation" in said) == (asked is None and says in (None, "who knows")) and expected in said


@pytest.mark.parametrize("marks, metadata, expected", [
    ([], {"modelspec.prediction_type": "v"}, "v_prediction"), ([], {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ([], None, "epsilon"), (["v_pred"], None, "v_prediction"), ([], {"modelspec.predict_key": "v"}, "v_prediction"),
    (["v_pred"], {"modelspec.predict_key": "epsilon"}, "v_prediction"),
], ids=str)
def test_prediction_of_sd1(foreign, narrow, sd1, tmp_path, marks, metadata, expected):
    """Fine-tunes of SD 1.x for v_prediction exist; their files say so, ComfyUI's by an empty tensor, and their weights
    do not show it."""
    save_file({**foreign("sd1"), **{mark: torch.tensor([]) for mark in marks}}, tmp_path / "v.safetensors", metadata)
    folder = convert(tmp_path / "v.safetensors", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    assert tinydb.load(folder).schedule.config.prediction_type == expected


@pytest.mark.parametrize("text, expected", [('parameterization: "v"', "v_prediction"), ("target: ldm.x", "epsilon")])
def test_prediction_that_a_yaml_beside_the_file_says(foreign, narrow, sd1, tmp_path, text, expected):
    """As A1111 wants it."""
    save_file(foreign("sd1"), tmp_path / "v.safetensors")
    (tmp_path / "v.yaml").write_text(f"model:\n  params:\n    {text}\n    linear_start: 0.00085\n")
    folder = convert(tmp_path / "v.safetensors", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    assert tinydb.load(folder).schedule.config.prediction_type == expected


def test_a_given_prediction_overrides_the_mark(foreign, narrow, sd1, tmp_path):
    save_file({**foreign("sd1"), "v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    folder = convert(tmp_path / "v.safetensors", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"),
                     prediction="epsilon")
    assert tinydb.load(folder).schedule.config.prediction_type == "epsilon"


def test_another_noise_schedule_is_refused(foreign, narrow, sd1, tmp_path):
    """ComfyUI's mark of it, an empty tensor."""
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**foreign("sd1"), **marks}, tmp_path / "v.safetensors")
    line = refusal(tmp_path / "v.safetensors", tmp_path / "out", tokenizer=str(sd1 / "tokenizer"))
    assert "zero terminal SNR" in line


def test_prediction_of_a_folder(sd1, tmp_path):
    folder = convert(sd1, tmp_path / "v", prediction="v_prediction")
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_tokenizer_of_a_single_file(foreign, narrow, sd1, tmp_path, monkeypatch):
    """From --tokenizer, else from the hub, else a line that says what to do."""
    save_file(foreign("sd1"), tmp_path / "other.safetensors")
    monkeypatch.setattr(convert_weights, "download", lambda repo, files: sd1 / "tokenizer")
    hub = convert(tmp_path / "other.safetensors", tmp_path / "hub")
    assert (hub / "tokenizer" / "vocab.json").read_bytes() == (sd1 / "tokenizer" / "vocab.json").read_bytes()

    def unreachable(repo, files):
        raise InputError(f"{repo}: no hub")

    monkeypatch.setattr(convert_weights, "download", unreachable)
    assert "no hub; pass --tokenizer" in refusal(tmp_path / "other.safetensors", tmp_path / "none")
    nothing = str(tmp_path / "nothing")
    assert nothing in refusal(tmp_path / "other.safetensors", tmp_path / "none", tokenizer=nothing)


@pytest.mark.parametrize("kind, pad", [("sd1", "<|endoftext|>"), ("sd2", "!")])
def test_tokenizer_that_is_given_keeps_what_it_says(foreign, narrow, tmp_path, kind, pad):
    """Its length and its added tokens; the padding is that of the text encoder."""
    number = vocabulary()["ph"]
    given = CLIPTokenizer(vocabulary(), MERGES, max_length=60, added={number: {"content": "ph", "single_word": True}})
    given.save(tmp_path / "tokenizer")
    save_file(foreign(kind), tmp_path / "other.safetensors")
    convert(tmp_path / "other.safetensors", tmp_path / "back", tokenizer=str(tmp_path / "tokenizer"))
    ours = tinydb.load(tmp_path / "back").tokenizer
    assert (ours.pad, ours.added, ours.vocab) == (pad, CLIPTokenizer.read(tmp_path / "tokenizer").added, given.vocab)
    assert ours.encode("a ph of the dog").shape == (1, 60) and number in ours.encode("a ph of the dog")


def lightning_checkpoint(path: Path, tensors: dict[str, Tensor], monkeypatch, old_numpy: bool) -> None:
    """What PyTorch-Lightning wrote around the weights of SD 1.x: callbacks keyed by class, NumPy scalars."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    with monkeypatch.context() as patch:
        for package in (name.split(".")[0], name.rsplit(".", 1)[0], name):
            module = types.ModuleType(package)
            patch.setitem(sys.modules, package, module)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
        torch.save({"epoch": 3, "global_step": np.int64(470000), "state_dict": {"state_dict": tensors},
                    "callbacks": {module.ModelCheckpoint: {"best": np.float32(0.1), "seen": np.arange(3)}}}, path)
    if old_numpy:  # the module's name before NumPy 2
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: archive.read(record) for record in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for record, content in records.items():
                archive.writestr(record, content.replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.mark.parametrize("old_numpy", [False, True])
def test_lightning_checkpoint(foreign, narrow, sd1, tmp_path, monkeypatch, old_numpy):
    lightning_checkpoint(tmp_path / "model.ckpt", foreign("sd1"), monkeypatch, old_numpy)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.ckpt")
    assert any("ModelCheckpoint" in name for name in names)
    assert any(name.startswith("numpy.core" if old_numpy else "numpy._core") for name in names)
    folder = convert(tmp_path / "model.ckpt", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    for part in PARTS:
        expected = part_tensors(sd1, part)
        assert all(tensor.equal(expected[name]) for name, tensor in part_tensors(folder, part).items())


def test_checkpoint_in_the_old_file_format(foreign, narrow, sd1, tmp_path):
    torch.save(foreign("sd1"), tmp_path / "model.ckpt", _use_new_zipfile_serialization=False)
    tinydb.load(convert(tmp_path / "model.ckpt", tmp_path / "back", tokenizer=str(sd1 / "tokenizer")))


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_hostile_checkpoint_is_never_run(sd1, tmp_path, form):
    file, content = tmp_path / "evil.ckpt", {"state_dict": {"a": torch.ones(2)}, "evil": Hostile(tmp_path / "trace")}
    if form == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    line = refusal(file, tmp_path / "out")
    assert "refused" in line and "open" in line or form == "bare"
    folder = convert(sd1, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(file.read_bytes())
    refusal(folder, tmp_path / "out")
    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(Hostile(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()  # it would have worked


@pytest.mark.parametrize("key", ["state_dict", "model", "sparse", "meta"])
def test_odd_checkpoints(tmp_path, key):
    """A dictionary that contains itself, under any name, ends in one line; tensors without numbers are none."""
    content = {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta")}
    content = {key: content[key]} if key in content else content
    content.setdefault(key, content)
    torch.save(content, tmp_path / "odd.ckpt")
    assert "it holds nothing" in refusal(tmp_path / "odd.ckpt", tmp_path / "out")


# ---- diffusers folders of other days

def to_bin(folder: Path) -> None:
    for part, name in (("text_encoder", "pytorch_model.bin"), ("unet", "diffusion_pytorch_model.bin"),
                       ("vae", "diffusion_pytorch_model.bin")):
        torch.save(part_tensors(folder, part), folder / part / name)
        (folder / part / convert_weights.WEIGHT_FILES[part]).unlink()


def to_variant(folder: Path) -> None:
    for part, name in convert_weights.WEIGHT_FILES.items():
        variant = "bf16" if part == "vae" else "fp16"
        (folder / part / name).rename(folder / part / name.replace(".safetensors", f".{variant}.safetensors"))


def to_shards(folder: Path) -> None:
    tensors = part_tensors(folder, "unet")
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def to_old_names(folder: Path) -> None:
    def old_vae(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
        return tensors

    def bare_text(tensors):
        bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        return {**bare, "embeddings.position_ids": torch.arange(77)[None]}

    edit_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", old_vae)
    edit_tensors(folder / "text_encoder" / "model.safetensors", bare_text)


def to_both_precisions(folder: Path) -> None:
    """The half precision ones are damaged: they must not be read."""
    for part, name in convert_weights.WEIGHT_FILES.items():
        (folder / part / name.replace(".safetensors", ".fp16.safetensors")).write_bytes(b"")


@pytest.mark.parametrize("age", [to_bin, to_variant, to_shards, to_old_names, to_both_precisions])
def test_folders_of_any_age(sd1, folder, tmp_path, age):
    """`folder` has tokenizer.json only where transformers 5 wrote it; the rest is made older."""
    folder = convert(folder, tmp_path / "aged")
    age(folder)
    assert_same(sd1, convert(folder, tmp_path / "back"))


def test_tokenizer_json_alone(pair, ours):
    assert not (pair.folder / "tokenizer" / "vocab.json").exists()
    assert (ours / "tokenizer" / "vocab.json").exists() and (ours / "tokenizer" / "merges.txt").exists()


# ---- what is refused

@pytest.mark.parametrize("names, reason", [
    (["conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x", UNET + "label_emb.0.0.weight"],
     "an SDXL"),
    (["conditioner.embedders.0.model.x"], "an SDXL"),
    ([UNET + "label_emb.0.0.weight"], "unCLIP"),
    (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3 or Flux"),
    (["double_blocks.0.img_attn.qkv.weight"], "Stable Diffusion 3 or Flux"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"], "a LoRA"),
    (["base_model.model.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.attn1.to_q.lora.down.weight"], "a LoRA"),
    (["unet.mid_block.attn1.processor.to_q_lora.down.weight"], "a LoRA"),
    (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
    (["emb_params"], "a textual inversion"),
    (["<cat-toy>"], "a textual inversion"),
    (["model_ema.decay", "model_ema.diffusion_modeltime_embed0weight", VAE + "quant_conv.bias"], "weights (EMA)"),
    ([UNET + "time_embed.0.weight", CLIP + "final_layer_norm.bias"], "no VAE inside"),
    ([UNET + "time_embed.0.weight", VAE + "quant_conv.bias"], "no text_encoder inside"),
    (["down_blocks.0.resnets.0.conv1.weight"], "the whole folder"),
    (["encoder.conv_in.weight"], "the whole folder"),
])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, names, reason):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    line = refusal(tmp_path / "other.safetensors", tmp_path / "out")
    assert reason in line, line


@pytest.mark.parametrize("vectors", [nn.ParameterDict({"*": torch.zeros(2, 768)}), {"*": torch.zeros(2, 768)}])
def test_textual_inversion_of_the_original_code(tmp_path, vectors):
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": vectors}, tmp_path / "cat.pt")
    assert "a textual inversion" in refusal(tmp_path / "cat.pt", tmp_path / "out")


@pytest.mark.parametrize("channels, width, reason", [
    (9, 768, "inpainting"), (8, 768, "instruction"), (5, 1024, "depth"), (4, 2048, "attends to 2048")])
def test_other_shapes_are_refused(tmp_path, channels, width, reason):
    save_file({UNET + "input_blocks.0.0.weight": torch.zeros(2, channels, 3, 3),
               UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
               VAE + "quant_conv.bias": torch.zeros(8), CLIP + "final_layer_norm.bias": torch.zeros(width)},
              tmp_path / "other.safetensors")
    assert reason in refusal(tmp_path / "other.safetensors", tmp_path / "out")


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline", "ControlNetModel"])
def test_other_folders_are_refused(folder, tmp_path, kind):
    edit_json(folder / "model_index.json", _class_name=kind)
    if kind == "ControlNetModel":
        (folder / "model_index.json").rename(folder / "config.json")
    assert f"a {kind}" in refusal(folder, tmp_path / "out")


def test_folder_that_is_no_model(tmp_path):
    (tmp_path / "lora").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert "without model_index.json" in refusal(tmp_path / "lora", tmp_path / "out")
    (tmp_path / "lora" / "config.json").write_text('{"model_type": "llama"}')
    assert "a model of another library" in refusal(tmp_path / "lora", tmp_path / "out")


@pytest.mark.parametrize("change, reason", [
    ({UNET + "surprise.weight": torch.ones(1)}, f"unexpected {UNET}surprise.weight"),
    ({VAE + "quant_conv.bias": None}, f"missing {VAE}quant_conv.bias"),
    ({VAE + "quant_conv.bias": torch.ones(3)}, f"{VAE}quant_conv.bias is (3,), not (8,)"),
    ({CLIP.replace("text_model.", "") + "final_layer_norm.bias": torch.ones(32)}, "a second tensor for"),
    ({VAE + "encoder.mid.attn_1.q.weight": torch.ones(())}, f"{VAE}encoder.mid.attn_1.q.weight is ()"),
    ({VAE + "encoder.mid.attn_1.q.weight": torch.ones(16, 16, 0, 1)}, f"{VAE}encoder.mid.attn_1.q.weight is"),
    ({UNET + "input_blocks.0.0.weight": torch.ones(())}, "takes 0 channels"),
    ({UNET + "time_embed.0.bias": torch.ones(128, dtype=torch.int8)}, f"{UNET}time_embed.0.bias holds torch.int8"),
    ({UNET + "time_embed.0.bias": torch.ones(128, dtype=torch.complex64)}, f"{UNET}time_embed.0.bias holds torch.c"),
], ids=range(9))
def test_every_tensor_is_accounted_for(foreign, narrow, sd1, tmp_path, change, reason):
    """By name and shape, and it holds numbers that a network can use."""
    tensors = {name: tensor for name, tensor in {**foreign("sd1"), **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    line = refusal(tmp_path / "other.safetensors", tmp_path / "out", tokenizer=str(sd1 / "tokenizer"))
    assert reason in line, line


@pytest.mark.parametrize("tensor", [torch.ones(()), torch.ones(1).expand(10**5, 10**5)], ids=["0-d", "expanded"])
@pytest.mark.parametrize("name", ["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
                                  UNET + "output_blocks.8.1.transformer_blocks.0.norm1.bias"])
def test_odd_shapes_in_a_pickle(foreign, narrow, tmp_path, name, tensor):
    torch.save({**foreign("sd2"), name: tensor}, tmp_path / "other.ckpt")
    assert f"{name} is {tuple(tensor.shape)}" in refusal(tmp_path / "other.ckpt", tmp_path / "out")


def test_expanded_tensor(foreign, narrow, sd1, tmp_path):
    """One number in the file that stands for all of a tensor is a tensor as any other."""
    name = VAE + "quant_conv.bias"
    torch.save({**foreign("sd1"), name: torch.tensor([0.5]).expand(8)}, tmp_path / "other.ckpt")
    folder = convert(tmp_path / "other.ckpt", tmp_path / "back", tokenizer=str(sd1 / "tokenizer"))
    assert part_tensors(folder, "vae")["quant_conv.bias"].tolist() == [0.5] * 8


@pytest.mark.parametrize("value, half", [(torch.nan, False), (torch.inf, False), (70000.0, True)])
def test_weights_that_are_not_finite(foreign, folder, narrow, sd1, tmp_path, value, half):
    """Named in folders and in single files; with --half also what is too large for it."""
    def edit(tensors):
        tensors["quant_conv.bias"][3] = value
        return tensors

    edit_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", edit)
    line = refusal(folder, tmp_path / "out", half=half)
    assert "quant_conv.bias of the vae holds NaN or infinity" in line, line
    bias = foreign("sd1")[UNET + "time_embed.0.bias"].clone()
    bias[5] = value
    save_file({**foreign("sd1"), UNET + "time_embed.0.bias": bias}, tmp_path / "other.safetensors")
    line = refusal(tmp_path / "other.safetensors", tmp_path / "out", half=half, tokenizer=str(sd1 / "tokenizer"))
    assert "time_embedding.linear_1.bias of the unet holds NaN or infinity" in line, line


def test_damaged_files(sd1, tmp_path):
    whole = convert(sd1, tmp_path / "whole.safetensors")
    torch.save(load_file(whole), tmp_path / "whole.ckpt")
    for suffix in (".safetensors", ".ckpt"):
        broken = tmp_path / f"broken{suffix}"
        content = (tmp_path / f"whole{suffix}").read_bytes()
        for damage in (content[: len(content) // 2], b"", b"<html>not found</html>" * 9, b"\xff\xd8\xff\xe0 a photo",
                       b"\x89PNG\r\n\x1a\n"):
            broken.write_bytes(damage)
            text = refusal(broken, tmp_path / "out")
            assert "not a whole" in text and "weights_only" not in text, text
        broken.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n")
        assert "git lfs pull" in refusal(broken, tmp_path / "out")


def test_weights_missing_from_a_folder(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights of the unet" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("shards", [
    ["a-00001-of-00002.safetensors"], "all", 5, {"conv_in.weight": "a-00001-of-00002.safetensors"},
    {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}, {"conv_in.weight": ["a"]},
    {"conv_in.weight": ""}, {"conv_in.weight": "x" * 300 + ".bin"},
    {"conv_in.weight": "diffusion_pytorch_model.safetensors.index.json"}, {}, None])
def test_wrong_index_of_shards(sd1, tmp_path, shards):
    folder = Path(shutil.copytree(sd1, tmp_path / "sharded"))
    to_shards(folder)
    edit_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map=shards)
    line = refusal(folder, tmp_path / "out")
    assert "index.json: " in line or "missing" in line, line


@pytest.mark.parametrize("packed", [
    "{", "[]", "{}", "5", "[" * 10**5, '{"": "x"}', '{".": "x"}', '{"..": "x"}', '{"unet": "x"}', '{"x.json": 5}',
    '{"x.json": "\\ud800"}', '{"a/b/x.json": "x"}', '{"/tmp/x.json": "x"}', '{"C:x.json": "x"}',
    json.dumps({f"{'x' * 300}.json": "x"}), json.dumps({f"../../../../../..{ROOT}/trace.json": "x"})], ids=range(16))
def test_damaged_metadata(sd1, tmp_path, packed):
    """One line that names the file, and nothing is written anywhere."""
    save_file({"x": torch.ones(1)}, tmp_path / "damaged.safetensors", {"format": "pt", "tinydb": packed})
    line = refusal(tmp_path / "damaged.safetensors", tmp_path / "out")
    assert "damaged.safetensors: its metadata has damaged settings" in line
    assert not (ROOT / "trace.json").exists()


def test_destination(sd1, tmp_path):
    """What is there is never overwritten; no pickles."""
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(sd1, tmp_path / "there")
    assert "no pickles" in refusal(sd1, tmp_path / "model.ckpt")


def test_disk_space_is_checked_first(sd1, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert "make room" in refusal(sd1, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_failure_leaves_nothing(sd1, tmp_path, monkeypatch, name):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinydb.storage.save_file", full)
    assert "No space left" in refusal(sd1, tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere", "https://civitai.com/models/1",
                                  "https://huggingface.co/owner/name/blob/main/model.safetensors"])
def test_unknown_source(tmp_path, name):
    assert f"{name}: no such file or folder" in refusal(name, tmp_path / "out")


@pytest.mark.parametrize("name", ["owner/name", "https://huggingface.co/owner/name",
                                  "https://huggingface.co/owner/name/"])
def test_address_of_a_hub_model(sd1, tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(convert_weights, "download", lambda repo: asked.append(repo) or sd1)
    convert(name, tmp_path / "out")
    assert asked == ["owner/name"]


# ---- the command itself

def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "convert_weights.py"), *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT.anchor)


@pytest.mark.parametrize("arguments", [
    ["x" * 300, "out"], [TINY, "x" * 300], [TINY, "x" * 300 + ".safetensors"], ["x" * 300 + "/model", "out"],
    [TINY, "out", "--tokenizer", "x" * 300]])
def test_names_that_no_file_can_have(command, tmp_path, arguments):
    code, _, error = command("convert_weights.py", *map(str, arguments))
    assert code == 2 and error.count("\n") == 1 and "too long" in error and list(tmp_path.iterdir()) == []


def test_command(sd1, tmp_path):
    done = run(sd1, tmp_path / "half.safetensors", "--half")
    assert done.returncode == 0 and "half.safetensors: written" in done.stdout and "writing" in done.stdout
    failed = run(tmp_path / "half.safetensors", sd1)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "exists already" in failed.stderr
    assert failed.stdout == ""

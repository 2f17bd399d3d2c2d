"""Convert Stable Diffusion 1.x and 2.x from what people have to what their tools open.

    python convert_weights.py stable-diffusion-v1-5/stable-diffusion-v1-5 models/sd15   # from the hub
    python convert_weights.py checkpoint.ckpt models/mine                               # a downloaded single file
    python convert_weights.py old_folder models/mine                                    # .bin, fp16 names, shards
    python convert_weights.py runs/dog/model dog.safetensors --half                     # for A1111 and ComfyUI
    python convert_weights.py openai/clip-vit-base-patch32 weights/clip                 # a CLIP, to score pictures
    python convert_weights.py models/sd15 models/dog --lora dog-lora.safetensors        # merged

A folder is what tinydb and diffusers open. A single file is in the layout of the original LDM code, and carries the
folder's settings and tokenizer in its metadata, so that it comes back as the very same folder. Tensors keep the
precision that they have on disk, unless --half.
"""

import json
import re
import warnings
import zipfile
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from tinydb import cli
from tinydb.config import (Checked, CLIPConfig, InputError, ModelInfo, ScheduleConfig, TextConfig, UNetConfig,
                           VAEConfig, read_json, read_text, require)
from tinydb.diffusion import NoiseSchedule
from tinydb.pipeline import PARTS, PIPELINES, StableDiffusion
from tinydb.scores import PROCESSORS, build_clip
from tinydb.storage import (WEIGHT_FILES, build_model, canonical_names, check_free_disk, check_tensors, read_tensors,
                            model_folder, refuse_pointer, save_tensors, written_whole)
from tinydb.tokenizer import EOS, CLIPTokenizer

PREFIXES = {"text_encoder": "cond_stage_model.", "unet": "model.diffusion_model.", "vae": "first_stage_model."}

# Our names, which are diffusers', and LDM's. The rows are applied in order, each to the beginning of a name; what no
# row changes is the same in both. {i} is a level, {j} a block in it; `ldm_numbers` makes the numbers that LDM counts
# in another way. RENAMES in tinydb/storage.py lists what else LDM files hold, which is dropped.
TABLE = {
    "unet": {
        "{resnet}.norm1": "{resnet}.in_layers.0",
        "{resnet}.conv1": "{resnet}.in_layers.2",
        "{resnet}.time_emb_proj": "{resnet}.emb_layers.1",
        "{resnet}.norm2": "{resnet}.out_layers.0",
        "{resnet}.conv2": "{resnet}.out_layers.3",
        "{resnet}.conv_shortcut": "{resnet}.skip_connection",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "down_blocks.{i}.resnets.{j}": "input_blocks.{down}.0",
        "down_blocks.{i}.attentions.{j}": "input_blocks.{down}.1",
        "down_blocks.{i}.downsamplers.0.conv": "input_blocks.{down_end}.0.op",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.{i}.resnets.{j}": "output_blocks.{up}.0",
        "up_blocks.{i}.attentions.{j}": "output_blocks.{up}.1",
        "up_blocks.{i}.upsamplers.0": "output_blocks.{up_end}.{behind}",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    },
    "vae": {
        "{resnet}.conv_shortcut": "{resnet}.nin_shortcut",
        "encoder.down_blocks.{i}.resnets.{j}": "encoder.down.{i}.block.{j}",
        "encoder.down_blocks.{i}.downsamplers.0": "encoder.down.{i}.downsample",
        "decoder.up_blocks.{i}.resnets.{j}": "decoder.up.{height}.block.{j}",
        "decoder.up_blocks.{i}.upsamplers.0": "decoder.up.{height}.upsample",
        "{coder}.mid_block.resnets.0": "{coder}.mid.block_1",
        "{coder}.mid_block.resnets.1": "{coder}.mid.block_2",
        "{coder}.mid_block.attentions.0.group_norm": "{coder}.mid.attn_1.norm",
        "{coder}.mid_block.attentions.0.to_{qkv}": "{coder}.mid.attn_1.{qkv}",
        "{coder}.mid_block.attentions.0.to_out.0": "{coder}.mid.attn_1.proj_out",
        "{coder}.conv_norm_out": "{coder}.norm_out",
    },
    "quick_gelu": {  # OpenAI's CLIP, as transformers names it
        "text_model": "transformer.text_model",
    },
    "gelu": {  # OpenCLIP, which makes one tensor of q, k and v
        "text_model.embeddings.token_embedding": "model.token_embedding",
        "text_model.embeddings.position_embedding.weight": "model.positional_embedding",
        "text_model.encoder.layers.{i}.layer_norm{j}": "model.transformer.resblocks.{i}.ln_{j}",
        "text_model.encoder.layers.{i}.self_attn.{qkv}_proj.{kind}":
            "model.transformer.resblocks.{i}.attn.in_proj_{kind}",
        "text_model.encoder.layers.{i}.self_attn.out_proj": "model.transformer.resblocks.{i}.attn.out_proj",
        "text_model.encoder.layers.{i}.mlp.fc1": "model.transformer.resblocks.{i}.mlp.c_fc",
        "text_model.encoder.layers.{i}.mlp.fc2": "model.transformer.resblocks.{i}.mlp.c_proj",
        "text_model.final_layer_norm": "model.ln_final",
    },
}
PLACES = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "qkv": "(?P<qkv>[qkv])", "kind": "(?P<kind>weight|bias)",
          "coder": "(?P<coder>encoder|decoder)", "resnet": r"(?P<resnet>.+\.resnets\.\d+)"}

REFUSED = {  # tensors that give away what is not ours to convert
    r"(lora|lycoris)_\w*\..+|.+[._]lora[._].+": "a LoRA; give the model it was made for, and this with --lora",
    r"emb_params|<[^.]*>": "a textual inversion; get the model that it was made for",
    r"control_model\..+|(.+\.)?(input_hint_block|controlnet_cond_embedding)\..+": "a ControlNet",
    r"conditioner\..+|(.+\.)?label_emb\..+": "an SDXL or unCLIP model",
    r"(.+\.)?(joint_blocks|double_blocks)\..+": "a Stable Diffusion 3 or Flux model",
    r"ztsnr": "a model with another noise schedule (zero terminal SNR)",
}
HARMLESS = (r"(pytorch_lightning|lightning|lightning_fabric|numpy)\..+|_codecs\.encode|"  # in old checkpoints
            r"torch\.nn\.modules\.container\.ParameterDict")
CLIP_REPO = "openai/clip-vit-large-patch14"  # its vocabulary is that of Stable Diffusion 1.x and 2.x
V_PREDICTION_STD = 0.09  # ComfyUI's observation on the SD 2.x models that there are (comfy/supported_models.py, SD20)


@dataclass(frozen=True)
class Description:
    """A model folder without its weights."""

    text_encoder: TextConfig
    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    info: ModelInfo
    tokenizer: CLIPTokenizer | None = None

    @classmethod
    def read(cls, folder: Path) -> "Description":
        """Read everything in a model folder but its weights."""
        configs = [config_class.read(folder / part / "config.json") for part, (_, config_class) in PARTS.items()]
        tokenizer = CLIPTokenizer.read(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
        return cls(*configs, ScheduleConfig.read(folder / "scheduler" / "scheduler_config.json"),
                   ModelInfo.read(folder / "tinydb.json"), tokenizer)


SD1 = Description(
    TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    UNetConfig(cross_attention_dim=768),
    VAEConfig(("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512), 2, sample_size=512),
    ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ModelInfo(base={"name": "Stable Diffusion 1.x", "license": "CreativeML Open RAIL-M"}))
SD2 = replace(
    SD1,
    text_encoder=TextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                            hidden_act="gelu"),
    unet=UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    info=ModelInfo(base={"name": "Stable Diffusion 2.x", "license": "CreativeML Open RAIL++-M"}))


def ldm_numbers(config: UNetConfig | VAEConfig, i: int, j: int) -> dict[str, int]:
    """The numbers of LDM's names for block `j` of level `i`: it counts the UNet's blocks through all levels, samplers
    among them, and the levels of the VAE's decoder from the finest."""
    blocks = config.layers_per_block + 1
    return {"down": 1 + blocks * i + j, "down_end": blocks * (i + 1), "up": blocks * i + j,
            "up_end": blocks * (i + 1) - 1, "behind": 2 if "CrossAttn" in config.up_block_types[i] else 1,
            "height": len(config.block_out_channels) - 1 - i}


def single_file_names(part: str, model: nn.Module) -> dict[str, list[str]]:
    """LDM's name of every tensor of a part -> ours; q, k and v where one of LDM's is three of ours."""
    config = model.config
    rows = [(re.compile(row.replace(".", r"\.").format(**PLACES) + r"(?P<rest>(\..+)?)"), template)
            for row, template in TABLE[config.hidden_act if part == "text_encoder" else part].items()]
    names = {}
    for our_name in model.state_dict():
        name = our_name
        for pattern, template in rows:
            if match := pattern.fullmatch(name):
                places = match.groupdict()
                if part != "text_encoder":
                    places |= ldm_numbers(config, int(places.get("i", 0)), int(places.get("j", 0)))
                name = template.format(**places) + places["rest"]
        names.setdefault(PREFIXES[part] + name, []).append(our_name)
    return names


def to_single_file(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of the parts of a model under LDM's names, in LDM's shapes."""
    tensors = {}
    for part, model in models.items():
        state = model.state_dict()
        for name, ours in single_file_names(part, model).items():
            tensor = torch.cat([state[our_name] for our_name in ours]) if len(ours) > 1 else state[ours[0]]
            if ".attn_1." in name and tensor.dim() == 2:  # LDM's VAE has 1x1 convolutions where we have linear layers
                tensor = tensor[:, :, None, None]
            tensors[name] = tensor
    return tensors


class Inert:
    """What a name in a pickle stands for here: it takes anything and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt or .bin file. Nothing in it is ever run: PyTorch's restricted unpickler reads it, with
    inert stand-ins for names that old checkpoints carry along; any other name is an InputError."""
    refuse_pointer(path)
    try:
        zipped = zipfile.is_zipfile(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        stand_ins = [(Inert, name) for name in names if re.fullmatch(HARMLESS, name)]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of pickles it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # there is no end to what damaged pickles make the unpickler raise
        # only the core of PyTorch's message: the rest advises to load the file unsafely
        detail = str(error).rpartition("Unpickler error: ")[2].partition("\n")[0]
        reason = f"not a whole checkpoint ({detail or type(error).__name__})"
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"refused, it asks to run {asked[1]}"
        raise InputError(f"{path}: {reason}; get a .safetensors of this model, or download it again") from None
    for _ in range(3):  # trainers wrap the weights once or twice; a damaged file may wrap them without end
        content = content.get("state_dict", content) if isinstance(content, dict) else content
    require(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    require("string_to_param" not in content, f"{path}: a textual inversion; get the model that it was made for")
    return {name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, Tensor)
            and tensor.layout == torch.strided and not tensor.is_meta}  # sparse and meta tensors are no weights


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of a .ckpt or .bin, or of all the files that an index of shards names."""
    if path.suffix != ".json":
        return read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    shards = read_json(path).get("weight_map")
    require(isinstance(shards, dict), f"{path}: no weight_map that names the files; download it again")
    tensors = {}
    for name in sorted({str(name) for name in shards.values()}):
        require(re.fullmatch(r"[\w.-]{1,100}\.(safetensors|bin)", name) and path.with_name(name).is_file(),
                f"{path}: names {name!r}, which is not one of the files beside it; download the folder again")
        tensors |= read_file(path.with_name(name))
    return tensors


def weight_file(source: str | Path, part: str, present: list[str]) -> str:
    """Which of the files in a part's folder to read: full precision rather than half, safetensors rather than pickle.
    InputError names `source` where there is none."""
    new = WEIGHT_FILES.get(part, "model.safetensors").removesuffix(".safetensors")
    old = "pytorch_model" if new == "model" else new
    for variant in ("", ".fp16", ".bf16"):
        for name in (f"{new}{variant}.safetensors", f"{new}.safetensors.index{variant}.json", f"{old}{variant}.bin",
                     f"{old}.bin.index{variant}.json"):
            if name in present:
                return name
    raise InputError(f"{source}: no weights of the {part}; expected {new}.safetensors or an older name for it")


def convert_clip(folder: Path, dst: Path, half: bool) -> None:
    """A CLIPModel folder of any age."""
    require(dst.suffix != ".safetensors", f"{dst}: a CLIP is a folder; expected the name of one")
    print(f"reading the weights of {folder}", flush=True)
    tensors = read_file(folder / weight_file(folder, "clip", [path.name for path in folder.iterdir()]))
    clip = build_clip(folder, CLIPConfig.read(folder / "config.json"), tensors)
    check_numbers(folder, "clip", clip.model, half)
    clip.save(dst, torch.float16 if half else None)
    print(f"{dst}: written")


def check_numbers(src: Path, part: str, model: nn.Module, half: bool) -> None:
    """InputError where a tensor holds NaN or infinity, or would in float16."""
    for name, tensor in model.state_dict().items():
        ends = torch.stack(tensor.float().aminmax())  # smallest and largest, which are NaN where one number is
        require(ends.to(torch.float16 if half else torch.float32).isfinite().all(),
                f"{src}: {name} of the {part} holds NaN or infinity" + (
                    " in float16; leave out --half" if half else "; use an earlier save of this model"))


def read_folder(folder: Path) -> tuple[Description, dict[str, dict[str, Tensor]]]:
    """A diffusers folder of any age: its description, and its tensors by part."""
    folder = model_folder(folder)
    index = next((folder / name for name in ("model_index.json", "config.json") if (folder / name).exists()), None)
    kind = "folder without model_index.json"
    if index:
        kind = read_json(index).get("_class_name", "model of another library")
    require(kind in PIPELINES, f"{folder}: a {kind}; expected a {PIPELINES[0]} (Stable Diffusion 1.x or 2.x), not an "
                               "SDXL, inpainting, ControlNet or LoRA")
    description = Description.read(folder)
    present = {part: [path.name for path in (folder / part).iterdir()] for part in PARTS}
    return description, {part: read_file(folder / part / weight_file(folder, part, present[part])) for part in PARTS}


def read_single_file(src: Path, prediction: str | None) -> tuple[Description, dict[str, dict[str, Tensor]]]:
    """A checkpoint in LDM's layout: its description, and its tensors by part under our names."""
    stored, metadata = read_file(src), {}
    for pattern, kind in REFUSED.items():
        found = next((name for name in stored if re.fullmatch(pattern, name)), None)
        require(found is None, f"{src}: {kind} ({found}); only Stable Diffusion 1.x and 2.x can be converted")
    if src.suffix == ".safetensors":
        with safe_open(src, "pt") as file:
            metadata = file.metadata() or {}
    is_ours = "tinydb" in metadata
    description = unpack(src, metadata["tinydb"]) if is_ours else recognise(src, stored)
    tensors = canonical_names("single_file", stored, src)
    dropped = len(stored) - len(tensors)
    with torch.device("meta"):
        models = {part: model_class(getattr(description, part)) for part, (model_class, _) in PARTS.items()}
    check_tensors(tensors, {name: tensor.shape for name, tensor in to_single_file(models).items()}, src)
    print(f"{src}: {len(tensors)} tensors, {dropped} more are no weights and dropped")
    if not is_ours:
        prediction = prediction or noted_prediction(src, stored, metadata)
        description = with_prediction(src, description, tensors, prediction)
    parts = {part: {} for part in PARTS}
    for part, model in models.items():
        state = model.state_dict()
        for name, ours in single_file_names(part, model).items():
            for our_name, tensor in zip(ours, tensors[name].chunk(len(ours))):
                parts[part][our_name] = tensor.reshape(state[our_name].shape)
    return description, parts


def pack(sd: StableDiffusion) -> str:
    """The settings and the tokenizer of a model folder as one text."""
    with TemporaryDirectory() as scratch:
        sd.save_settings(Path(scratch))
        files = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file()]
        return json.dumps({path.relative_to(scratch).as_posix(): path.read_text(encoding="utf-8") for path in files})


def unpack(src: Path, packed: str) -> Description:
    """What `pack` packed in the metadata of `src`."""
    with TemporaryDirectory() as scratch:
        try:
            for name, text in json.loads(packed).items():
                require(re.fullmatch(r"(\w{1,50}/)?\w{1,50}\.(json|txt)", name) is not None, name)
                path = Path(scratch, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            return Description.read(Path(scratch))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error).replace(f"{scratch}/", "")
            raise InputError(f"{src}: its metadata has damaged settings ({reason}); convert its source again") from None


def recognise(src: Path, tensors: dict[str, Tensor]) -> Description:
    """What a checkpoint of another program is, told from the names and shapes of its tensors."""
    inside = sorted({name.split(".")[0] for name in tensors})
    lacking = [part.replace("vae", "VAE") for part, prefix in PREFIXES.items() if prefix.split(".")[0] not in inside]
    require("unet" not in lacking or "model_ema" not in inside,
            f"{src}: its UNet is there only as averaged weights (EMA); get the file with the UNet itself")
    require(not lacking, f"{src}: no {', no '.join(lacking)} inside (it holds {', '.join(inside[:5]) or 'nothing'}); "
                         "give a complete checkpoint or, if this is a part of a diffusers folder, the whole folder")
    channels, context = (tensors[name].shape[1] if name in tensors and tensors[name].dim() > 1 else 0 for name in (
        PREFIXES["unet"] + "input_blocks.0.0.weight",
        PREFIXES["unet"] + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"))
    require(channels == SD1.unet.in_channels,
            f"{src}: its UNet takes {channels} channels, not {SD1.unet.in_channels}: an inpainting, depth or "
            "instruction model; use the text-to-image model it was made from")
    kinds = {kind.unet.cross_attention_dim: kind for kind in (SD1, SD2)}
    require(context in kinds, f"{src}: its UNet attends to {context} channels, Stable Diffusion 1.x and 2.x to "
                              f"{' and '.join(map(str, kinds))}; this is another model")
    return kinds[context]


def noted_prediction(src: Path, stored: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    """What the UNet in a file predicts, where the file or a .yaml beside it, which A1111 asks for, says it."""
    yaml, is_v = src.with_suffix(".yaml"), r"(?m)^\s*parameterization:\s*[\"']?v\b"
    if "v_pred" in stored or (yaml.exists() and re.search(is_v, read_text(yaml))):
        return "v_prediction"
    noted = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")  # ComfyUI's
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(noted)


def with_prediction(src: Path, kind: Description, tensors: dict[str, Tensor], prediction: str | None) -> Description:
    """`kind` with what its UNet predicts; None is a guess, from the weights of SD 2.x."""
    if prediction is None and kind is SD2:
        last = len(kind.unet.block_out_channels) * (kind.unet.layers_per_block + 1) - 1
        name = f"{PREFIXES['unet']}output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
        std = tensors[name].float().std(correction=0).item()
        prediction = "v_prediction" if std > V_PREDICTION_STD else "epsilon"
        print(f"{src}: taken for {prediction}, since the standard deviation of {name} is {std:.3f} (v_prediction above "
              f"{V_PREDICTION_STD}); --prediction overrides this guess")
    prediction = prediction or "epsilon"
    if kind is SD2 and prediction == "v_prediction":  # made for 768 pixels
        kind = replace(kind, unet=replace(kind.unet, sample_size=96, upcast_attention=True),
                       vae=replace(kind.vae, sample_size=768))
    print(f"{src}: {kind.info.base['name']}, {prediction}")
    return replace(kind, schedule=replace(kind.schedule, prediction_type=prediction))


def clip_tokenizer(folder: str | None, config: TextConfig) -> CLIPTokenizer:
    """The tokenizer in `folder`, else CLIP's from the hub, with the padding that the text encoder was trained with."""
    try:
        folder = Path(folder) if folder else download(CLIP_REPO, ["vocab.json", "merges.txt"])
    except InputError as error:
        raise InputError(f"there is no tokenizer with these weights, and {error}; pass --tokenizer with the tokenizer/ "
                         "of any Stable Diffusion folder") from None
    found, pad = CLIPTokenizer.read(folder), "!" if config.hidden_act == "gelu" else EOS
    return CLIPTokenizer(found.own_vocab, found.merges, pad, found.max_length, found.added)


def download(repo: str, files: list[str] | None = None) -> Path:
    """The folder in the hub's cache with `files` of a repository, or with what is read of the model that it holds:
    some repositories hold the same weights five times. What is there already is not fetched again."""
    try:
        if files is None and constants.HF_HUB_OFFLINE:
            files = ["model_index.json", "config.json"]  # and whatever else an earlier run downloaded
        elif files is None:
            files = needed_files(repo, [file.rfilename for file in model_info(repo).siblings])
            hf_hub_download(repo, files[0])  # a gated repository refuses here, before any progress bar
        return Path(snapshot_download(repo, allow_patterns=files))
    except GatedRepoError:
        raise InputError(f"{repo}: a gated model; accept its terms on https://huggingface.co/{repo}, then "
                         "`hf auth login` and run this again") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(f"{repo}: no such file or folder here, and no such model on the hub, or a private one (then "
                         "`hf auth login` first)") from None
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{repo}: no such file or folder here, and the hub did not give it ({reason}); run this again "
                         "to continue the download") from None


def needed_files(repo: str, present: list[str]) -> list[str]:
    """The files of a repository that are read: configs, tokenizer, one set of weights a part."""
    is_clip = "model_index.json" not in present and any(file in present for file in PROCESSORS)
    require(is_clip or "model_index.json" in present, f"{repo}: a hub repository without model_index.json, so no "
                                                      "diffusers model; download its checkpoint and convert that file")
    files = ["model_index.json", "tinydb.json", "tokenizer/*", "scheduler/*"]
    if is_clip:
        files = [*(file for file in PROCESSORS if file in present), "vocab.json", "merges.txt", "tokenizer*.json",
                 "special_tokens_map.json", "added_tokens.json"]
    for part in ["clip"] if is_clip else PARTS:
        folder = "" if is_clip else f"{part}/"
        name = weight_file(repo, part, [file.removeprefix(folder) for file in present if file.startswith(folder)])
        files += [f"{folder}config.json", f"{folder}{name}"]
        if name.endswith(".json"):  # an index; its shards are named like it
            stem, suffix = name.split(".")[:2]
            files.append(f"{folder}{stem}*-of-*.{suffix}")
    return files


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    src: str = cli.option(MISSING, "a checkpoint (.safetensors, .ckpt), a diffusers folder, or a hub id (owner/name)")
    dst: str = cli.option(MISSING, "the folder to make, or a .safetensors file for A1111 and ComfyUI")
    lora: str | None = cli.option(None, "a LoRA file to merge into the model", metavar="FILE")
    half: bool = cli.option(False, "write float16, half the size, for sharing")
    tokenizer: str | None = cli.option(None, "a folder with CLIP's vocab.json and merges.txt")
    prediction: str | None = cli.option(None, "what the UNet predicts, where it is guessed wrong",
                                        choices=("epsilon", "v_prediction"))


def main(settings: Settings):
    src, dst = Path(settings.src), Path(settings.dst)
    require(not dst.exists(), f"{dst}: exists already; choose another name, or delete it first")
    require(dst.suffix not in (".ckpt", ".bin", ".pt", ".pth"),
            f"{dst}: no pickles are written, they can hide programs; name a folder or a .safetensors file")
    if src.is_file():
        description, tensors = read_single_file(src, settings.prediction)
    else:
        repo = settings.src.removeprefix("https://huggingface.co/").rstrip("/")
        require(src.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is not None,
                f"{settings.src}: no such file or folder, and not a hub id (owner/name)")
        folder = src if src.is_dir() else download(repo)
        if (folder / "config.json").exists() and read_json(folder / "config.json").get("model_type") == "clip":
            require(not (settings.lora or settings.tokenizer or settings.prediction),
                    f"{src}: a CLIP, which takes none of --lora, --tokenizer and --prediction; leave them out")
            return convert_clip(folder, dst, settings.half)
        description, tensors = read_folder(folder)
    if settings.tokenizer or description.tokenizer is None:
        description = replace(description, tokenizer=clip_tokenizer(settings.tokenizer, description.text_encoder))
    if settings.prediction:
        description = replace(description, schedule=replace(description.schedule, prediction_type=settings.prediction))

    print(f"reading the weights of {src}", flush=True)
    dtype, size, models = torch.float16 if settings.half else None, 0, {}
    for part, (model_class, _) in PARTS.items():
        models[part] = build_model(model_class, getattr(description, part), part, tensors[part], src)
    sd = StableDiffusion(**models, tokenizer=description.tokenizer, schedule=NoiseSchedule(description.schedule),
                         info=description.info)
    if settings.lora:
        sd.add_lora(settings.lora)
    for part, model in models.items():
        check_numbers(src, part, model, settings.half)
        size += sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in model.state_dict().values())
    check_free_disk(dst, size, "give another folder" if settings.half else "use --half")
    print(f"writing {size / 1e9:.2f} GB to {dst}", flush=True)
    with written_whole(dst) as temporary:
        if dst.suffix == ".safetensors":
            save_tensors(to_single_file(models), temporary, dtype, format="pt", tinydb=pack(sd))
        else:
            sd.write(temporary, dtype)
    print(f"{dst}: written, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Close other programs, or convert on a machine with more memory")

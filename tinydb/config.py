"""What a model folder says about itself, as frozen dataclasses that mirror its `config.json` files.

A field declares its default and its bounds in one place, and every value is checked against them once, wherever it
comes from: a config file, a command line, a call from Python. The defaults are those of diffusers (of its schedulers,
DDIM's) and transformers, so a file that lists only what differs from them means the same here. What this code cannot
build (SDXL, inpainting, an unknown activation) is refused by name when the file is read.
"""

import json
import math
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

LARGEST_NUMBER = 10**12  # no setting may be larger; NaN fails this comparison too
LONGEST_VALUE = 200  # characters of it in a message
LARGEST_TEXT = 100e6  # bytes; CLIP's tokenizer.json has 4e6


class InputError(ValueError):
    """What the user gave cannot be used. The text is one line: what was given, what was expected, the cure."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def as_text(text: str) -> str:
    """The text itself; InputError where it holds bytes that are not UTF-8, as a command line or a file name may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r}: bytes that are no text; write it in UTF-8") from None
    return text


def check_file(path: Path, most: float = math.inf) -> None:
    """OSError where `path` is a pipe or a device, reading which may never end, or has more than `most` bytes."""
    if path.exists() and not path.is_file():
        raise OSError("not a file")
    if path.stat().st_size > most:
        raise OSError(f"{path.stat().st_size / 1e6:.0f} MB, more than {most / 1e6:.0f}")


def read_text(path: Path, expected: str = "a text") -> str:
    """What a text file says; InputError where it is not UTF-8 or, with what was `expected`, not there."""
    try:
        check_file(path, LARGEST_TEXT)
        return path.read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path}: not readable as text ({reason}); save it as plain text in UTF-8") from None


def parse_json(text: str, source: Path | str) -> dict[str, Any]:
    """The object that a JSON text holds; InputError names `source` where there is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not readable as JSON ({error}); bring a whole copy of it") from None
    require(isinstance(content, dict), f"{source}: holds a {type(content).__name__}, expected an object of settings")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError where there is none."""
    return parse_json(read_text(path, "the whole folder of a run, or of a model (convert_weights.py makes one)"), path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as the readable JSON that diffusers and transformers write."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # for bytes in a path that are no text


def setting(default: Any, **declared: Any) -> Any:
    """A dataclass field with bounds: `least`, `above`, `most`, `choices`, and a `cure` to say to a number outside of
    them. `cli.option` declares more of an option."""
    return field(default=default, metadata=declared)


def label(f: Field) -> str:
    """How a message names a field: by its flag where it is an option with one, else by its name."""
    has_flag = "help" in f.metadata and f.default is not MISSING
    return f.metadata.get("flag") or ("--" + f.name.replace("_", "-") if has_flag else f.name)


def check_field(f: Field, value: Any) -> None:
    """InputError where `value` is not of its field's type, or it or an item of it is out of the field's bounds."""
    alternatives = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
    kinds = [get_origin(kind) or kind for kind in alternatives]
    if value is None and type(None) in kinds:
        return
    shown = f"{label(f)} {value!r}"[:LONGEST_VALUE]
    right_type = isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))  # JSON writes 1.0 as 1
    require(right_type and (bool in kinds or not isinstance(value, bool)),
            f"{shown}: expected {' or '.join(kind.__name__ for kind in kinds if kind is not type(None))}")

    item_types = [get_args(kind)[0] for kind in alternatives if get_origin(kind) is tuple]
    require(not isinstance(value, tuple) or len(value) <= 1000 and all(type(item) in item_types for item in value),
            f"{shown}: expected a list of {' or '.join(kind.__name__ for kind in item_types)}")

    bounds = {"least": "{} or more", "above": "more than {}", "most": "at most {}"}
    expected = [text.format(f.metadata[name]) for name, text in bounds.items() if name in f.metadata]
    least, above, most = (f.metadata.get(name) for name in bounds)
    choices = f.metadata.get("choices")
    for item in value if isinstance(value, tuple) else [value]:
        require(not choices or item in choices, f"{shown}: expected {' or '.join(choices or ())}")
        if type(item) in (int, float):
            require(abs(item) <= LARGEST_NUMBER, f"{shown}: expected a number up to {LARGEST_NUMBER:,}")
            inside = ((least is None or item >= least) and (above is None or item > above)
                      and (most is None or item <= most))
            require(inside, f"{shown}: expected {' and '.join(expected)}{f.metadata.get('cure', '')}")


@dataclass(frozen=True)
class Checked:
    """A dataclass whose values are checked against its fields' declarations when it is made."""

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))


@dataclass(frozen=True)
class PartConfig(Checked):
    """One part's `config.json`: the fields that decide what is built, and the settings that may have one value only."""

    FIXED: ClassVar[dict[str, Any]] = {}  # key -> the one value that this code builds
    HEADER: ClassVar[dict[str, Any]] = {}  # written to the file besides the fields, for diffusers and transformers
    CLOSED: ClassVar[bool] = True  # a key we do not know must be empty: it would change the network

    @classmethod
    def read(cls, path: Path):
        """Read `path`; raises InputError that names the entry this code cannot build."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, entries: dict[str, Any], source: str):
        """Build from the entries of a config file; `source` names it in errors."""
        require(entries.get("addition_embed_type") is None,
                f"{source}: an SDXL model (addition_embed_type); this is for Stable Diffusion 1.x and 2.x")
        names = {f.name for f in fields(cls)}
        for key, value in entries.items():
            shown = f"{key} = {value!r}"[:LONGEST_VALUE]
            if key in cls.FIXED:
                require(value == cls.FIXED[key], f"{source}: {shown} is not supported (only "
                                                 f"{cls.FIXED[key]!r}); use SD 1.x or 2.x")
            else:
                known = key in names or key in cls.HEADER or key.startswith("_") or not cls.CLOSED
                require(known or value is None or value is False,
                        f"{source}: {shown} is not supported (no such setting); use SD 1.x or 2.x")
        chosen = {name: tuple(entries[name]) if isinstance(entries[name], list) else entries[name]
                  for name in names if entries.get(name) is not None}
        try:
            return cls(**chosen)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The entries of the config file, as diffusers and transformers read them."""
        return {**self.HEADER, **asdict(self)}


@dataclass(frozen=True)
class TextConfig(PartConfig):
    """CLIP text encoder, `text_encoder/config.json`. SD 1.x: 12 layers of 768, quick_gelu; SD 2.x: 23 of 1024, gelu."""

    vocab_size: int = setting(49408, least=1, most=10**6)
    hidden_size: int = setting(512, least=1, most=10**4)
    intermediate_size: int = setting(2048, least=1, most=10**5)
    num_hidden_layers: int = setting(12, least=1, most=100)
    num_attention_heads: int = setting(8, least=1, most=1000)
    max_position_embeddings: int = setting(77, least=2, most=10**4)
    hidden_act: str = setting("quick_gelu", choices=("quick_gelu", "gelu"))
    layer_norm_eps: float = setting(1e-5, above=0, most=1)
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    CAUSAL: ClassVar[bool] = True  # a token sees itself and the tokens before it
    CLOSED = False  # transformers writes many entries that concern other uses of CLIP
    FIXED = {"use_attention_mask": False}  # diffusers' own entry: with it, no token sees the padding
    # float32 whatever the precision on disk: diffusers would load this part alone in half precision otherwise
    HEADER = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}

    def __post_init__(self):
        super().__post_init__()
        require(self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}")


@dataclass(frozen=True)
class VisionConfig(PartConfig):
    """CLIP's image encoder. ViT-B/32: 12 layers of 768; ViT-L/14: 24 of 1024."""

    hidden_size: int = setting(768, least=1, most=10**4)
    intermediate_size: int = setting(3072, least=1, most=10**5)
    num_hidden_layers: int = setting(12, least=1, most=100)
    num_attention_heads: int = setting(12, least=1, most=1000)
    image_size: int = setting(224, least=1, most=10**4)
    patch_size: int = setting(32, least=1, most=10**4)
    hidden_act: str = setting("quick_gelu", choices=("quick_gelu", "gelu"))
    layer_norm_eps: float = setting(1e-5, above=0, most=1)

    CAUSAL: ClassVar[bool] = False
    CLOSED = False
    HEADER = {"model_type": "clip_vision_model", "num_channels": 3}
    FIXED = {"num_channels": 3}

    def __post_init__(self):
        super().__post_init__()
        require(self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}")
        require(self.patch_size <= self.image_size,
                f"patch_size {self.patch_size} is more than image_size {self.image_size}")


@dataclass(frozen=True)
class CLIPConfig(PartConfig):
    """Both halves of CLIP, the `config.json` of a transformers `CLIPModel` folder."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    projection_dim: int = setting(512, least=1, most=10**4)  # D of the space that text and pictures share
    logit_scale_init_value: float = setting(2.6592, above=-100, most=100)  # log(1 / 0.07)

    CLOSED = False
    HEADER = {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": "float32"}

    @classmethod
    def from_dict(cls, entries: dict[str, Any], source: str):
        """The halves are objects in the file; older ones repeat them as `..._config_dict`, which decides."""
        require(entries.get("model_type") == "clip",
                f"{source}: model_type {entries.get('model_type')!r}, expected 'clip' (a transformers CLIPModel)")
        halves = {}
        for name, half in (("text_config", TextConfig), ("vision_config", VisionConfig)):
            older = entries.get(f"{name}_dict")
            found = (entries.get(name) or {}) if older is None else older
            require(isinstance(found, dict), f"{source}: {name}: expected an object of settings")
            halves[name] = half.from_dict(found, f"{source}: {name}")
        return super().from_dict({**entries, **halves}, source)

    def to_dict(self) -> dict[str, Any]:
        """The entries of the config file; each half says the size of the shared space as well."""
        shared = {"projection_dim": self.projection_dim}
        return {**super().to_dict(), "text_config": {**self.text_config.to_dict(), **shared},
                "vision_config": {**self.vision_config.to_dict(), **shared}}


@dataclass(frozen=True)
class UNetConfig(PartConfig):
    """UNet, `unet/config.json`. `attention_head_dim` is the NUMBER of heads (a misnomer that diffusers keeps)."""

    sample_size: int = setting(64, least=1, most=1024)
    in_channels: int = setting(4, least=1, most=1024)
    out_channels: int = setting(4, least=1, most=1024)
    down_block_types: tuple[str, ...] = setting(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                                                choices=("CrossAttnDownBlock2D", "DownBlock2D"))
    up_block_types: tuple[str, ...] = setting(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                                              choices=("CrossAttnUpBlock2D", "UpBlock2D"))
    block_out_channels: tuple[int, ...] = setting((320, 640, 1280, 1280), least=1, most=10**4)
    layers_per_block: int = setting(2, least=1, most=10)
    cross_attention_dim: int = setting(1280, least=1, most=10**4)
    attention_head_dim: int | tuple[int, ...] = setting(8, least=1, most=1000)
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = setting(32, least=1, most=1000)
    norm_eps: float = setting(1e-5, above=0, most=1)

    HEADER = {"_class_name": "UNet2DConditionModel"}
    FIXED = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
             "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0, "transformer_layers_per_block": 1,
             "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1, "time_embedding_type": "positional",
             "num_attention_heads": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
             "addition_embed_type_num_heads": 64}

    @classmethod
    def from_dict(cls, entries: dict[str, Any], source: str):
        """Before diffusers 0.9, models of 512 pixels were written with a sample_size of 32 instead of 64; its pipeline
        corrects that too."""
        size, version = entries.get("sample_size"), str(entries.get("_diffusers_version"))
        if re.match(r"0\.[0-8]\.", version) and isinstance(size, int) and size < 64:
            entries = {**entries, "sample_size": 64}
        return super().from_dict(entries, source)

    def __post_init__(self):
        super().__post_init__()
        require(self.in_channels == self.out_channels,
                f"in_channels {self.in_channels} for out_channels {self.out_channels}: an inpainting or instruction "
                "model; use the text-to-image model it was made from")
        levels = [len(each) for each in (self.block_out_channels, self.down_block_types, self.up_block_types,
                                         self.heads)]
        require(len(set(levels)) == 1 and 0 < levels[0] <= 10,
                "block_out_channels, down_block_types, up_block_types and head counts are "
                f"{', '.join(map(str, levels))}; expected as many of each, from 1 to 10")
        for channels, heads in zip(self.block_out_channels, self.heads):
            require(channels % heads == 0 and channels % self.norm_num_groups == 0,
                    f"{channels} channels are not divisible by {heads} heads and {self.norm_num_groups} groups")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads at each level, from the finest to the coarsest."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


@dataclass(frozen=True)
class VAEConfig(PartConfig):
    """Autoencoder, `vae/config.json`."""

    down_block_types: tuple[str, ...] = setting(("DownEncoderBlock2D",), choices=("DownEncoderBlock2D",))
    up_block_types: tuple[str, ...] = setting(("UpDecoderBlock2D",), choices=("UpDecoderBlock2D",))
    block_out_channels: tuple[int, ...] = setting((64,), least=1, most=10**4)
    layers_per_block: int = setting(1, least=1, most=10)
    latent_channels: int = setting(4, least=1, most=1024)
    norm_num_groups: int = setting(32, least=1, most=1000)
    scaling_factor: float = setting(0.18215, above=0, most=10**6)
    sample_size: int = setting(32, least=1, most=10**4)

    HEADER = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu",
              "force_upcast": False}
    FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True,
             "use_post_quant_conv": True, "mid_block_add_attention": True}

    def __post_init__(self):
        super().__post_init__()
        levels = [len(each) for each in (self.block_out_channels, self.down_block_types, self.up_block_types)]
        require(len(set(levels)) == 1 and 0 < levels[0] <= 10,
                "block_out_channels, down_block_types and up_block_types are "
                f"{', '.join(map(str, levels))}; expected as many of each, from 1 to 10")
        require(all(channels % self.norm_num_groups == 0 for channels in self.block_out_channels),
                f"block_out_channels {self.block_out_channels} are not divisible by {self.norm_num_groups} groups")

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig(PartConfig):
    """Noise schedule, `scheduler/scheduler_config.json`, of any sampler's class; written as a DDIMScheduler."""

    num_train_timesteps: int = setting(1000, least=1, most=10**6)
    beta_start: float = setting(0.0001, above=0, most=1)
    beta_end: float = setting(0.02, above=0, most=1)
    beta_schedule: str = setting("linear", choices=("linear", "scaled_linear"))
    prediction_type: str = setting("epsilon", choices=("epsilon", "v_prediction"))

    CLOSED = False  # samplers have many settings of their own, and we bring our own sampler
    # diffusers' pipeline insists on steps_offset 1; the other three make its DDIM step the paper's
    HEADER = {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    FIXED = {"trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False,
             "timestep_type": "discrete"}

    SAMPLERS_OF_DDPM = (r"(DDIM|DDPM|PNDM|LMSDiscrete|Euler(Ancestral)?Discrete|HeunDiscrete|KDPM2(Ancestral)?Discrete|"
                        r"DPMSolver(Multistep|Singlestep|SDE)|UniPCMultistep|DEISMultistep|SASolver|LCM|TCD)"
                        r"(Inverse|Parallel)?Scheduler")

    @classmethod
    def from_dict(cls, entries: dict[str, Any], source: str):
        """Flow matching, EDM and others are another process than `diffusion.NoiseSchedule`: refused by their class."""
        name = str(entries.get("_class_name", "DDIMScheduler"))
        require(re.fullmatch(cls.SAMPLERS_OF_DDPM, name) is not None,
                f"{source}: a {name} is not supported; use SD 1.x or 2.x, whose noise schedule is DDPM's")
        return super().from_dict(entries, source)


@dataclass(frozen=True)
class Recipe(Checked):
    """What DreamBooth on a model should use unless told otherwise. The defaults are Stable Diffusion's
    (diffusers' examples/dreambooth/README.md, "Fine-tune text encoder with the UNet")."""

    steps: int = setting(800, least=1)
    batch: int = setting(1, least=1, most=10**4)
    lr: float = setting(2e-6, above=0)
    lr_text: float = setting(2e-6, above=0)  # of the text encoder
    lr_freeze_text: float = setting(5e-6, above=0)  # where the UNet learns alone
    lora: int | None = setting(None, least=0, most=1024)  # rank of low-rank updates; 0 or None is none
    lr_lora: float = setting(1e-4, above=0)  # of these, in the UNet
    lr_lora_text: float = setting(1e-4, above=0)  # and in the text encoder
    lora_conv: bool = False  # whether the convolutions of blocks without a transformer have them too
    save_every: int = setting(400, least=0)  # steps between checkpoints; writing one takes as long as 100
    lr_decay: float = setting(0.0, least=0, most=1)  # last part of the steps, over which the rates fall to 0
    frozen_prior: bool = False  # whether the class images' target is what the model predicted before training
    class_images: int = setting(200, least=1, most=10**5)
    class_steps: int = setting(50, least=1)  # for a class image
    class_sampler: str = "ddim"
    class_guidance: float = 7.5
    class_prompts: tuple[str, ...] = ()  # templates with {noun} beside the plain prompt, for the varied class images
    plain_share: float = setting(0.75, least=0, most=1)  # of the class images, where there are templates
    sample_steps: int = setting(50, least=1)
    guidance: float = 7.5
    guidance_stop: float = setting(1.0, least=0, most=1)  # part of the steps after which that stops; 1 is never


@dataclass(frozen=True)
class ModelInfo(Checked):
    """Our own `tinydb.json`: what the folder was taught, how to teach it more, and where it came from."""

    identifier: str | None = None  # the word that [V] stands for
    class_noun: str | None = None  # None until a subject was taught
    step: int | None = setting(None, least=0)  # training steps behind this folder
    base: dict[str, Any] = field(default_factory=dict)  # name and licence of the model it was trained from
    recipe: Recipe = Recipe()

    @classmethod
    def read(cls, path: Path) -> "ModelInfo":
        """Read `tinydb.json`. A folder without one, as of any other Stable Diffusion, gets the defaults.
        So does every entry that an older file lacks; unknown entries of a newer file are ignored."""
        entries = read_json(path) if path.exists() else {}
        recipe = entries.get("recipe") or {}
        require(isinstance(recipe, dict), f"{path}: recipe {recipe!r}: expected an object of settings")
        names = {f.name for f in fields(Recipe)}
        try:
            return cls(entries.get("identifier"), entries.get("class"), entries.get("step"), entries.get("base") or {},
                       Recipe(**{name: tuple(value) if isinstance(value, list) else value
                                 for name, value in recipe.items() if name in names}))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The entries of `tinydb.json`."""
        return {"identifier": self.identifier, "class": self.class_noun, "step": self.step, "base": self.base,
                "recipe": asdict(self.recipe)}

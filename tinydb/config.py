"""What a model folder says about itself, as frozen dataclasses that mirror its `config.json` files.

The defaults are those of diffusers and transformers, so a file that lists only what differs from them means the same
here. What this code cannot build (SDXL, inpainting, an unknown activation) is refused by name when the file is read,
never built approximately.
"""

import argparse
import difflib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin


class InputError(ValueError):
    """What the user gave cannot be used. The text is one line: what was given, what was expected, the cure."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder has one (see convert_weights.py)") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); copy or convert the folder again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object of settings")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as the readable JSON that diffusers and transformers write."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_types(annotation: Any) -> tuple[type, ...]:
    """What isinstance takes for a field's annotation: int | tuple[int, ...] -> (int, tuple)."""
    alternatives = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = tuple(get_origin(kind) or kind for kind in alternatives)
    return (*kinds, int) if float in kinds else kinds  # JSON writes 1.0 as 1


@dataclass(frozen=True)
class PartConfig:
    """One part's `config.json`: the fields that decide what is built, and those of which we build one value only."""

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
        if entries.get("addition_embed_type") is not None:
            raise InputError(f"{source}: an SDXL model (addition_embed_type); this is for Stable Diffusion 1.x and 2.x")
        names = {f.name for f in fields(cls)}
        for key, value in entries.items():
            if key in cls.FIXED:
                supported = value == cls.FIXED[key]
            else:
                supported = (key in names or key in cls.HEADER or not cls.CLOSED or key.startswith("_")
                             or value is None or value is False)
            if not supported:
                expected = f"only {cls.FIXED[key]!r}" if key in cls.FIXED else "no such setting"
                raise InputError(f"{source}: {key} = {value!r} is not supported ({expected}); use SD 1.x or 2.x")
        chosen = {}
        for f in fields(cls):
            value = entries.get(f.name)
            value = tuple(value) if isinstance(value, list) else value
            if value is not None:
                require(isinstance(value, plain_types(f.type)),
                        f"{source}: {f.name} = {entries[f.name]!r} is not supported; use an SD 1.x or 2.x model")
                chosen[f.name] = value
        try:
            return cls(**chosen)
        except (InputError, ZeroDivisionError) as error:
            raise InputError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The entries of the config file, as diffusers and transformers read them."""
        return {**self.HEADER, **asdict(self)}


@dataclass(frozen=True)
class TextConfig(PartConfig):
    """CLIP text encoder, `text_encoder/config.json`. SD 1.x: 12 layers of 768, quick_gelu; SD 2.x: 23 of 1024, gelu."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    CLOSED = False  # transformers writes many entries that concern other uses of CLIP
    # float32 whatever the precision on disk: diffusers would load this part alone in half precision otherwise
    HEADER = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}

    def __post_init__(self):
        require(self.hidden_act in ("quick_gelu", "gelu"),
                f"hidden_act = {self.hidden_act!r} is not supported; CLIP text encoders use 'quick_gelu' or 'gelu'")
        require(self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}")


@dataclass(frozen=True)
class UNetConfig(PartConfig):
    """UNet, `unet/config.json`. `attention_head_dim` is the NUMBER of heads (a misnomer that diffusers keeps)."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    HEADER = {"_class_name": "UNet2DConditionModel"}
    FIXED = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
             "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0, "transformer_layers_per_block": 1,
             "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1, "time_embedding_type": "positional",
             "num_attention_heads": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
             "addition_embed_type_num_heads": 64}

    def __post_init__(self):
        levels = len(self.block_out_channels)
        require(self.in_channels == self.out_channels,
                f"in_channels {self.in_channels} for out_channels {self.out_channels}: an inpainting or instruction "
                "model; use the text-to-image model it was made from")
        require(all(t in ("CrossAttnDownBlock2D", "DownBlock2D") for t in self.down_block_types),
                f"down_block_types {self.down_block_types}: only CrossAttnDownBlock2D and DownBlock2D are supported")
        require(all(t in ("CrossAttnUpBlock2D", "UpBlock2D") for t in self.up_block_types),
                f"up_block_types {self.up_block_types}: only CrossAttnUpBlock2D and UpBlock2D are supported")
        require(levels == len(self.down_block_types) == len(self.up_block_types) == len(self.heads),
                f"{levels} block_out_channels for {len(self.down_block_types)} down and {len(self.up_block_types)} up "
                f"block types and {len(self.heads)} head counts; expected as many of each")
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

    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 32

    HEADER = {"_class_name": "AutoencoderKL", "force_upcast": False}
    FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True,
             "use_post_quant_conv": True, "mid_block_add_attention": True}

    def __post_init__(self):
        levels = len(self.block_out_channels)
        require(self.down_block_types == ("DownEncoderBlock2D",) * levels
                and self.up_block_types == ("UpDecoderBlock2D",) * levels,
                f"{self.down_block_types} and {self.up_block_types} for {levels} block_out_channels: "
                "only as many DownEncoderBlock2D and UpDecoderBlock2D are supported")
        require(all(channels % self.norm_num_groups == 0 for channels in self.block_out_channels),
                f"block_out_channels {self.block_out_channels} are not divisible by {self.norm_num_groups} groups")

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig(PartConfig):
    """Noise schedule, `scheduler/scheduler_config.json`, of whatever class; always written as a DDIMScheduler."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    CLOSED = False  # samplers have many settings of their own, and we bring our own sampler
    # diffusers' pipeline insists on steps_offset 1; the other three make its DDIM step the paper's
    HEADER = {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    FIXED = {"trained_betas": None, "rescale_betas_zero_snr": False}

    def __post_init__(self):
        require(self.num_train_timesteps > 0, f"num_train_timesteps {self.num_train_timesteps}: expected more than 0")
        require(self.beta_schedule in ("linear", "scaled_linear"),
                f"beta_schedule = {self.beta_schedule!r} is not supported; expected 'linear' or 'scaled_linear'")
        require(self.prediction_type in ("epsilon", "v_prediction"),
                f"prediction_type = {self.prediction_type!r} is not supported; expected 'epsilon' or 'v_prediction'")


@dataclass(frozen=True)
class Recipe:
    """What DreamBooth on a model should use unless told otherwise. The defaults are Stable Diffusion's
    (diffusers' examples/dreambooth/README.md, "Fine-tune text encoder with the UNet")."""

    steps: int = 800
    batch: int = 1
    lr: float = 2e-6
    lr_text: float = 2e-6  # of the text encoder
    lr_freeze_text: float = 5e-6  # where the UNet learns alone
    class_images: int = 200
    class_steps: int = 50  # DDIM steps for a class image
    class_guidance: float = 7.5
    sample_steps: int = 50
    guidance: float = 7.5


@dataclass(frozen=True)
class ModelInfo:
    """Our own `tinydb.json`: what the folder was taught, how to teach it more, and where it came from."""

    identifier: str | None = None  # the word that [V] stands for
    class_noun: str | None = None  # None until a subject was taught
    step: int | None = None  # training steps behind this folder
    base: dict[str, Any] = field(default_factory=dict)  # name and licence of the model it was trained from
    recipe: Recipe = Recipe()

    @classmethod
    def read(cls, path: Path) -> "ModelInfo":
        """Read `tinydb.json`; a folder without one (any other Stable Diffusion) has the defaults."""
        if not path.exists():
            return cls()
        entries = read_json(path)
        try:
            return cls(entries.get("identifier"), entries.get("class"), entries.get("step"), entries.get("base") or {},
                       Recipe(**(entries.get("recipe") or {})))
        except TypeError as error:
            raise InputError(f"{path}: recipe {error}; expected {', '.join(f.name for f in fields(Recipe))}") from None

    def to_dict(self) -> dict[str, Any]:
        """The entries of `tinydb.json`."""
        return {"identifier": self.identifier, "class": self.class_noun, "step": self.step, "base": self.base,
                "recipe": asdict(self.recipe)}


def option(default: Any, help: str, **argparse_settings: Any) -> Any:
    """A dataclass field that is also a command-line option; `argparse_settings` go to `add_argument`."""
    return field(default=default, metadata={"help": help, **argparse_settings})


class Parser(argparse.ArgumentParser):
    """A parser made from a dataclass of `option` fields, so that each default is written once.

    A field without a default is positional. Errors are one line on stderr and exit code 2.
    """

    def __init__(self, settings: type, description: str):
        super().__init__(description=description, allow_abbrev=False)
        for f in fields(settings):
            argument = dict(f.metadata)
            flag = argument.pop("flag", "--" + f.name.replace("_", "-"))
            if f.default not in (MISSING, None, "") and f.type is not bool:
                argument["help"] += " (default: %(default)s)"
            if f.default is MISSING:
                self.add_argument(f.name, **argument)
            elif f.type is bool:
                self.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=f.default,
                                  **argument)
            else:
                self.add_argument(flag, dest=f.name, default=f.default, **argument)

    def arguments(self, entries: dict[str, object], source: str) -> list[str]:
        """Options by name, as a file has them -> the command line that says the same; `source` is for the error."""
        actions = {action.dest: action for action in self._actions if action.option_strings and action.dest != "help"}
        actions |= {action.option_strings[0].lstrip("-").replace("-", "_"): action for action in actions.values()}
        arguments = []
        for key, value in entries.items():
            if key not in actions:
                nearest = difflib.get_close_matches(key, actions, n=1, cutoff=0)[0]
                raise InputError(f"{source}: no option {key!r}; the nearest is {nearest!r}")
            on, *off = actions[key].option_strings
            if isinstance(value, bool) and off:
                arguments.append(on if value else off[0])
            elif value is not None:
                arguments.append(f"{on}={value}" if on.startswith("--") else f"{on}{value}")
        return arguments

    def error(self, message: str):
        """Print one line, without the usage, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")

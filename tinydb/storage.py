"""Safetensors in and out: every tensor accounted for, memory-mapped, written whole or not at all."""

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinydb.config import InputError, PartConfig, check_file, require

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two processes on one folder are not noticed
    fcntl = None

Model = TypeVar("Model", bound=nn.Module)

MOST_PROBLEMS = 10  # that a message lists
WEIGHT_FILES = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors",
                "vae": "diffusion_pytorch_model.safetensors"}
LORA_FILE = "lora.safetensors"
HERE = re.sub(r"\W+", "-", platform.node())  # in names of temporary files: process numbers are a machine's own
BOX = Path(__file__).parent.parent / "weights"  # of the clone, with `tiny` and `tiny-clip` in it
TINY = BOX / "tiny"

# Names that older and newer programs gave to the same tensors; None drops a buffer that is no weight.
RENAMES = {
    "text_encoder": [
        (r"(?:text_model\.)?embeddings\.position_ids", None),
        (r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),
    ],
    "clip": [
        (r"(?:text|vision)_model\.embeddings\.position_ids", None),
    ],
    "vae": [
        (r"(.+\.attentions\.0)\.query\.(.+)", r"\1.to_q.\2"),
        (r"(.+\.attentions\.0)\.key\.(.+)", r"\1.to_k.\2"),
        (r"(.+\.attentions\.0)\.value\.(.+)", r"\1.to_v.\2"),
        (r"(.+\.attentions\.0)\.proj_attn\.(.+)", r"\1.to_out.0.\2"),
    ],
    "single_file": [  # the original LDM layout, all parts in one file
        (r"betas|\w*alphas_cumprod(?:_prev)?|posterior_\w+|logvar", None),  # buffers of the noise schedule
        (r"v_pred", None),  # ComfyUI's mark of a model that predicts v
        (r"model_ema\..+", None),  # a second, averaged UNet; the trained one is what diffusers and A1111 take
        (r"embedding_manager\..+", None),  # of the first DreamBooth code, which grew out of textual inversion
        (r"first_stage_model\.loss\..+", None),  # the discriminator that the VAE was trained against
        (r"cond_stage_model\.transformer\.(?:text_model\.)?embeddings\.position_ids", None),
        (r"cond_stage_model\.(?:model\.)?(?:text_projection|logit_scale|attn_mask)", None),
        (r"cond_stage_model\.transformer\.text_projection\.weight", None),
        (r"cond_stage_model\.model\.transformer\.resblocks\.23\..+", None),  # SD 2.x stops at the last but one
        (r"(cond_stage_model\.transformer)\.((?:embeddings|encoder|final_layer_norm)\..+)", r"\1.text_model.\2"),
    ],
}


def canonical_names(part: str, tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The weights among the `tensors` of a part, or of a "single_file", under their usual names; `source` is for the
    InputError where two have one."""
    weights = {}
    for name, tensor in tensors.items():
        usual = name
        for pattern, replacement in RENAMES.get(part, []):
            if match := re.fullmatch(pattern, name):
                usual = replacement and match.expand(replacement)
                break
        require(usual not in weights, f"{source}: {name} is a second tensor for {usual}; delete one of them")
        if usual is not None:
            weights[usual] = tensor
    return weights


def refuse_pointer(path: Path) -> None:
    """InputError where a file is what git-lfs leaves in its place."""
    check_file(path)
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` where it came from")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; InputError says what is wrong with a file that is not one."""
    try:
        refuse_pointer(path)
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; if there are .bin, fp16 or sharded weights in its place, run "
                         "`python convert_weights.py FOLDER NEW_FOLDER` first") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from None


def build_model(model_class: type[Model], config: PartConfig, part: str, tensors: dict[str, Tensor],
                source: Path) -> Model:
    """Build a part and fill it with `tensors`, in their own precision; `source` names them in the one InputError that
    lists every tensor that does not fit.

    The model is built on the meta device and adopts the mapped tensors, so no time goes into initial values.
    """
    state = canonical_names(part, tensors, source)
    with torch.device("meta"):
        model = model_class(config)
    check_tensors(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], source: Path) -> None:
    """InputError that lists what is missing, unexpected or of another shape among the `tensors` read from `source`."""
    problems = [f"missing {name} {tuple(shapes[name])}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors if name not in shapes]
    problems += [f"{name} is {tuple(tensors[name].shape)}, not {tuple(shapes[name])}"
                 for name in shapes if name in tensors and tensors[name].shape != shapes[name]]
    problems += [f"{name} holds {tensors[name].dtype}, not floating-point numbers"
                 for name in shapes if name in tensors and not tensors[name].is_floating_point()]
    listed = problems[:MOST_PROBLEMS] + [f"and {len(problems) - MOST_PROBLEMS} more"] * (len(problems) > MOST_PROBLEMS)
    require(not problems, f"{source}: {len(problems)} tensors do not fit the model: {'; '.join(listed)}")


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None, **metadata: str) -> None:
    """Write tensors in row-major order, whatever their device and layout in memory, and `metadata` beside them; of
    several entries, the order in the file may vary."""
    contiguous = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(contiguous, path, metadata=metadata or {"format": "pt"})  # without which older transformers refuse it
    path.chmod(mode)  # safetensors leaves files that no other user may read


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write a file or a folder to; it takes the place of `path` when all went well.

    It is on the disk before it gets its name, so not even a power cut leaves half of it under that name. Two processes
    may write the same: each has a sibling of its own, and what killed ones left is swept.
    """
    temporary = path.with_name(f".{path.name}.{HERE}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, f".{glob.escape(path.name)}")
        remove(temporary)
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            flush(written)
        if path.is_dir():
            remove(path)  # a folder cannot be renamed over another
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: could not be written ({reason}); what was there before is whole") from None
    finally:
        remove(temporary)


def has_writer(temporary: Path) -> bool:
    """Whether the process that writes a temporary file of `written_whole`, or deletes one of `remove`, may be there."""
    process = temporary.name.split(".")[-2]
    if os.name == "nt" or not process.isdecimal():  # Windows has no signal that only asks
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def sweep(folder: Path, pattern: str) -> None:
    """Delete the temporary files, under names that begin like this, of this machine's processes that are no more."""
    for temporary in [*folder.glob(f"{pattern}.{HERE}.*.tmp")]:
        with suppress(OSError):  # a network share keeps what somebody reads
            if has_writer(temporary):
                continue
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


def lock(path: Path) -> int:
    """Hold a file as the lock of its folder until this process ends, however it ends; InputError where another process
    holds it, which says who and since when. Returns the file's descriptor, never to be closed.

    The system takes the lock back, so there is no stale one. It is the process's own: forked helpers do not keep it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{path.parent}: not a folder to write in ({error.strerror}); give another --out") from None
    try:
        if fcntl:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        raise InputError(f"{path.parent} is in use by {holder or 'another process'}; wait until it ends, or give "
                         "another --out") from None
    except OSError:  # a file system without locks
        pass
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M')}".encode())
    return descriptor


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk where the file system can do that: network
    shares may not, and Windows cannot open a folder."""
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # what was written is not there
            raise


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; a folder loses its name first, so that nobody ever sees half of it."""
    if path.is_dir() and not path.is_symlink():
        nameless = path.with_name(f".{path.name}.{HERE}.old.{os.getpid()}.tmp")
        if nameless.exists():  # what a killed run of this number left
            shutil.rmtree(nameless)
        os.replace(path, nameless)
        shutil.rmtree(nameless)
    elif path.exists() or path.is_symlink():  # what a link leads to stays
        path.unlink()


def check_replaceable(folder: Path, *marks: str) -> None:
    """InputError where a folder has files in it, hidden ones aside, and none of those that mark its kind."""
    require(not any(folder.glob("[!.]*")) or any((folder / mark).exists() for mark in marks),
            f"{folder}: a folder with other files, which would be lost; give another name")


def fingerprint(folder: Path, settings: str = "") -> str:
    """A short name for the weights of a model folder together with a text; the end of each file tells apart
    models that were trained apart, but not a model and the same one with an update of other layers."""
    digest = hashlib.sha256(settings.encode())
    for part, name in WEIGHT_FILES.items():
        path = folder / part / name
        require(path.is_file(), f"{path}: no such file; expected a model folder (convert_weights.py makes one)")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written, or a preview drawn."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first; other names there are somebody else's."""
    return by_step(out / "checkpoints", "")


def by_step(folder: Path, suffix: str) -> list[Path]:
    """What a run put into a folder, oldest first: its checkpoints have no suffix, its previews ".png"."""
    pattern = r"step-\d{6,}" + re.escape(suffix)
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(pattern, path.name)), key=step_of)


def newest_state(folder: Path) -> Path:
    """What a run's folder stands for: the model in it, itself where it holds a LoRA file or, before there is either,
    its newest checkpoint. Any other folder stands for itself."""
    if (folder / "model" / "model_index.json").exists():
        return folder / "model"
    saved = [] if (folder / LORA_FILE).exists() else checkpoints(folder)
    return saved[-1] if saved else folder


def model_folder(name: str | Path) -> Path:
    """The model folder of that name, or in a run of that name. InputError where there are only low-rank updates, or
    model folders further down, as in the hub's cache."""
    folder = newest_state(Path(name))
    if not (folder / "model_index.json").exists():
        lora = folder / LORA_FILE
        require(not lora.exists(), f"{name}: a run that learnt a LoRA, which is no model by itself; merge it with "
                                   f"its model: `python convert_weights.py MODEL NEW_MODEL --lora {lora}`")
        inside = [path.parent for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/model_index.json"))]
        require(not inside, f"{folder}: not a model folder, but {', '.join(map(str, inside[:5]))} is; give that")
        require(not (folder / ".lock").exists(), f"{folder}: a run that saved nothing yet; --resume goes on with it")
    return folder


def is_tiny(path: Path) -> bool:
    """Whether a path is that of the model in the box, in this clone or in another one, which may be gone."""
    return path.parts[-2:] == TINY.parts[-2:]


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path`, or `path` itself, that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_free_disk(path: Path, needed: float, cure: str) -> None:
    """InputError if the disk on which `path` will be has fewer than `needed` bytes free."""
    home = existing_parent(path)
    free = shutil.disk_usage(home).free
    require(free > needed, f"{home} has {free / 1e6:,.0f} MB free, {path.name} needs {needed / 1e6:,.0f}; make room, "
                           f"or {cure}")

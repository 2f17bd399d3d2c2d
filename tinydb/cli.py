"""The command line: options from a dataclass, and the one place where an exception becomes a message and an exit code.

| what happened                                                            | exit code |
|--------------------------------------------------------------------------|----------:|
| all went well                                                            |         0 |
| what the user gave cannot be used, or cannot be written to               |         2 |
| the user stopped it: Ctrl-C, or Stopped after work was saved             |       130 |
| memory ran out, another process died, or a disk failed elsewhere         |         1 |

Each of the last three prints one line on stderr. A fault of this program shows its traceback.
"""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

from tinydb.config import InputError, label, read_json, require, setting

LONGEST_MESSAGE = 2000  # characters: a file may hold 20,000 tensors, and names of any length
MOST_MESSAGES = 30


class Stopped(Exception):
    """The user stopped the program. What it made is on the disk; the text says how to go on."""


def option(default: Any, help: str, **declared: Any) -> Any:
    """A dataclass field that is also a command-line option: bounds as in `config.setting`, and `flag`, `metavar` or
    `nargs` where they do not follow from its name and type. A field without a default is positional."""
    return setting(default, help=help, **declared)


class Parser(argparse.ArgumentParser):
    """A parser made from a dataclass of `option` fields, so that each default and each bound is written once."""

    def __init__(self, settings_class: type, description: str | None):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.settings_class = settings_class
        for f in fields(settings_class):
            arguments = {name: f.metadata[name] for name in ("help", "metavar", "nargs", "choices")
                         if name in f.metadata}
            types = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
            if f.default is MISSING:
                self.add_argument(f.name, **arguments, type=os.path.expanduser)
                continue
            if bool in types:
                arguments["action"] = argparse.BooleanOptionalAction
            else:
                readers = {str: os.path.expanduser, tuple[int, ...]: size}  # a shell leaves ~ as it is behind "="
                arguments["type"] = readers.get(types[0], types[0])  # int and float read themselves
            if f.default not in (None, "", False):
                arguments["help"] += " (default: %(default)s)"
            self.add_argument(label(f), dest=f.name, default=f.default, **arguments)

    def parse(self, argv: list[str], defaults: dict[str, Any] = {}) -> Any:
        """The settings that a command line gives; `defaults`, by field name, hold where it says nothing."""
        positional = {f.name for f in fields(self.settings_class) if f.default is MISSING}
        self.set_defaults(**{name: value for name, value in defaults.items() if name not in positional})
        namespace, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(no_such_option(self.settings_class, word) if word.startswith("-") else
                       f"{word!r} is not an option or its value; --help lists the options")
        given = vars(namespace)
        given |= {name: defaults[name] for name in positional & defaults.keys() if not given[name]}
        return self.settings_class(**given)

    def error(self, message: str):
        """argparse's own complaints are the user's mistakes too."""
        raise InputError(message)

    def fail(self, code: int, message: str):
        """Print one line, and exit."""
        self.exit(code, f"{self.prog}: {readable(message)}\n")


def readable(message: str) -> str:
    """A message as one line that no terminal and no log chokes on, whatever names are in it."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in message)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 2]} …"


def say(*messages: str) -> None:
    """Print messages on stderr, a line each; of very many, the first."""
    more = len(messages) - MOST_MESSAGES
    for message in messages[:MOST_MESSAGES] + ((f"... and {more} more like these",) if more > 0 else ()):
        print(readable(message), file=sys.stderr)


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])


def as_name(flag: str) -> str:
    """A flag as it is spelled in Python and in files: "--lora-scale" -> "lora_scale"."""
    return flag.lstrip("-").replace("-", "_")


def option_names(settings_class: type) -> dict[str, Field]:
    """The options, by every name that they go by in a file: that of the flag, that of the field, an older one."""
    named = {f.name: f for f in fields(settings_class)}
    named |= {as_name(label(f)): f for f in fields(settings_class)}
    return named | {f.metadata["formerly"]: f for f in fields(settings_class) if "formerly" in f.metadata}


def no_such_option(settings_class: type, name: str) -> str:
    """What to say of an option that is not there: which one has a similar name."""
    named = option_names(settings_class)
    nearest = difflib.get_close_matches(as_name(name), named, n=1, cutoff=0.67)
    if not nearest:
        return f"no option {name!r}; --help lists the options"
    f = named[nearest[0]]
    shown = label(f) if f.default is not MISSING else f"{f.name}, without a flag"
    return f"no option {name!r}; the nearest is {shown}: {f.metadata['help']}"


def options_in_file(settings_class: type, path: str) -> dict[str, Any]:
    """The options in a JSON file, by the names of their fields. A run's config.json may be older than an option:
    `before`, which the option declares, is what the run did then."""
    require(Path(path).is_file(), f"--config {path}: no such file; expected options in JSON, such as OUT/config.json")
    named, options = option_names(settings_class), {}
    entries = read_json(Path(path))
    if entries.pop("run", None) is not None:  # it is the config.json of a run
        options = {f.name: f.metadata["before"] for f in fields(settings_class) if "before" in f.metadata}
    for key, value in entries.items():
        name = as_name(key)
        require(name in named, f"{path}: {no_such_option(settings_class, key)}")
        options[named[name].name] = tuple(value) if isinstance(value, list) else value
    return options


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the best that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta", on which nothing has a value, fails as well
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"--device {name!r}: not available here ({reason}); try --device cpu") from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format "fp32", "bf16" or "fp16"; "auto" is the fastest that the device is good at."""
    if precision == "auto":
        recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if recent else "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class SteadyStream:
    """stdout or stderr that never ends the program: what cannot be written is lost, since the terminal is gone, or
    escaped, since it does not know the letter."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around what is only nice to have, such as a preview: where it fails, that is said, and the work goes on."""
    try:
        yield
    except Exception as error:
        tqdm.write(readable(f"no {name} this time: {error}"), file=sys.stderr)


def leave_processes() -> None:
    """Part from the other processes of a run, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had no memory left; PyTorch has no one class for that."""
    signs = ("out of memory", "ALLOC_FAILED", "allocate memory", "could not create a primitive")
    return any(sign in str(error) for sign in signs)


def run(main: Callable[[Any], None], settings_class: type, doc: str | None, *, out_of_memory: str,
        after_failure: str = "", defaults: Callable[[Any], dict[str, Any]] = lambda given: {}) -> None:
    """Run a script: parse the command line into settings, call `main` with them, turn exceptions into exit codes.

    `doc` is the script's docstring (None under -OO). `defaults(given)` are the options in a file that the command line
    names. `out_of_memory` and `after_failure` say what then helps.
    """
    sys.stdout, sys.stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    parser = Parser(settings_class, doc)
    try:
        given = parser.parse(sys.argv[1:])
        main(parser.parse(sys.argv[1:], defaults(given)))
        leave_processes()
    except InputError as error:
        parser.fail(2, str(error))
    except Stopped as stopped:
        leave_processes()
        parser.exit(130, f"\n{stopped}\n" if str(stopped) else None)
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
            parser.fail(2, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        parser.fail(1, f"{error}{after_failure}")
    except MemoryError as error:  # NumPy's and Pillow's
        parser.fail(1, f"{str(error) or 'no memory is left'}. {out_of_memory}")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split("\n")[:2])
            parser.fail(2, f"--compile: PyTorch could not compile the model ({reason}); leave it out, or install a C++ "
                           "compiler, and on a GPU Triton")
        elif is_out_of_memory(error):
            parser.fail(1, f"{reason}. {out_of_memory}")
        elif isinstance(error, dist.DistError) or "closed by peer" in reason or "reset by peer" in reason:
            parser.fail(1, f"another process of this run died or cannot be reached, see its own message{after_failure} "
                           f"({reason})")
        raise

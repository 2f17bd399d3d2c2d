"""The scripts in processes of their own, where the process is the point: exit codes, stderr, signals, ranks.

Each is forked from one process that has imported torch already: milliseconds, where `python train.py` costs
seconds. Nothing here may import more than the scripts do: it is all imported again there.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401, which the first step of an optimizer imports: for the forks to have it
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sample  # noqa: F401
import tinydb.data
import tinydb.storage
import train  # noqa: F401

ROOT = Path(__file__).parent.parent
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload([__name__])


def arguments(**settings: object) -> list[str]:
    """The command line of settings: resume=True, class_noun="dog" -> --resume --class=dog."""
    named = {{"class_noun": "--class"}.get(name, "--" + name.replace("_", "-")): value
             for name, value in settings.items()}
    named = {flag: value for flag, value in named.items() if value is not False}
    return [flag if value is True else f"{flag}={value}" for flag, value in named.items()]


def run_script(script: str, argv: list[str], environment: dict[str, str], output: Path,
               prepare: Callable[[], None]) -> None:
    """What the forked process does: `python SCRIPT ARGV` with stdout and stderr in files."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    prepare()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:  # what Python itself would print
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@dataclass
class Script:
    """A script that was started."""

    process: multiprocessing.Process
    output: Path

    @property
    def stderr(self) -> str:
        return (self.output / "stderr").read_text()

    @property
    def stdout(self) -> str:
        return (self.output / "stdout").read_text()

    @property
    def message(self) -> str:
        """stderr without progress bars and empty lines."""
        lines = [line.rpartition("\r")[2] for line in self.stderr.split("\n")]
        return "\n".join(line for line in lines if line.strip() and "%|" not in line)

    def wait(self) -> int:
        """The exit code; minus the signal's number for a process that was killed."""
        self.process.join(timeout=120)
        return self.process.exitcode


def nothing() -> None:
    pass


def start(output: Path, script: str, *argv: str, environment: dict[str, str] = {},
          prepare: Callable[[], None] = nothing) -> Script:
    """Start a script whose stdout and stderr go into folder `output`; `prepare` runs in its process first."""
    output.mkdir(parents=True, exist_ok=True)
    process = fork.Process(target=run_script, args=(script, argv, environment, output, prepare), daemon=True)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
        process.start()  # the first one starts the process to fork from, which has to find this file
    return Script(process, output)


def start_ranks(world: int, output: Path, *argv: str, others: Sequence[str] = (),
                prepare: Callable[[], None] = nothing) -> list[Script]:
    """train.py as torchrun starts it, once for each rank; all but the first also have the arguments `others`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = [{**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(i), "LOCAL_RANK": str(i)}
             for i in range(world)]
    return [start(output / rank["RANK"], "train.py", *argv, *(others if i else ()), environment=rank, prepare=prepare)
            for i, rank in enumerate(ranks)]


def limit_file_size(limit: int) -> None:
    """Writing beyond this many bytes of any file fails, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def raise_out_of_memory() -> None:
    """The first step finds the memory full."""
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee the documentation")

    register_optimizer_step_pre_hook(fail)


def kill_at_file(name: str, count: int) -> None:
    """The process is killed when it has begun to write the `count`-th safetensors file of that name."""
    def save_file(tensors: dict, path: Path, **options: object) -> None:
        nonlocal count
        count -= path.name == name
        if count == 0:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        original(tensors, path, **options)

    original, tinydb.storage.save_file = tinydb.storage.save_file, save_file


def slow_disk(rank: str, seconds: float) -> None:
    """One rank waits that long for each file to be on the disk."""
    if os.environ["RANK"] == rank:
        os.fsync = lambda descriptor: time.sleep(seconds)


def turn_pictures(rank: str) -> None:
    """One rank finds other pictures than the rest, as on a disk of its own."""
    if os.environ["RANK"] == rank:
        fit = tinydb.data.fit
        tinydb.data.fit = lambda image, size: fit(image, size).rotate(180)

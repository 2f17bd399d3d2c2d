"""Converting from the hub, against a server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import edit_tensors
from safetensors.torch import load_file, save_file

import tinydb
from convert_weights import CLIP_REPO

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Repositories (id -> folder), what is closed (id or file -> status, error code), and what was asked of them."""

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.closed = repositories, {}
        self.drop = set()  # files whose connection breaks once, after three quarters
        self.sent = []  # (file, first byte) of every content that was sent

    @property
    def files(self) -> list[str]:
        return sorted({name for name, _ in self.sent})


class Answer(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes: a repository's commit, its list of files, and a file or its metadata."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, content: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.removeprefix("/api/models").split("?")[0]
        repo, call, name = re.fullmatch(r"/([\w-]+/[\w-]+)(?:/(revision|tree|resolve)/\w+/?(.*))?", path).groups()
        folder = self.server.repositories.get(repo)
        if repo in self.server.closed and (call == "resolve" or self.server.closed[repo][1] != "GatedRepo"):
            status, code = self.server.closed[repo]
            self.reply(status, X_Error_Code=code)
        elif folder is None:
            self.reply(404, X_Error_Code="RepoNotFound")
        elif call != "resolve":
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            tree = [{"type": "file", "path": file, "oid": etag(path), "size": path.stat().st_size}
                    for file, path in files.items()]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            self.reply(200, json.dumps(tree if call == "tree" else info).encode())
        elif name in self.server.closed:
            self.reply(self.server.closed[name][0])
        elif (folder / name).is_file():
            self.file(folder / name, name)
        else:
            self.reply(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def file(self, path: Path, name: str) -> None:
        content = path.read_bytes()
        first = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{etag(path)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.server.sent.append((name, first))
        if self.command == "GET" and name in self.server.drop:
            self.server.drop.remove(name)
            self.reply(200, content[: len(content) * 3 // 4], len(content), **headers)
            self.close_connection = True
        else:
            self.reply(206 if first else 200, content[first:], **headers)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(pairs, tmp_path) -> Hub:
    """One model, with the other copies of the weights that real repositories hold, and CLIP's tokenizer."""
    folder = Path(shutil.copytree(pairs("sd1").folder, tmp_path / "hub" / "model"))
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin",
                 "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
                 "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model.safetensors",
                 "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"another copy")
    server = Hub({"me/model": folder})
    for name, file in (("lora", "pytorch_lora_weights.safetensors"), ("empty", "model_index.json")):
        server.repositories[f"me/{name}"] = tmp_path / "hub" / name
        (tmp_path / "hub" / name).mkdir()
        (tmp_path / "hub" / name / file).write_bytes(b"{}")
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def convert(hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command with an empty cache and this hub."""
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache"),
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.run([sys.executable, str(ROOT / "convert_weights.py"), *arguments], cwd=tmp_path,
                              env={**kept, **own, **environment}, capture_output=True, text=True, timeout=120)
    return run


def test_download(hub, convert, pairs, tmp_path):
    """What is needed is fetched, and nothing else; a broken connection is resumed; a second run, and one offline,
    fetch nothing more."""
    hub.drop = {UNET}
    # in double precision it is longer than the 10 MB that huggingface_hub writes at once
    edit_tensors(hub.repositories["me/model"] / UNET, lambda tensors: {k: v.double() for k, v in tensors.items()})
    done = convert("me/model", "first")
    assert done.returncode == 0, done.stderr
    assert [first > 0 for name, first in hub.sent if name == UNET] == [False, True]
    assert hub.files == sorted([
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "unet/config.json", UNET, "vae/config.json", VAE])
    tensors, expected = load_file(tmp_path / "first" / UNET), pairs("sd1").sd.unet.state_dict()
    assert all(tensor.equal(expected[name].double()) for name, tensor in tensors.items())

    hub.sent.clear()
    assert convert("me/model", "second").returncode == 0
    offline = convert("me/model", "third.safetensors", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0
    assert hub.sent == []
    tinydb.load(tmp_path / "second")


def test_weights_beside_the_folders_are_not_those_of_a_part(hub, convert):
    """Some repositories have a single file of all parts under the name of the text encoder's."""
    folder = hub.repositories["me/model"]
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    torch.save(tensors, folder / "text_encoder" / "pytorch_model.bin")
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert convert("me/model", "out").returncode == 0


def test_shards(hub, convert, pairs, tmp_path):
    """All of one set, and none of another."""
    folder = hub.repositories["me/model"] / "unet"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for path in folder.glob("*model*"):
        path.unlink()
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
        (folder / shard.replace(".safetensors", ".bin")).write_bytes(b"another copy")
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("me/model", "out").returncode == 0
    assert [name for name in hub.files if name.startswith("unet/")] == [
        "unet/config.json", *(f"unet/{shard}" for shard in shards),
        "unet/diffusion_pytorch_model.safetensors.index.json"]
    written = load_file(tmp_path / "out" / UNET)
    assert all(written[name].equal(tensor) for name, tensor in tensors.items())


def test_interrupted_download_continues(hub, convert, tmp_path):
    """Finished files are not fetched again after a run that failed in the middle of one."""
    hub.closed = {VAE: (403, "")}
    failed = convert("me/model", "out")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr and not (tmp_path / "out").exists()
    assert "run this again" in failed.stderr.splitlines()[-1]
    fetched = set(hub.files)
    hub.closed.clear()
    hub.sent.clear()
    assert convert("me/model", "out").returncode == 0
    assert UNET in fetched and VAE in hub.files and not fetched & set(hub.files)


@pytest.mark.parametrize("repo, closed, reason", [
    ("me/missing", None, "no such model on the hub"), ("../typo", None, "no such file or folder here"),
    ("me/private", (401, "RepoNotFound"), "hf auth login"),
    ("me/gated", (403, "GatedRepo"), "accept its terms on https://huggingface.co/me/gated"),
    ("me/lora", None, "without model_index.json"), ("me/empty", None, "no weights of the text_encoder"),
    ("me/broken", (500, "Oops"), "the hub did not give it"),
])
def test_closed_repositories(hub, convert, tmp_path, repo, closed, reason):
    """One line that says what to do."""
    if closed:
        hub.closed[repo] = closed
        hub.repositories[repo] = hub.repositories["me/model"]
    failed = convert(repo, "out")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and repo in failed.stderr and reason in failed.stderr, failed.stderr
    assert not (tmp_path / "out").exists() and hub.sent == []


def test_no_network(convert, tmp_path):
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        failed = convert("me/model", "out", **environment)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "me/model" in failed.stderr, failed.stderr


def test_clip_with_one_file_for_both_processors(hub, convert, small_clip, tmp_path):
    """As transformers has written them since 5."""
    folder = Path(shutil.copytree(small_clip, tmp_path / "hub" / "clip"))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    hub.repositories["me/clip"] = folder
    done = convert("me/clip", "out")
    assert done.returncode == 0, done.stderr
    assert tinydb.load_clip(tmp_path / "out").side == 32


def test_tokenizer_from_the_hub(hub, convert, pairs, tmp_path):
    """Of CLIP's repository only the vocabulary is asked for."""
    clip, folder = tmp_path / "hub" / "clip", tmp_path / "without"
    pairs("sd1").sd.tokenizer.save(clip)
    (clip / "pytorch_model.bin").write_bytes(b"a whole CLIP")
    hub.repositories[CLIP_REPO] = clip
    shutil.copytree(pairs("sd1").folder, folder, ignore=shutil.ignore_patterns("tokenizer"))
    assert convert("without", "out").returncode == 0
    assert hub.files == ["merges.txt", "vocab.json"]
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_bytes() == (clip / "vocab.json").read_bytes()

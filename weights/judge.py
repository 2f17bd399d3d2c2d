"""A judge of what the model in the box draws: a small classifier that says what a picture of the world shows.

    python weights/judge.py    # train it (20 minutes on two cores) into weights/judge.safetensors, and test it

It learns from scenes with captions and from things in colours and markings that no caption names, drawn by world.py
as they are needed, so it never sees a picture twice. The subjects are not among them. A quarter of the pictures go
through the model's autoencoder, with noise on their latents: it must read a hoop that is drawn as the model draws.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import tinydb
from tinydb import cli
from tinydb.config import Checked
from tinydb.pictures import to_pixels
from tinydb.storage import read_tensors, save_tensors, written_whole
from tinydb.vae import AutoencoderKL
from world import (COLORS, MARKINGS, NOUNS, PLACES, SIZE, TOPPERS, Look, Scene, compose, sample_scene,
                   scene_look)

FILE = Path(__file__).parent / "judge.safetensors"
ATTRIBUTES = {"noun": NOUNS, "color": tuple(COLORS), "pattern": tuple(MARKINGS), "place": PLACES,
              "topper": ("nothing", *TOPPERS)}
UNKNOWN = -100  # the class that cross_entropy ignores: a colour that has no name
STEPS, BATCH = 3000, 48
DECODED = BATCH // 4  # pictures of a batch that the autoencoder draws


class Judge(nn.Module):
    """Pixels (B, 3, S, S) in [-1, 1] -> logits of each attribute; pictures of another size are scaled to SIZE."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 128, 160)
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()) for a, b in zip(widths, widths[1:])))
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], len(values)) for name, values in ATTRIBUTES.items()})
        self.colors = nn.Linear(widths[-1], 6)  # learnt beside, so that features tell colours without a name apart

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 160): what the heads look at."""
        return self.layers(F.interpolate(pixels, size=SIZE, mode="area")).mean((2, 3))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """-> logits (B, values) by attribute."""
        return self.logits(self.features(pixels))

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """(B, 160) -> logits (B, values) by attribute."""
        return {name: head(features) for name, head in self.heads.items()}


def load_judge() -> Judge:
    """The judge in the box."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in read_tensors(FILE).items()})
    return judge.requires_grad_(False)


def sample_thing(rng: np.random.Generator) -> tuple[Scene, Look, int]:
    """A scene, how its thing looks, and the index of its colour. Half of the things look as no caption can say; their
    colour is UNKNOWN."""
    scene = sample_scene(rng, held_out=bool(rng.random() < 0.5))
    look, color = scene_look(scene, rng), list(COLORS).index(scene.color)
    if rng.random() < 0.5:  # a thing that no caption names
        main, accent, mark, collar = (tuple(int(value) for value in rng.integers(256, size=3)) for _ in range(4))
        look = Look(main, accent, mark, rng.choice(ATTRIBUTES["pattern"]), rng.choice([None, *TOPPERS]),
                    collar if rng.random() < 0.5 else None, int(rng.integers(2)))
        color = UNKNOWN
    return scene, look, color


def draw_example(rng: np.random.Generator) -> tuple[Image.Image, list[int], np.ndarray]:
    """A picture, the index of each attribute's value, and the colours (2, 3) in [0, 1] of the thing and its marks."""
    scene, look, color = sample_thing(rng)
    shown = [NOUNS.index(scene.noun), color, ATTRIBUTES["pattern"].index(look.marking), PLACES.index(scene.place),
             ATTRIBUTES["topper"].index(look.topper or "nothing")]
    return compose(scene.noun, look, scene.place, rng), shown, np.array([look.main, look.mark], np.float32) / 255


def draw_batch(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (count, 3, SIZE, SIZE), attributes (count, 5) and colours (count, 2, 3)."""
    images, shown, colors = zip(*(draw_example(rng) for _ in range(count)))
    return to_pixels(images), torch.tensor(shown), torch.from_numpy(np.stack(colors))


@torch.no_grad()
def redraw(pixels: Tensor, vae: AutoencoderKL, rng: np.random.Generator) -> Tensor:
    """Pixels (B, 3, S, S) as the autoencoder draws them from latents with noise on them, up to half of their spread."""
    with torch.autocast("cpu", torch.bfloat16):
        latents, _ = vae.encode(pixels)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        return vae.decode(latents + 0.5 * rng.random() * noise).float().clamp(-1, 1)


def loss_of(judge: Judge, pixels: Tensor, shown: Tensor, colors: Tensor) -> Tensor:
    """Cross entropy of the attributes, and the squared error of the colours (of marks only where there are any)."""
    features = judge.features(pixels)
    error = (judge.colors(features).view(-1, 2, 3) - colors).square().mean(2)
    error[:, 1] *= shown[:, 2] > 0
    logits = judge.logits(features).values()
    return sum(F.cross_entropy(values, shown[:, i]) for i, values in enumerate(logits)) + 10 * error.mean()


def soften(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurred and noisy by chance, as the pictures of a small model are."""
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)).to(pixels.device)
    blurred = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    chosen = torch.from_numpy(rng.random((len(pixels), 1, 1, 1)) < 0.5).to(pixels.device)
    return torch.where(chosen, blurred, pixels) + 0.1 * rng.random() * noise


@torch.no_grad()
def errors(judge: Judge, count: int = 1000) -> dict[str, float]:
    """Share of errors in each attribute, in percent, on pictures with captions that training did not draw."""
    rng = np.random.default_rng(1)
    pixels, shown, _ = draw_batch(count, rng)
    logits = judge(pixels)
    named = shown[:, 1] != UNKNOWN
    return {name: 100 * (values.argmax(1) != shown[:, i])[named].float().mean().item()
            for i, (name, values) in enumerate(logits.items())}


@dataclass(frozen=True)
class Settings(Checked):
    """The command line, which has no options."""


def main(settings: Settings) -> None:
    torch.manual_seed(0)
    judge, sd = Judge(), tinydb.load(FILE.parent / "tiny")
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    rng = np.random.default_rng(0)
    progress = tqdm(range(STEPS), "teaching the judge")
    for step in progress:
        pixels, shown, colors = draw_batch(BATCH, rng)
        pixels[:DECODED] = redraw(pixels[:DECODED], sd.vae, rng)
        loss = loss_of(judge, soften(pixels, rng), shown, colors)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    with written_whole(FILE) as temporary:
        save_tensors({name: tensor.half() for name, tensor in judge.state_dict().items()}, temporary)
    for name, error in errors(load_judge()).items():
        print(f"{name:8} {error:.1f}% wrong")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="It needs some 2 GB")

"""Train the CLIP in the box from nothing, on the world of world.py: pictures and captions meet in one space.

    python weights/pretrain_clip.py                                      # runs/pretrain-clip, then weights/tiny-clip
    python weights/pretrain_clip.py --things 99 --steps 9 --out runs/try-clip --result runs/tiny-clip

The same command continues a run that was interrupted. A picture should lie near the captions that are true of it
(arXiv 2103.00020), and near another picture of the same thing in another place, so that likeness tells things apart
that no caption names. With u and v unit vectors and t a temperature that is learnt, the loss of a batch is

    - 1/2 mean_i ( sum_j true_ij log softmax_j(u_i . v_j / t) / sum_j true_ij ),  and the same with i and j exchanged

where true_ij says whether caption j is true of picture i: of several that are, each counts. Each thing of a batch has a
twin there that differs in its marking alone, or colours would be enough to tell things apart.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinydb import cli
from tinydb.cli import choose_device, option
from tinydb.clip import CLIPModel, normalize
from tinydb.config import Checked, CLIPConfig, TextConfig, VisionConfig
from tinydb.pictures import to_images, to_pixels
from tinydb.pipeline import load
from tinydb.scores import CLIP
from tinydb.storage import written_whole
from tinydb.tokenizer import BOS, EOS, CLIPTokenizer
from judge import UNKNOWN, redraw, sample_thing, soften
from pretrain import by_all_cores, train
from world import COLORS, MARKINGS, NOUNS, PATTERNS, PLACES, PREFIXES, SIZE, compose, phrase, render, sample_scene

VISION = VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                      image_size=SIZE, patch_size=16, hidden_act="gelu")
TEXT = TextConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3,
                  max_position_embeddings=32, hidden_act="gelu")
REDRAWN_SHARE = 0.4  # of the pictures go through the autoencoder, to look like those that a model draws
DIMENSIONS = 96
UNNAMED = -1  # in place of the index of a value: the caption does not say
NAMED_SHARE = 0.7  # how often a caption says a colour, a pattern, a place


@dataclass(frozen=True)
class Settings(Checked):
    """The command line."""

    out: str = option("runs/pretrain-clip", "folder of pictures and checkpoints")
    result: str = option(str(Path(__file__).parent / "tiny-clip"), "CLIP folder to write at the end")
    things: int = option(20_000, "things to draw, each in two places", least=2)
    steps: int = option(1000, "steps of training", least=1)
    batch: int = option(128, "things a step, in two pictures each", least=2)
    lr: float = option(2e-3, "learning rate", above=0)
    seed: int = option(0, "decides everything random", least=0)
    device: str = option("auto", "cpu, cuda, mps, ... or auto")


def draw_twins(number: int, seed: int) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Two things that differ in their marking alone, each in two places: pictures (2, 2, SIZE, SIZE, 3), and of each
    what a caption can say of it, an index for each attribute: noun, colour (UNKNOWN where it has no name), pattern,
    place, and whether it wears a red hat."""
    rng = np.random.default_rng([seed, number])
    scene, first, color = sample_thing(rng)
    others = [name for name in (MARKINGS if color == UNKNOWN else PATTERNS) if name != first.marking]
    images, shown = [], []
    for look in (first, replace(first, marking=rng.choice(others))):
        for place in rng.choice(len(PLACES), 2, replace=False):
            if rng.random() < 0.3:  # it stays what it is with another hat
                look = replace(look, topper=rng.choice([None, "red hat"]))
            images.append(np.asarray(compose(scene.noun, look, PLACES[place], rng)))
            shown.append([NOUNS.index(scene.noun), color, list(MARKINGS).index(look.marking), int(place),
                          int(look.topper == "red hat")])
    return np.stack(images).reshape(2, 2, SIZE, SIZE, 3), [shown[:2], shown[2:]]


def draw_things(count: int, seed: int, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, 2, SIZE, SIZE, 3) and what they show (count, 2, 5), drawn by all cores, made to look more like
    those that a model draws, and kept in OUT. Things 2 i and 2 i + 1 are twins."""
    path = out / f"things-{seed}-{count}.npz"
    if not path.exists():
        images, shown = zip(*by_all_cores(partial(draw_twins, seed=seed), count // 2, "drawing things"))
        images, shown = np.concatenate(images), np.concatenate(shown)
        vae, rng = load(Path(__file__).parent / "tiny").vae, np.random.default_rng(seed)
        flat = images.reshape(-1, SIZE, SIZE, 3)
        for i in tqdm(range(0, len(flat), 64), "as a model draws them"):
            pixels = to_pixels(flat[i : i + 64])
            chosen = torch.from_numpy(rng.random(len(pixels)) < REDRAWN_SHARE)
            if chosen.any():
                pixels[chosen] = redraw(pixels[chosen], vae, rng)
            pixels = soften(pixels, rng).clamp(-1, 1)
            flat[i : i + 64] = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, shown=shown)
    with np.load(path) as file:
        return file["images"], file["shown"]


def describe(shown: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A caption that is true of a picture, and what it says. Names of things always, a hat where there is one, the rest
    by chance; a colour or a marking that has no name never."""
    noun, color, pattern, place, hat = shown
    says = rng.random(3) < NAMED_SHARE
    named = (noun, color if says[0] and color != UNKNOWN else UNNAMED,
             pattern if says[1] and pattern < len(PATTERNS) else UNNAMED, place if says[2] else UNNAMED, hat)
    words = [names[i] if i != UNNAMED else "" for names, i in zip((NOUNS, list(COLORS), PATTERNS, PLACES), named)]
    text = PREFIXES[rng.integers(len(PREFIXES))] + phrase(*words, bool(hat))
    return text.removeprefix("a ").removeprefix("an ") if rng.random() < 0.5 else text, np.array(named)


def contrast(similarity: Tensor, true: Tensor) -> Tensor:
    """The loss above, of similarities (N, M) over the temperature, and of which pairs are true (N, M)."""
    loss = 0
    for logits, right in ((similarity, true), (similarity.T, true.T)):
        loss = loss - (F.log_softmax(logits, dim=1) * right / right.sum(1, keepdim=True).clamp(min=1)).sum(1).mean() / 2
    return loss


def loss_of(model: nn.ModuleDict, clip: CLIP, images: np.ndarray, shown: np.ndarray, batch: int) -> Tensor:
    """Pictures against captions, and each thing's first picture against its second."""
    rng = np.random.default_rng(torch.initial_seed())
    twins = rng.integers(len(images) // 2, size=batch // 2)
    chosen = np.concatenate([2 * twins, 2 * twins + 1])
    pictures = torch.from_numpy(images[chosen]).flatten(0, 1).permute(0, 3, 1, 2)  # (2 * batch, 3, SIZE, SIZE)
    device = model["clip"].logit_scale.device
    pixels = pictures.to(device) / 127.5 - 1
    facts = shown[chosen].reshape(-1, 5)
    captions, said = zip(*(describe(each, rng) for each in facts))
    said = np.stack(said)
    true = ((said[None] == UNNAMED) | (said[None] == facts[:, None])).all(2)  # (pictures, captions)
    ids = clip.tokenizer.encode(list(captions))
    ids = ids[:, : int(ids.argmax(1).max()) + 1].to(device)  # padding changes nothing that comes before it

    u = model["clip"].image_features(normalize(pixels)).float()
    v = model["clip"].text_features(ids).float()
    scales = torch.stack([model["clip"].logit_scale, model["likeness"].weight[0, 0]]).clamp(max=4.6).exp()
    first, second = u.view(len(chosen), 2, -1).unbind(1)
    with torch.autocast(device.type, enabled=False):
        return (contrast(scales[0] * u @ v.T, torch.from_numpy(true).float().to(device))
                + contrast(scales[1] * first @ second.T, torch.eye(len(chosen), device=device)))


@torch.no_grad()
def answers(clip: CLIP, count: int = 1000, seed: int = 1) -> dict[str, float]:
    """How often the caption that is nearest to a picture says what it shows, in percent by attribute: of captions that
    differ in it alone, on scenes that training did not draw."""
    rng = np.random.default_rng([seed, 10**6])
    scenes = [sample_scene(rng, held_out=bool(rng.random() < 0.5)) for _ in range(count)]
    features = clip.images([render(scene, rng) for scene in scenes])
    choices = {"noun": [f"a photo of {phrase(noun)}" for noun in NOUNS],
               "color": [f"a photo of {phrase('{}', color)}" for color in COLORS],
               "pattern": [f"a photo of {phrase('{}', pattern=pattern)}" for pattern in PATTERNS],
               "place": [f"a photo of {phrase('{}', place=place)}" for place in PLACES],
               "hat": [f"a photo of {phrase('{}', hat=hat)}" for hat in (False, True)]}
    right = {}
    for name, captions in choices.items():
        texts = torch.stack([clip.text([text.format(noun) for text in captions]) for noun in NOUNS])  # (nouns, M, D)
        own = texts[[NOUNS.index(scene.noun) for scene in scenes]]
        seen = (own @ features[:, :, None])[:, :, 0].argmax(1)
        truth = [{"noun": NOUNS.index(s.noun), "color": list(COLORS).index(s.color),
                  "pattern": PATTERNS.index(s.pattern), "place": PLACES.index(s.place), "hat": int(s.hat)}[name]
                 for s in scenes]
        right[name] = 100 * (seen == torch.tensor(truth)).float().mean().item()
    return right


@torch.no_grad()
def found_again(clip: CLIP, images: np.ndarray) -> float:
    """How often the second picture of a thing is, of all second pictures, the nearest to its first; in percent."""
    first, second = (clip.images(to_images(torch.from_numpy(images[:, i]).permute(0, 3, 1, 2) / 127.5 - 1))
                     for i in (0, 1))
    return 100 * ((first @ second.T).argmax(1) == torch.arange(len(images))).float().mean().item()


def main(settings: Settings):
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.device)
    images, shown = draw_things(settings.things, settings.seed, out)
    unseen, _ = draw_things(256, settings.seed + 1, out)
    tokenizer = CLIPTokenizer.read(Path(__file__).parent / "tiny" / "tokenizer")
    torch.manual_seed(settings.seed)
    bos, eos = tokenizer.vocab[BOS], tokenizer.vocab[EOS]
    text_config = replace(TEXT, vocab_size=len(tokenizer.vocab), bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    config = CLIPConfig(text_config, VISION, DIMENSIONS)
    clip = CLIP(CLIPModel(config), tokenizer)
    for name, parameter in clip.model.named_parameters():
        if "embedding" in name and "patch" not in name:
            nn.init.normal_(parameter, std=0.1)
    likeness = nn.Linear(1, 1, bias=False)
    nn.init.constant_(likeness.weight, config.logit_scale_init_value)
    model = nn.ModuleDict({"clip": clip.model, "likeness": likeness}).to(device)

    def preview(average: nn.ModuleDict) -> str:
        shown = CLIP(average["clip"], tokenizer)
        right = ", ".join(f"{name} {value:.1f}" for name, value in answers(shown).items())
        return f"right: {right}; things found again among {len(unseen)}: {found_again(shown, unseen):.1f}"

    def loss(model: nn.ModuleDict) -> Tensor:
        return loss_of(model, clip, images, shown, settings.batch)

    average = train("clip", model, loss, settings.steps, settings.lr, settings.seed, out, preview)
    CLIP(average["clip"], tokenizer).save(settings.result, torch.float16)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, out_of_memory="Try a smaller --batch; the same command continues")

"""A CLIP folder to ask: how well pictures fit prompts, and one another; and which checkpoint of a run is the best."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tinydb.cli import extra, say
from tinydb.clip import MEAN, STD, CLIPModel, preprocess
from tinydb.config import CLIPConfig, read_json, require, write_json
from tinydb.data import read_pictures
from tinydb.prompts import class_prompt, without_subject
from tinydb.report import sample_command
from tinydb.run import Run, config_around
from tinydb.storage import BOX, build_model, check_replaceable, read_tensors, save_tensors, written_whole
from tinydb.tokenizer import EOS, PLACEHOLDER, CLIPTokenizer

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of transformers up to 4, and since 5
BATCH = 16  # pictures or prompts at once
WEIGHTS = {"CLIP text": 4, "CLIP image": 1}  # of the scores of a picture, in Ranking
TINY_NAME = "tinydb world model"  # the base of the model in the box, and of what was taught to it

NO_CLIP = "no --clip (`python convert_weights.py openai/clip-vit-base-patch32 weights/clip` makes a folder for it)"

Score = dict[str, float]  # cosines: "likeness", to the subject's pictures; "prompt", to that without the identifier


@dataclass
class CLIP:
    """The model, and what makes ids of prompts. `load_clip` opens one."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @property
    def side(self) -> int:
        """Pixels along a side of what the image encoder sees."""
        return self.model.config.vision_config.image_size

    @torch.inference_mode()
    def text(self, prompts: list[str]) -> Tensor:
        """B prompts -> unit vectors (B, D), on the CPU in float32. What is too long is cut off."""
        ids = self.tokenizer.encode(prompts).to(self.model.logit_scale.device)
        return torch.cat([self.model.text_features(part) for part in ids.split(BATCH)]).float().cpu()

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> Tensor:
        """B RGB pictures of any size -> unit vectors (B, D), on the CPU in float32."""
        like = self.model.logit_scale  # its device, its precision
        parts = [preprocess(pictures[i : i + BATCH], self.side).to(like) for i in range(0, len(pictures), BATCH)]
        return torch.cat([self.model.image_features(pixels) for pixels in parts]).float().cpu()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessor open as well; `dtype` None
        leaves each tensor as it is. InputError where the folder has files in it that are no CLIP."""
        check_replaceable(Path(folder), *PROCESSORS)
        with written_whole(Path(folder)) as path:
            self.tokenizer.save(path)
            write_json(path / "config.json", self.model.config.to_dict())
            write_json(path / "preprocessor_config.json", {
                "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": self.side},
                "resample": 3, "do_center_crop": True, "crop_size": {"height": self.side, "width": self.side},
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN,
                "image_std": STD, "do_convert_rgb": True})
            save_tensors(self.model.state_dict(), path / "model.safetensors", dtype)


def load_clip(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CLIP:
    """Open a transformers `CLIPModel` folder: OpenAI's, ours, or any with the same preprocessing.

    Raises InputError, one line with the cure, where the folder is not one or is damaged.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: not a folder; expected a CLIP (convert_weights.py makes one)")
    config = CLIPConfig.read(folder / "config.json")
    clip = build_clip(folder, config, read_tensors(folder / "model.safetensors"))
    clip.model.to(device, dtype)
    return clip


def build_clip(folder: Path, config: CLIPConfig, tensors: dict[str, Tensor]) -> CLIP:
    """The CLIP of `tensors`, in their own precision, with the tokenizer in `folder`."""
    check_preprocessing(folder, config.vision_config.image_size)
    tokenizer, text = CLIPTokenizer.read(folder), config.text_config
    require(tokenizer.max_length <= text.max_position_embeddings
            and tokenizer.vocab[EOS] == max(tokenizer.vocab.values()) < text.vocab_size,
            f"{folder}: tokenizer and text encoder do not fit; copy both from one CLIP")
    return CLIP(build_model(CLIPModel, config, "clip", tensors, folder), tokenizer)


def check_preprocessing(folder: Path, side: int) -> None:
    """InputError where the files of a CLIP whose pictures have `side` pixels say that they are prepared in another way
    than `preprocess` does."""
    ours = {"image_mean": [[*MEAN]], "image_std": [[*STD]], "resample": [3], "do_center_crop": [True],
            "size": [side, {"shortest_edge": side}], "crop_size": [side, {"height": side, "width": side}]}
    for path in (folder / name for name in PROCESSORS if (folder / name).exists()):
        settings = read_json(path)
        settings = settings.get("image_processor", settings)
        require(isinstance(settings, dict), f"{path}: image_processor: expected an object of settings")
        for name, usual in ours.items():  # a setting, and the ways to write ours
            value = settings.get(name, usual[0])
            require(value in usual, f"{path}: {name} {value!r} is not supported, only {usual[0]!r}; give a CLIP whose "
                                    "pictures are prepared as OpenAI's are")


class Scorer:
    """The prompts whose pictures show how far a run is, and what CLIP says of these pictures, where there is one."""

    def __init__(self, clip: CLIP | None, pictures: list[Image.Image], class_noun: str):
        subject = f"{PLACEHOLDER} {class_noun}"
        self.clip, self.class_noun = clip, class_noun
        self.prompts = [f"a photo of {subject}", f"{subject} on the moon", f"{subject} under the sea",
                        f"{subject} wearing a red hat", f"a red {subject}", f"a blue {subject}",
                        class_prompt(class_noun)]
        if clip is None:
            say(f"{NO_CLIP}: checkpoints are not scored, and none is recommended")
            return
        self.subject = clip.images(pictures)
        self.text = clip.text([without_subject(prompt) for prompt in self.prompts[:-1]])
        self.own_fit = (self.subject @ self.text.T).mean().item()  # of the subject's own pictures to the prompts
        require(math.isfinite(self.own_fit), "--clip: its weights hold NaN or infinity; convert it again")

    def note(self, scores: dict[str, Score], step: int, images: list[Image.Image]) -> Score:
        """Add to the scores of all steps the means of CLIP-I and CLIP-T (arXiv 2208.12242, section 4.3) over a step's
        pictures, one for each of `prompts`, and return them. Of the red and the blue one, which should not look like
        the subject's pictures, only the fit to the prompt counts; the last, of the class, is for the eye alone. Empty
        without a CLIP, or without pictures.
        """
        if self.clip is None or not images:
            return {}
        with extra("score"):
            features = self.clip.images(images[:-1])
            scores[str(step)] = {"likeness": (features[:-2] @ self.subject.T).mean().item(),
                                 "prompt": (features * self.text).sum(1).mean().item()}
        return scores.get(str(step), {})

    def best_step(self, scores: dict[str, Score], run: Run) -> int | None:
        """The last of the run's checkpoints whose learnt^5 kept comes within 6 % of the largest so far (less is noise),
        else the one that has most, as a step; None where there is no choice:

            learnt = how much more similar its pictures are to the subject's than those of step 0, before training
            kept   = how much better its pictures fit the prompts than the subject's own pictures do

        The fifth power is there because CLIP sees little of what is learnt last: a thing with the subject's colours but
        without its markings has nine tenths of "learnt" already. `scores` of all steps so far.
        """
        if self.clip is None or "0" not in scores:
            return None
        before = scores["0"]["likeness"]
        merits = {int(step): max(score["likeness"] - before, 0) ** 5 * max(score["prompt"] - self.own_fit, 0)
                  for step, score in scores.items()}
        there = [step for step in merits if run.checkpoint(step).exists()]
        if len(there) < 2:
            return None
        enough = 0.94 * max(merits.values())  # maybe that of a deleted checkpoint: without it the bar would sink
        good = [step for step in there if merits[step] >= enough]
        return max(good, default=max(there, key=merits.get))

    def advice(self, scores: dict[str, Score], run: Run, last: int) -> str:
        """What to say after the `last` step of a run: the best one, where it is another, and how to sample it."""
        best = self.best_step(scores, run)
        if best is None or str(last) not in scores or not run.checkpoint(last).exists():
            return ""
        if best == last:
            return "By CLIP, no earlier checkpoint is better than this.\n\n"
        numbers = ", ".join(f"{name} {value:.3f} (step {last}: {scores[str(last)][name]:.3f})"
                            for name, value in scores[str(best)].items())
        return (f"By CLIP, step {best} is the best: {numbers}. Compare:\n\n"
                f"    {sample_command(run.checkpoint(best), self.class_noun)}\n\n")


class Ranking:
    """How well pictures fit a prompt, "CLIP text", and where it asks for a subject whose pictures are known, how like
    them they are, "CLIP image": the cosines that papers call CLIP-T and CLIP-I."""

    def __init__(self, clip: CLIP, prompt: str, subject: list[Image.Image]):
        self.clip, self.text = clip, clip.text([without_subject(prompt)])
        self.subject = clip.images(subject) if subject else None
        self.scores: list[dict[str, float]] = []  # of the pictures so far

    def score(self, images: list[Image.Image]) -> list[dict[str, float]]:
        """The scores of pictures, which are remembered in this order."""
        features = self.clip.images(images)
        scores = [{"CLIP text": value} for value in (features @ self.text[0]).tolist()]
        if self.subject is not None:
            for score, value in zip(scores, (features @ self.subject.T).mean(1).tolist()):
                score["CLIP image"] = value
        self.scores += scores
        return scores

    def best(self) -> list[int]:
        """The pictures, best first, by the sum of the scores, each in deviations from its mean over the pictures. The
        fit to the prompt counts four times: where a prompt changes the subject, the more similar pictures are those
        that did not follow it."""
        merit = torch.zeros(len(self.scores))
        for name in self.scores[0]:
            values = torch.tensor([score[name] for score in self.scores])
            deviations = (values - values.mean()) / values.std(correction=0).clamp(min=1e-6)
            merit += WEIGHTS[name] * deviations
        return merit.argsort(descending=True, stable=True).tolist()


def subject_pictures(model: Path, size: int) -> list[Image.Image]:
    """The pictures that a model was taught from, where the run that it lies in names them and they are still there."""
    images = config_around(model).get("images")
    there = isinstance(images, str) and Path(images).is_dir()
    return list(read_pictures(Path(images), size)[0].values()) if there else []


def choose_clip(folder: str | None, base: dict[str, str]) -> CLIP | None:
    """The CLIP in `folder` or, where none is given, that of the box for a model whose `base` is in the box."""
    if folder is None and base.get("name") == TINY_NAME and (BOX / "tiny-clip").exists():
        folder = str(BOX / "tiny-clip")
    return None if folder is None else load_clip(folder)

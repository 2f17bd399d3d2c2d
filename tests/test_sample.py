"""sample.py: the pictures, where they go, what they say of themselves, and what it answers to bad input."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, UNET, VAE, difference, edit_json, edit_tensors, files, names, refusal
from PIL import Image, ImageOps
from processes import limit_file_size, start
from safetensors.torch import load_file, save_file
from torch import Tensor

import sample
import tinydb
from tinydb.attention import AttentionMaps, heat_map
from tinydb.cli import Parser
from tinydb.pictures import grid, save_png
from tinydb.scores import Ranking


@pytest.fixture
def draw(nano, tmp_path, one_thread):
    """sample.py in this process: draw(prompt, **settings) -> pictures, by path below tmp_path."""
    def run(prompt: str, **settings) -> dict[str, Image.Image]:
        given = {"weights": str(nano), "out": str(tmp_path / "out"), "device": "cpu", "count": 1, **settings}
        before = set(tmp_path.rglob("*.png"))
        sample.main(sample.Settings(prompt=[prompt], **given))
        return {str(path.relative_to(tmp_path)): Image.open(path)
                for path in sorted(set(tmp_path.rglob("*.png")) - before)}
    return run


def taught(folder: Path, nano: Path, **notes) -> Path:
    """A model folder that says it was taught a dog under the word `zwx`."""
    shutil.copytree(nano, folder)
    edit_json(folder / "tinydb.json", **{"identifier": "zwx", "class": "dog", **notes})
    return folder


# -------------------------------------------------------------------------------------- the best by CLIP


def test_best_of_many_are_kept_and_say_their_scores(draw, small_clip, tmp_path, capsys):
    """The pictures are those of the seeds; the others go, and the grid shows the best first."""
    drawn = draw("the dog", count=6, out=str(tmp_path / "all"))
    everything = [image for path, image in drawn.items() if "grid" not in path]
    capsys.readouterr()
    kept = draw("the dog", count=6, best=2, clip=str(small_clip))
    printed = capsys.readouterr()
    clip = tinydb.load_clip(small_clip)
    scores = (clip.images(everything) @ clip.text(["the dog"])[0]).tolist()
    first, second = sorted(range(6), key=lambda i: -scores[i])[:2]
    paths = [path for path in printed.out.split() if "grid" not in path]
    assert [str(Path(path).relative_to(tmp_path)) for path in paths] == [
        f"out/000{i}-the-dog.png" for i in (first, second)]
    assert sorted(kept) == sorted([*(f"out/000{i}-the-dog.png" for i in (first, second)),
                                   f"out/000{first}-the-dog-grid.png"])
    best = kept[f"out/000{first}-the-dog.png"]
    assert difference([best], [everything[first]]) == 0
    assert f"CLIP text: {scores[first]:.4f}" in best.info["parameters"]
    assert printed.err.count("CLIP text ") == 2
    again = sample.settings_in_picture(sample.Settings(prompt=[], source=paths[0]))
    assert again["seed"] == str(first) and "not taken over" not in capsys.readouterr().err


def test_the_subject_counts_by_its_pictures_with_lora(draw, teach, small_clip, tmp_path):
    """Also where another file is added, which says of no subject that it was taught it."""
    out = teach(tmp_path / "run", lora=2, steps=1)
    mine, other = out / "lora.safetensors", tmp_path / "other.safetensors"
    save_file(load_file(mine), other)
    for given in ({"weights": str(out)}, {"lora": str(mine)}, {"lora": f"{mine},{other}"}, {"lora": f"{other},{mine}"}):
        [kept] = draw("[V] dog", count=2, best=1, clip=str(small_clip), **given).values()
        assert "CLIP image: " in kept.info["parameters"]


def test_pictures_of_a_folder_are_ranked_by_the_subject_too(draw, teach, photos, small_clip, tmp_path, capsys):
    model = teach(tmp_path / "run", steps=1) / "model"
    capsys.readouterr()
    draw("[V] dog", among=str(photos), clip=str(small_clip), weights=str(model))
    rows = capsys.readouterr().out.splitlines()[:-1]
    assert len(rows) == 3 and all("CLIP text " in row and "CLIP image " in row for row in rows)


def test_the_best_one_gets_the_name_that_was_asked_for(draw, small_clip, tmp_path):
    name = str(tmp_path / "out" / "cover.png")
    kept = draw("the dog", count=3, best=1, clip=str(small_clip), attention=True, out=name)
    assert sorted(kept) == ["out/cover-attention.png", "out/cover.png"]


class Axes:
    """A CLIP whose pictures are their own vectors."""

    side = 8

    def text(self, prompts: list[str]) -> Tensor:
        self.asked = prompts
        return torch.tensor([[1.0, 0.0, 0.0]] * len(prompts))

    def images(self, pictures: list) -> Tensor:
        return torch.tensor(pictures)


def test_the_prompt_counts_four_times():
    """However far each score spreads; [V] is not asked of the prompt; likeness is the mean over the subject's."""
    clip = Axes()
    ranking = Ranking(clip, "[V] dog at night", [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert clip.asked == ["dog at night"]
    scores = ranking.score([[0.9, 0.02, 0.0], [0.88, 0.05, 0.05], [0.1, 0.03, 0.03], [0.7, 0.05, 0.05]])
    assert [score["CLIP image"] for score in scores] == pytest.approx([0.01, 0.05, 0.03, 0.05])
    assert ranking.best() == [1, 0, 3, 2]


@pytest.mark.parametrize("prompt, asked", [
    ("[V] dog", "dog"), ("[V]'s hat", "hat"), ("a photo of [V], a dog", "a photo of a dog"),
    ("a [V]'s hat on a [V] dog", "a hat on a dog"), ("a photo of a [V]dog", "a photo of a dog"), ("a cat", "a cat")])
def test_what_clip_is_asked_of_a_prompt(prompt, asked):
    """All of it but [V], which it does not know."""
    clip = Axes()
    Ranking(clip, prompt, [])
    assert clip.asked == [asked]


def test_the_subject_counts_by_its_pictures(draw, teach, small_clip, tmp_path, capsys):
    """Where the run still knows where they are."""
    model = teach(tmp_path / "run", steps=1) / "model"
    settings = {"weights": str(model), "count": 3, "best": 1, "clip": str(small_clip)}
    [kept] = draw("[V] dog", **settings).values()
    assert "CLIP text: " in kept.info["parameters"] and "CLIP image: " in kept.info["parameters"]
    [kept] = draw("a dog", **settings).values()
    assert "CLIP image: " not in kept.info["parameters"]
    for prompt, asks in (("a photo of OHWX dog", True), ("an ohwxy dog", False)):  # the identifier written out
        [kept] = draw(prompt, **settings).values()
        assert ("CLIP image: " in kept.info["parameters"]) == asks
    edit_json(tmp_path / "run" / "config.json", images=str(tmp_path / "moved"))
    capsys.readouterr()
    [kept] = draw("[V] dog", **settings).values()
    assert "CLIP image: " not in kept.info["parameters"]
    assert "only the rest of the prompt is compared" in capsys.readouterr().err


def test_pictures_of_a_folder_are_ranked(draw, nano, small_clip, photos, tmp_path, capsys):
    """Nothing is drawn; what is no picture is named, and so are sheets, which are told by what they say."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_text("no picture")
    (folder / "0.png").rename(folder / "holiday-series.png")
    drawn = draw("a cat", count=2, attention=True, preview=1, out=str(tmp_path / "drawn"))
    for path in drawn:
        name = Path(path).name.replace("0000-a-cat-grid", "a favourite")
        (tmp_path / path).rename(folder / name)
    capsys.readouterr()
    [sheet] = draw("the dog", among=str(folder), clip=str(small_clip)).values()
    printed = capsys.readouterr()
    *rows, last = printed.out.splitlines()
    ranked = [row.split("\t") for row in rows]
    clip = tinydb.load_clip(small_clip)
    pictures, _ = tinydb.data.read_pictures(folder, 128)
    pictures = {name: pictures[name] for name in ("0000-a-cat.png", "0001-a-cat.png", "1.png", "2.png",
                                                  "holiday-series.png")}
    scores = dict(zip(pictures, (clip.images(list(pictures.values())) @ clip.text(["the dog"])[0]).tolist()))
    assert [Path(path).name for path, _ in ranked] == sorted(scores, key=lambda name: -scores[name])
    assert [score for _, score in ranked] == [f"CLIP text {value:.3f}" for value in sorted(scores.values())[::-1]]
    assert Path(last).name == "0000-best-of-the-dog.png" and sheet.width == 4 * 128
    assert "broken.png is skipped" in printed.err and re.findall("(.+) is left out: a sheet", printed.err) == [
        "0000-a-cat-attention.png", "0001-a-cat-attention.png", "a favourite.png", "preview.png"]
    sample.main(sample.Settings(prompt=["the dog", "a cat"], weights=str(nano), among=str(folder), clip=str(small_clip),
                                out=str(tmp_path / "two"), device="cpu"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "0000-best-of-the-dog.png", "0001-best-of-a-cat.png"]


@pytest.mark.parametrize("arguments, words", [
    (["-n", "3", "--best", "4"], "--best 4: more than the 3 pictures that are drawn; give a larger -n"),
    (["--best", "0"], "--best 0: expected 1 or more"),
    (["--best", "2"], "no --clip"),
    (["--best", "2", "--clip", "nothing"], "nothing: not a folder; expected a CLIP"),
    (["--best", "2", "--clip", "empty"], "config.json: no such file"),
    (["--among", "empty", "--clip", "CLIP"], "--among empty: no picture in it"),
    (["--among", "nothing", "--clip", "CLIP"], "nothing: not a folder; expected one with pictures in it"),
    (["--among", "empty"], "no --clip"),
    (["--among", "empty", "--clip", "CLIP", "--weights", "empty"], "empty: not a model folder; give another --weights"),
], ids=str)
def test_what_cannot_be_ranked_is_refused(command, nano, small_clip, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    arguments = [str(small_clip) if each == "CLIP" else each for each in arguments]
    code, out, err = command("sample.py", "the dog", "--weights", str(nano), "--device", "cpu", *arguments)
    assert (code, out) == (2, "") and words in err.splitlines()[-1] and not (tmp_path / "samples").exists()


# -------------------------------------------------------------------------------------- what is drawn


def test_picture_is_the_one_that_the_model_draws(draw, nano):
    [picture] = draw("a red cat", steps=4, guidance_scale=3.0, seed=5, negative="the dog").values()
    sd = tinydb.load(nano)
    [expected] = sd.generate("a red cat", steps=4, guidance_scale=3.0, seed=5, negative="the dog")
    assert difference([picture], [expected]) == 0


def test_same_command_gives_the_same_picture_bit_for_bit(draw):
    first, second = [list(draw("a dog", count=2).values()) for _ in range(2)]
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"steps": 5}, {"guidance_scale": 1.0}, {"negative": "cat"}, {"sampler": "dpm"},
], ids=lambda change: next(iter(change)))
def test_every_option_counts(draw, change):
    [picture], [other] = draw("a dog").values(), draw("a dog", **change).values()
    assert difference([picture], [other]) > 0


def test_steps_and_guidance_are_the_recipes(draw):
    [picture], [same] = draw("a dog").values(), draw("a dog", steps=3, guidance_scale=2.0).values()
    assert difference([picture], [same]) == 0


def test_picture_i_has_seed_plus_i(draw):
    """In the second group of four too."""
    pictures = draw("a dog", count=6, seed=7)
    [alone] = draw("a dog", seed=12).values()
    assert difference([pictures["out/0005-a-dog.png"]], [alone]) <= 1
    assert difference([pictures["out/0001-a-dog.png"]], [alone]) > 4


def test_placeholder_is_the_word_that_the_folder_was_taught(draw, nano, tmp_path):
    weights = str(taught(tmp_path / "taught", nano))
    [picture], [same], [other] = [draw(prompt, weights=weights).values()
                                  for prompt in ("[V] dog", "zwx dog", "ohwx dog")]
    assert difference([picture], [same]) == 0 < difference([picture], [other])


@pytest.mark.parametrize("size, expected", [(None, (16, 16)), ((24, 16), (24, 16)), ((16, 32), (16, 32))])
def test_size_is_width_times_height(draw, size, expected):
    assert [image.size for image in draw("a dog", size=size).values()] == [expected]


# ----------------------------------------------------------------------------------- where it is written


def test_folder_is_numbered_on(draw, tmp_path):
    """Nothing is overwritten, and the file is named after the prompt."""
    assert list(draw("[V] dog, on!", count=2)) == [
        "out/0000-V-dog-on-grid.png", "out/0000-V-dog-on.png", "out/0001-V-dog-on.png"]
    assert list(draw("a cat")) == ["out/0002-a-cat.png"]
    assert list(draw("x" * 200)) == [f"out/0003-{'x' * 60}.png"]
    [path] = draw("𠮷" * 70)  # a name has 255 bytes, and each of these letters four
    assert re.fullmatch("out/0004-𠮷{20,60}.png", path)
    (tmp_path / "out" / "10000-a-dog.png").touch()
    assert list(draw("a dog")) == ["out/10001-a-dog.png"]


def test_out_may_name_the_picture(draw, tmp_path):
    assert list(draw("a cat", out=str(tmp_path / "new" / "cat.png"))) == ["new/cat.png"]
    draw("a cat", out=str(tmp_path / "CAT.PNG"))
    assert (tmp_path / "CAT.PNG").is_file()


def test_out_that_names_a_picture_names_the_grid_of_several(draw, tmp_path):
    pictures = draw("a cat", out=str(tmp_path / "cat.png"), count=2)
    assert list(pictures) == ["cat-0.png", "cat-1.png", "cat.png"]
    first, second, sheet = pictures.values()
    assert difference([sheet], [grid([first, second], 2, ["a cat", ""])]) == 0


@pytest.mark.parametrize("option", ["--init", "--from"])
def test_the_picture_that_is_drawn_from_is_not_overwritten(command, nano, tmp_path, option):
    given = ["--weights", str(nano), "--device", "cpu"]
    assert command("sample.py", "a dog", "-n", "1", "--out", "cat.png", *given)[0] == 0
    before = (tmp_path / "cat.png").read_bytes()
    for out in ("cat.png", str(tmp_path / "cat.png")):
        code, _, error = command("sample.py", "a cat", "-n", "1", option, "./cat.png", "--out", out, *given)
        assert code == 2 and f"--out {out}: would overwrite a picture of {option}" in error.splitlines()[-1]
    (tmp_path / "fox-1.png").write_bytes(before)
    code, _, error = command("sample.py", "a fox", "-n", "3", option, "fox-1.png", "--out", "fox.png", *given)
    assert code == 2 and f"--out fox.png: would overwrite a picture of {option}" in error.splitlines()[-1]
    assert {content for content in files(tmp_path).values()} == {before}
    (tmp_path / "fox-1.png").unlink()
    code, _, error = command("sample.py", "a cat", "-n", "1", option, "cat.png", "--out", "dog.png", *given)
    assert code == 0 and names(tmp_path) == ["cat.png", "dog.png"], error


@pytest.mark.parametrize("init, given", [
    ("out/preview.png", ["--preview", "1", "--out", "out"]),
    ("cat-preview.png", ["--preview", "1", "--out", "cat.png"]),
    ("cat-attention.png", ["--attention", "--out", "cat.png"]),
    ("cat-1-attention.png", ["-n2", "--attention", "--out", "cat.png"]),
])
def test_what_is_shown_beside_a_picture_does_not_overwrite_it_either(command, nano, tmp_path, init, given):
    (tmp_path / init).parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(tmp_path / init)
    code, _, error = command("sample.py", "a cat", "-n1", f"--weights={nano}", "--device=cpu", "--init", init, *given)
    assert code == 2 and "would overwrite a picture of --init" in error
    assert list(files(tmp_path)) == [init]


def test_sheet_has_no_heat_maps_to_overwrite(command, nano, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "cat-attention.png")
    before = files(tmp_path)
    code, _, error = command("sample.py", "a cat", "-n2", f"--weights={nano}", "--device=cpu", "--attention",
                             "--init", "cat-attention.png", "--out", "cat.png")
    assert code == 0 and before.items() <= files(tmp_path).items(), error


def test_picture_that_is_moved_meanwhile_ends_nothing(draw, small_clip, tmp_path, monkeypatch, capsys):
    """There is no sheet with it, and it cannot be deleted any more."""
    save = sample.save_png

    def moved(image, path, text):
        save(image, path, text)
        if path.name == "0001-a-dog.png":
            path.rename(tmp_path / "mine.png")

    monkeypatch.setattr(sample, "save_png", moved)
    draw("a dog", count=2)
    assert "no sheet this time" in capsys.readouterr().err and names(tmp_path / "out") == ["0000-a-dog.png"]
    draw("a dog", count=2, best=1, clip=str(small_clip), out=str(tmp_path / "best"))


def test_sheet_that_was_asked_for_by_name_is_missed(draw, tmp_path, monkeypatch):
    save = sample.save_png

    def fail(image, path, text):
        if path.name == "cat.png":
            raise OSError(28, "No space left on device")
        save(image, path, text)

    monkeypatch.setattr(sample, "save_png", fail)
    assert "no sheet; the pictures are beside it" in refusal(draw, "a cat", count=2, out=str(tmp_path / "cat.png"))
    assert names(tmp_path) == ["cat-0.png", "cat-1.png"]


def test_picture_of_among_is_not_overwritten(command, nano, small_clip, photos, tmp_path):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    before = files(folder)
    code, _, error = command("sample.py", "a dog", f"--weights={nano}", f"--clip={small_clip}", f"--among={folder}",
                             f"--out={folder}/0.png")
    assert code == 2 and "would overwrite a picture of --among" in error and files(folder) == before


@pytest.mark.parametrize("text, sheet", [
    ("2 pictures of: a dog", True), ("a dog\nSteps: 7, Seed: 1", False), ("Greetings", True),
    ('{"sui_image_params": {"prompt": "a dog", "steps": 20}}', False)])
def test_what_is_a_sheet(tmp_path, text, sheet):
    """Told from a picture by what it says; SwarmUI writes JSON."""
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", text)
    assert sample.is_sheet(tmp_path / "a.png") == sheet


@pytest.mark.parametrize("more, said", [("", True), (", Hires upscale: 2", False)])
def test_a1111_says_strength_of_its_second_pass_too(draw, tmp_path, capsys, more, said):
    """Which is no picture that was drawn over."""
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", f"a dog\nSteps: 7, Denoising strength: 0.4{more}")
    sample.settings_in_picture(sample.Settings(prompt=[], source=str(tmp_path / "a.png")))
    assert ("was drawn over a picture" in capsys.readouterr().err) == said


def test_series_of_many_prompts_has_no_sheet(command, nano, tmp_path):
    code, out, error = command("sample.py", *["a cat"] * 17, "-n1", "--steps=1", f"--weights={nano}", "--device=cpu")
    assert code == 0 and len(out.split()) == 17 and "series" not in out, error


def test_the_best_of_many_leave_earlier_pictures_alone(draw, small_clip, tmp_path):
    """Of the same names, which are those of what is drawn on the way."""
    (tmp_path / "cat-1.png").write_bytes(b"earlier")
    settings = {"count": 3, "best": 1, "clip": str(small_clip)}
    assert "--best would overwrite" in (text := refusal(draw, "a cat", out=str(tmp_path / "cat.png"), **settings))
    assert "cat-1.png" in text and "cat-0.png" not in text
    assert files(tmp_path) == {"cat-1.png": b"earlier"}
    assert list(draw("a cat", out=str(tmp_path / "dog.png"), **settings)) == ["dog.png"]
    assert "cat.png" in draw("a cat", out=str(tmp_path / "cat.png"), **{**settings, "count": 1})


@pytest.mark.parametrize("option", ["--init", "--among"])
def test_empty_name_is_refused(command, nano, option):
    """As of a shell's variable that is not set."""
    code, _, error = command("sample.py", "a dog", "--weights", str(nano), "--device", "cpu", option, "")
    assert code == 2 and f"{option}: empty" in error


@pytest.mark.parametrize("prompt, marked", [
    ("a (red:1.3) dog", "(red:1.3)"),
    ("a dog (at 10:30)", None), ("a dog <lora:style:0.8>", "<lora:style:0.8>"), ("a dog (a red one)", None)])
def test_weights_of_another_program_in_a_prompt_are_words(draw, capsys, prompt, marked):
    draw(prompt)
    assert ("is read as words" in (error := capsys.readouterr().err)) == bool(marked) and (marked or "") in error


@pytest.mark.parametrize("prompts, count, sheets", [
    (["a cat"], 41, [(512, 10 * 128)]), (["a cat", "a dog"], 17, [(512, 5 * 128)] * 2),
])
def test_sheets_of_many_pictures_stay_small(command, nano, tmp_path, prompts, count, sheets):
    code, out, error = command("sample.py", *prompts, f"-n{count}", "--steps=1", f"--weights={nano}", "--device=cpu")
    drawn = [Image.open(path).size for path in out.split()]
    assert code == 0 and drawn.count((16, 16)) == count * len(prompts), error
    assert [(width, height - height % 128) for width, height in drawn if width > 16] == sheets


def test_paths_are_printed(draw, capsys, tmp_path):
    pictures = draw("a dog", count=2)
    assert sorted(capsys.readouterr().out.split()) == sorted(str(tmp_path / path) for path in pictures)


def test_picture_says_how_it_was_made(draw, nano, tmp_path):
    weights = str(taught(tmp_path / "taught", nano))
    settings = {"count": 2, "seed": 3, "negative": "blurry", "size": (24, 16)}
    sheet, _, second = draw("[V] dog", weights=weights, **settings).values()
    assert second.text["parameters"] == (
        "zwx dog\nNegative prompt: blurry\n"
        "Steps: 3, Sampler: DDIM, CFG scale: 2.0, Seed: 4, Size: 24x16, "
        f"Model: {weights}, RNG: CPU, Template: [V] dog")
    assert "2 pictures of: [V] dog" in sheet.text["parameters"]
    [other] = draw("a dog", sampler="dpm", guidance_scale=1.5, guidance_stop=0.5, steps=2).values()
    assert "Steps: 2, Sampler: DPM++ 2M, CFG scale: 1.5, Guidance stop: 0.5, Seed: 0" in other.text["parameters"]


# ------------------------------------------------------------------------------------ to watch and to look into


def test_preview_is_what_the_model_predicts_on_the_way(draw, nano, monkeypatch):
    """Every so many steps the same file, and the pictures are the same as without."""
    seen, save = [], sample.save_png
    monkeypatch.setattr(sample, "save_png", lambda image, *rest: (seen.append(image), save(image, *rest)))
    pictures = draw("a dog", steps=5, preview=2)
    assert list(pictures) == ["out/0000-a-dog.png", "out/preview.png"]
    sd = tinydb.load(nano)
    predictions = [grid(sd.decode(clean), 1) for _, clean in sd.denoise("a dog", steps=5)]
    assert difference(seen[:2], [predictions[1], predictions[3]]) == 0 and len(seen) == 3
    assert difference([pictures["out/preview.png"]], [predictions[3]]) == 0
    assert difference([pictures["out/0000-a-dog.png"]], draw("a dog", steps=5).values()) == 0


def test_preview_beside_a_picture_that_is_named(draw, tmp_path):
    assert list(draw("a dog", preview=1, out=str(tmp_path / "cat.png"))) == ["cat-preview.png", "cat.png"]


def test_attention_sheet(draw, nano, capsys):
    """Beside each picture, which is the same without, a map for each word: where the UNet looks at its tokens most."""
    pictures = draw("[V] dog", attention=True, count=2)
    assert list(pictures) == ["out/0000-V-dog-attention.png", "out/0000-V-dog-grid.png", "out/0000-V-dog.png",
                              "out/0001-V-dog-attention.png", "out/0001-V-dog.png"]
    assert sum(line.endswith("-attention.png") for line in capsys.readouterr().out.split()) == 2
    plain = draw("[V] dog", count=2)
    assert difference([pictures["out/0001-V-dog.png"]], [plain["out/0003-V-dog.png"]]) == 0
    sd = tinydb.load(nano)
    with AttentionMaps(sd.unet, 2) as maps:
        images = sd.generate(["[V] dog"] * 2)
    expected = [images[1], *(heat_map(images[1], maps.mean()[1, tokens].mean(0)) for _, tokens in sd.words("[V] dog"))]
    sheet = pictures["out/0001-V-dog-attention.png"]
    assert difference([sheet], [grid(expected, 3, ["", "[V]", "dog"])]) <= 1 and sheet.size == (3 * 128, 128 + 24)


def test_heat_map():
    """Hot where the values are large, over the picture in grey; values that are all the same have no hot place."""
    values = torch.zeros(4, 4)
    values[3, 3] = 5.0
    heat = np.asarray(heat_map(Image.new("RGB", (64, 64), (100, 0, 0)), values)).astype(int)
    assert heat[63, 63].min() > heat[0, 0].max() > 0 and heat[0, 0].tolist() == [heat[0, 0, 0]] * 3
    assert np.asarray(heat_map(Image.new("RGB", (64, 64)), torch.ones(4, 4))).max() == 0


# ------------------------------------------------------------- several prompts, and drawing on from pictures


def read(*arguments: str) -> sample.Settings:
    """The settings of a command line."""
    parser = Parser(sample.Settings, "")
    given = parser.parse(list(arguments))
    return parser.parse(list(arguments), sample.settings_in_picture(given))


def test_series_has_the_same_noise_for_each_prompt(command, nano, tmp_path):
    """And comes on a sheet, a row for each prompt, under the prompt."""
    given = ["-n", "2", "--weights", str(nano), "--device", "cpu", "--guidance", "1"]
    (tmp_path / "a.txt").write_text("the cat\n")
    code, out, error = command("sample.py", "a dog", "--prompts", "a.txt", *given)
    assert code == 0, error
    paths = [tmp_path / line for line in out.split()]
    assert [path.name for path in paths] == [
        "0000-a-dog.png", "0001-a-dog.png", "0000-a-dog-grid.png", "0002-the-cat.png", "0003-the-cat.png",
        "0002-the-cat-grid.png", "0004-series.png"]
    *_, sheet = pictures = [Image.open(path) for path in paths]
    pairs = [grid(pictures[i : i + 2], 2, [prompt, ""]) for i, prompt in ((0, "a dog"), (3, "the cat"))]
    assert difference([sheet.crop((0, 0, sheet.width, sheet.height // 2))], pairs[:1]) == 0
    assert difference([sheet.crop((0, sheet.height // 2, sheet.width, sheet.height))], pairs[1:]) == 0
    seeds = [re.search(r"Seed: (\d+)", pictures[i].text["parameters"])[1] for i in (0, 1, 3, 4)]
    assert seeds == ["0", "1", "0", "1"]


def test_the_sheet_of_a_folder_may_have_a_name(command, nano, small_clip, photos, tmp_path):
    given = ["--weights", str(nano), "--clip", str(small_clip), "--out", "best.png"]
    assert command("sample.py", "the dog", "--among", str(photos), *given)[0] == 0
    assert (tmp_path / "best.png").exists() and not (tmp_path / "best-0.png").exists()


def test_lines_of_a_file_are_prompts(tmp_path):
    """Of other programs too: with a byte order mark, and other line ends."""
    (tmp_path / "a.txt").write_text("\ufeffa dog\r\n\r\n# birds\n the [v]  cat", encoding="utf-8", newline="")
    settings = read("a bird", "--prompts", str(tmp_path / "a.txt"), "--seed", "3")
    assert sample.read_prompts(settings) == ["a bird", "a dog", "the [V] cat"]


@pytest.mark.parametrize("name, text, words", [
    ("a.txt", "# a dog\n", ["a.txt: empty"]), ("none.txt", None, ["none.txt", "no such file"]),
    ("a.jsonl", '{"prompt": "a dog", "seed": 4}', ["a.jsonl", "a JSON file", "on each line"]),
], ids=str)
def test_file_of_prompts_that_cannot_be_used(command, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, out, error = command("sample.py", "--prompts", str(tmp_path / name))
    assert code == 2 and out == "" and error.count("\n") == 1
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("options", [
    {"negative": "the dog", "seed": 5, "steps": 4, "size": (24, 16)},
    {"sampler": "dpm", "guidance_scale": 1.5}, {"guidance_stop": 0.5},
], ids=lambda options: next(iter(options)))
def test_picture_is_drawn_again_from_what_it_says(draw, tmp_path, options):
    [(path, first)] = draw("a dog, on the moon", **options).items()
    again = read("--from", str(tmp_path / path), "--device", "cpu", "--out", str(tmp_path / "again"))
    settings = {name: value for name, value in vars(again).items() if name != "prompt"}
    assert difference([first], draw(*again.prompt, **settings).values()) == 0
    other = read("a cat", "--from", str(tmp_path / path), "--seed", "9")
    assert (other.prompt, other.seed, other.negative) == (["a cat"], 9, again.negative)


def test_number_format_that_was_given_is_the_pictures(draw, tmp_path):
    """Where sample.py chose it, the next one chooses again."""
    [(path, first)] = draw("a dog", precision="bf16").items()
    assert "Precision: bf16" in first.text["parameters"]
    again = read("--from", str(tmp_path / path))
    assert again.precision == "bf16"
    assert difference([first], draw("a dog", precision=again.precision).values()) == 0
    [(path, plain)] = draw("a dog").items()
    assert "Precision" not in plain.text["parameters"] and difference([first], [plain]) > 0
    assert read("--from", str(tmp_path / path)).precision == "auto"


def test_lines_of_a_file_go_by_the_picture_of_the_command_line(draw, nano, tmp_path):
    [first] = [str(tmp_path / path) for path in draw("a dog", seed=5, negative="a cat")]
    (tmp_path / "a.txt").write_text("a bird\na house")
    settings = read("--from", first, "--prompts", str(tmp_path / "a.txt"))
    assert sample.read_prompts(settings) == ["a bird", "a house"]
    assert (settings.seed, settings.negative, settings.weights) == (5, "a cat", str(nano))


@pytest.mark.parametrize("file, value", [(UNET, float("nan")), (VAE, float("inf")), (TEXT, float("nan"))])
def test_weights_that_are_no_numbers_draw_no_black_picture(command, nano, tmp_path, file, value):
    shutil.copytree(nano, tmp_path / "damaged")
    edit_tensors(tmp_path / "damaged" / file, lambda tensors: {n: tensor * value for n, tensor in tensors.items()})
    code, out, error = command("sample.py", "a dog", "--weights", "damaged", "--device", "cpu")
    assert code == 2 and out == "" and "NaN or infinity" in error.splitlines()[-1] and not list(tmp_path.rglob("*.png"))


def test_names_from_strangers_are_printed_safely(command, nano, photos, tmp_path):
    """No terminal obeys them, and of thousands one reads the first."""
    taught(tmp_path / "taught", nano, **{"class": "\x1b[2Jdog\r\n"})
    _, _, error = command("sample.py", "[V] cat", "--weights", "taught", "--device", "cpu", "-n", "1")
    assert "\x1b" not in error and "does not ask for your \\x1b[2Jdog" in error
    shutil.copytree(photos, tmp_path / "many")
    for i in range(1000):
        (tmp_path / "many" / f"a\x1b[31m{i}").touch()
    _, _, error = command("train.py", "--images=many", "--class=dog", f"--weights={nano}", "--out=run", "--steps=1",
                          "--device=cpu", "--prior-weight=0")
    assert "\x1b" not in error and error.count("not a picture") == 29
    assert "memory in GB" in error and "971 more like these" in error


def write_text(path: Path, text: str) -> Path:
    save_png(Image.new("RGB", (8, 8)), path, text)
    return path


@pytest.mark.parametrize("text, expected, told", [
    ("a dog\nNegative prompt: cat\nSteps: 7, Sampler: Euler a, CFG scale: 6.5, Seed: 9, Eta: 0.6, Size: 512x768, "
     "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Version: v1.10.1\n",
     {"negative": "cat", "guidance_scale": 6.5, "seed": 9, "size": (512, 768)},
     ["Sampler Euler a, Eta 0.6, ", "Model hash", "Model v1-5-pruned-emaonly", "Version"]),
    ("Negative prompt: cat\nSteps: 7, Sampler: DDIM, Eta DDIM: 0.0, RNG: CPU", {"prompt": [""]}, []),
    ("a dog\nSteps: 7, Sampler: DPM++ 2M, Schedule type: Karras, RNG: NV", {"sampler": "dpm"},
     ["Schedule type Karras", "RNG NV"]),
    ("a dog\nSteps: 7, Denoising strength: 0.4", {"strength": 0.4}, ["--init"]),
    ("a dog\nSteps: 7, Odd: \x1b[2J" + 5000 * "x", {}, ["Odd \\x1b[2J"]),
], ids=["A1111", "empty prompt", "dpm", "img2img", "control characters"])
def test_picture_of_another_program(tmp_path, capsys, text, expected, told):
    """What it says is taken over, and what cannot be is told."""
    settings = read("--from", str(write_text(tmp_path / "a.png", text)))
    expected = {"prompt": ["a dog"], "steps": 7, "sampler": "ddim", "weights": None,
                "guidance_stop": 1.0, **expected}
    assert {name: getattr(settings, name) for name in expected} == expected
    said = capsys.readouterr().err
    assert [words for words in told if words not in said] == [] and len(said) < 1500 and bool(said) == bool(told)


@pytest.mark.parametrize("typed", ["[V] dog", "[v] dog, [V]", "a dög", 'a "red" [V]: 3, \\ 4'])
def test_what_was_typed_comes_back(draw, nano, tmp_path, typed):
    """Though the picture has the identifier in it, as other programs must."""
    weights = str(taught(tmp_path / "taught", nano))
    [path] = draw(typed, weights=weights, negative="no [V]")
    text = Image.open(tmp_path / path).text["parameters"]
    understood = typed.replace("[v]", "[V]")
    assert text.startswith(f"{understood.replace('[V]', 'zwx')}\nNegative prompt: no zwx\nSteps: ")
    settings = read("--from", str(tmp_path / path))
    assert (settings.prompt, settings.negative, settings.weights) == ([understood], "no [V]", weights)


def test_picture_that_says_nothing_of_itself(command, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    for name in ("plain.png", "none.png", "huge.png"):
        code, _, error = command("sample.py", "--from", str(tmp_path / name))
        assert code == 2 and error.count("\n") == 1 and name in error


def test_drawing_over_a_picture(draw, nano, tmp_path):
    """It is cut to the size of the drawing, and the file says what was done."""
    Image.radial_gradient("L").convert("RGB").resize((120, 60)).save(tmp_path / "init.png")
    options = {"init": str(tmp_path / "init.png"), "size": (24, 16), "guidance_scale": 2.0}
    [picture] = draw("a dog", strength=0.5, steps=4, **options).values()
    init = ImageOps.fit(Image.open(tmp_path / "init.png"), (24, 16), Image.Resampling.LANCZOS)
    [expected] = tinydb.load(nano).generate("a dog", init=init, strength=0.5, steps=4, guidance_scale=2.0)
    assert difference([picture], [expected]) == 0
    assert "Denoising strength: 0.5, " in picture.text["parameters"] and "Init: " in picture.text["parameters"]


# -------------------------------------------------------------------------------------- which model


def test_newest_finished_run_is_sampled(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["b", "c", "a"]):
        folder = taught(Path("runs") / name / "model", nano)
        os.utime(folder / "model_index.json", (10**9, 10**9 + i))
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    assert sample.newest_model() == Path("runs/a/model")


def test_run_that_was_stopped_stands_for_its_newest_checkpoint(draw, nano, tmp_path):
    for step in (2, 10):
        taught(tmp_path / "run" / "checkpoints" / f"step-{step:06d}", nano, step=step)
    [picture] = draw("[V] dog", weights=str(tmp_path / "run")).values()
    assert "step-000010" in picture.text["parameters"]


def test_the_model_in_the_box_is_sampled_where_nothing_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.newest_model() == ROOT / "weights" / "tiny"


def test_says_which_model_and_what_it_was_taught(draw, nano, tmp_path, capsys):
    weights = str(taught(tmp_path / "taught", nano))
    draw("[V] dog", weights=weights)
    first = capsys.readouterr().err.split("\n")[0]
    assert weights in first and "[V] is a dog" in first


# ---------------------------------------------------------------------------------------- warnings


def test_warns_where_no_subject_was_taught(draw, nano, capsys):
    draw("[V] dog")
    assert f"{nano} was taught no subject, so [V], read as 'ohwx', means nothing to it" in capsys.readouterr().err
    draw("a dog")
    assert "means nothing" not in capsys.readouterr().err


@pytest.mark.parametrize("prompt, shows", [
    ("[V] dog in the garden", True), ("ohwx dog", True), ("[V] in the garden", False), ("a photo of a dog", False),
    ("[V] Dog on the moon", True), ("[v] dog at night", True), ("[v]", False), ("OHWX dog", True), ("a garden", False),
])
def test_hints_at_the_words_that_show_the_subject(draw, nano, tmp_path, capsys, prompt, shows):
    draw(prompt, weights=str(taught(tmp_path / "taught", nano, identifier="ohwx")))
    hint = f'"{prompt.replace("[v]", "[V]")}" does not ask for your dog; write [V] dog for it'
    assert (hint in capsys.readouterr().err) == (not shows)


@pytest.mark.parametrize("option", ["prompt", "negative"])
def test_warns_of_what_the_text_encoder_will_not_see(draw, capsys, option):
    words = {"prompt": "a dog", option: "dog " * 75 + "in the garden"}
    assert len(draw(words.pop("prompt"), **words)) == 1
    error = capsys.readouterr().err
    assert "too long" in error and "'in the garden'" in error
    draw("dog " * 75)  # just fits
    assert "too long" not in capsys.readouterr().err


def test_warns_of_what_is_lost_once_the_placeholder_is_spelled_out(draw, nano, tmp_path, capsys):
    """A long word for [V] takes the place of the prompt's end."""
    weights = str(taught(tmp_path / "taught", nano, identifier="zzzzzzzzz"))
    draw("[V] " + "dog " * 70, weights=weights)
    assert "'dog dog dog dog'" in capsys.readouterr().err


# ------------------------------------------------------------------------------- what is made is never lost


def start_drawing(nano: Path, tmp_path: Path, name: str, *arguments: str, **how):
    """sample.py in a process of its own, into tmp_path/out."""
    return start(tmp_path / name, "sample.py", "a dog", "--weights", str(nano), "--device", "cpu",
                 "--out", str(tmp_path / "out"), *arguments, **how)


def test_finished_pictures_stay_when_the_user_stops(command, nano, tmp_path, monkeypatch):
    """Ctrl-C in the second group of four: the first four are on the disk, and nothing half-written is."""
    denoise, calls = tinydb.StableDiffusion.denoise, []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return denoise(*arguments, **settings)

    monkeypatch.setattr(tinydb.StableDiffusion, "denoise", interrupted)
    code, out, _ = command("sample.py", "a dog", "-n", "8", "--weights", str(nano), "--device", "cpu")
    assert code == 130 and out.split() == [f"samples/000{i}-a-dog.png" for i in range(4)]
    assert names(tmp_path / "samples") == [f"000{i}-a-dog.png" for i in range(4)]
    for line in out.split():
        Image.open(line).load()


def test_two_programs_that_draw_into_one_folder_lose_no_picture(nano, tmp_path):
    """Nor do they give two the same name, though they draw the same prompt."""
    runs = [start_drawing(nano, tmp_path, f"output{seed}", "-n", "24", "--steps", "1", "--seed", str(seed))
            for seed in (0, 100)]
    assert [run.wait() for run in runs] == [0, 0], [run.message for run in runs]
    printed = [Path(line) for run in runs for line in run.stdout.split()]
    assert sorted(printed) == sorted((tmp_path / "out").iterdir())
    seeds = [re.search(r"Seed: (\d+)", Image.open(path).text["parameters"]) for path in printed]
    assert sorted(int(seed[1]) for seed in seeds if seed) == [*range(24), *range(100, 124)]  # grids have none


def test_a_full_disk_leaves_no_empty_picture(nano, tmp_path):
    run = start_drawing(nano, tmp_path, "output", "--size", "64x64", prepare=partial(limit_file_size, 3000))
    assert run.wait() == 2 and "0000-a-dog.png: could not be written" in run.message.split("\n")[-1]
    assert names(tmp_path / "out") == []


def test_ctrl_c_while_a_picture_is_written_leaves_no_empty_one(draw, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw("a dog")
    assert names(tmp_path / "out") == []


def test_a_preview_that_fails_does_not_end_the_drawing(draw, monkeypatch):
    """Another program may be writing one into the same folder."""
    save = sample.save_png

    def fail(image, path, text):
        if "preview" in path.name:
            raise OSError("[Errno 2] No such file or directory")
        save(image, path, text)

    monkeypatch.setattr(sample, "save_png", fail)
    assert list(draw("a dog", preview=1)) == ["out/0000-a-dog.png"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["-n", "0"], ["-n 0", "1 or more"]), (["-n", "two"], ["-n", "two"]),
    (["--steps", "0"], ["--steps 0", "1 or more"]), (["--steps", "1000"], ["steps 1000", "1 to 999"]),
    (["--steps", "2.5"], ["--steps", "2.5"]),
    (["--guidance", "nan"], ["--guidance nan"]), (["--guidance", "1e300"], ["--guidance 1e+300"]),
    (["--seed", "18446744073709551616"], ["--seed", "1844674"]),
    (["--strength", "1.5"], ["--strength 1.5", "at most 1"]), (["--preview", "-1"], ["--preview -1"]),
    (["--strength", "0"], ["--strength 0", "more than 0"]), (["--sampler", "plms"], ["plms", "dpm"]),
    (["--init", "nowhere.png"], ["--init nowhere.png", "no such file"]),
    (["--init", "file"], ["--init file", "not a picture"]),
    (["--size", "16"], ["--size", "'16'", "WIDTHxHEIGHT"]), (["--size", "15x16"], ["15x16", "multiples of 2"]),
    (["--size", "0x16"], ["--size", "1 or more"]), (["--device", "tpu9"], ["tpu9", "--device cpu"]),
    (["--weights", "nowhere"], ["nowhere: not a folder"]), (["--weights", "."], ["model_index.json"]),
    (["--precision", "fp8"], ["--precision", "fp8", "bf16"]), (["--out", "cat.jpg"], ["cat.jpg", "PNG"]),
    (["--out", "file"], ["--out file", "folder"]), (["--out", "file/in"], ["--out file/in"]),
    (["--out", "file/in.png"], ["--out file/in.png"]), (["--out", "folder.png"], ["--out folder.png"]),
    (["--stesp", "3"], ["--stesp"]), (["--see", "3"], ["--see"]),
    (["more", "--out", "a.png"], ["a.png", "name a folder"]),
    (["--seed", "4294967295", "-n", "5"], ["--seed 4294967295", "-n 5"]), (["--seed=4294967290"] + ["-n=7"], ["-n 7"]),
], ids=lambda value: "=".join(value) if value[0].startswith("--") or value[0] == "-n" else "")
def test_bad_option_gets_one_line(command, nano, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    weights = [] if "--weights" in arguments else ["--weights", str(nano)]
    code, out, error = command("sample.py", "a dog", *weights, *arguments)
    last = error.strip().split("\n")[-1]
    assert code == 2 and out == "" and "Traceback" not in error and "usage" not in error
    assert last.startswith("sample.py: ") and [word for word in words if word not in last] == [], last
    assert sorted(tmp_path.rglob("*")) == before


def test_out_of_memory_is_answered_with_what_to_try(command, nano, monkeypatch):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee the documentation")

    monkeypatch.setattr(tinydb.StableDiffusion, "denoise", generate)
    code, _, error = command("sample.py", "a dog", "--weights", str(nano), "--device", "cpu")
    assert code == 1 and error.split("\n")[-2].endswith("--size") and "documentation" not in error


def test_prompt_is_needed(command):
    code, _, error = command("sample.py")
    assert code == 2 and error.count("\n") == 1 and "a prompt is missing" in error


def test_help_tells_the_defaults(command):
    code, out, _ = command("sample.py", "--help")
    assert code == 0 and "default: samples" in out and "--guidance" in out


def test_from_another_folder_as_a_process(nano, tmp_path):
    """As a user runs it: pictures and their paths, progress on stderr only."""
    call = [sys.executable, str(ROOT / "sample.py"), "[V] dog", "-n", "1", "--weights", str(nano), "--device", "cpu"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "samples/0000-V-dog.png\n"), done.stderr
    assert "drawing" in done.stderr and names(tmp_path / "samples") == ["0000-V-dog.png"]


def test_a_prompt_that_the_terminal_cannot_print(nano, tmp_path):
    call = [sys.executable, str(ROOT / "sample.py"), "a 猫", "-n", "1", "--weights", str(nano), "--device", "cpu"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert len(os.listdir(tmp_path / "samples")) == 1


def test_bytes_that_are_no_text(command, nano, tmp_path):
    """In a prompt they are refused; in the name of a folder they are as good as any."""
    code, _, error = command("sample.py", os.fsdecode(b"a caf\xe9"), "--weights", str(nano), "--device", "cpu")
    assert code == 2 and "Traceback" not in error and "UTF-8" in error
    out = os.fsdecode(b"caf\xe9")
    code, _, error = command("sample.py", "a dog", "-n", "1", "--weights", str(nano), "--device", "cpu", "--out", out)
    assert code == 0 and os.listdir(out) == ["0000-a-dog.png"], error

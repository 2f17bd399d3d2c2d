"""The prompt of each picture: captions beside the subject's, templates and captions for the class's."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, files, refusal
from PIL import Image

import tinydb
import train
from tinydb.class_images import ClassImages
from tinydb.config import ModelInfo, write_json
from tinydb.data import read_pictures
from tinydb.prompts import class_prompt, fill, prompt_remarks, read_captions, read_templates, subject_prompts

TEMPLATES = ("a red {noun}", "a {noun} in the snow")


@pytest.fixture
def captioned(photos, tmp_path) -> Path:
    """Three photographs: the first with a caption, the second with one that does not name the subject."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "0.txt").write_text("a red [V] dog\n")
    (folder / "1.txt").write_text("a dog in the snow")
    return folder


@pytest.fixture
def varied(nano, tmp_path) -> Path:
    """A model whose recipe asks for class images half of which are varied."""
    folder = Path(shutil.copytree(nano, tmp_path / "varied"))
    info = ModelInfo.read(folder / "tinydb.json")
    recipe = replace(info.recipe, class_prompts=TEMPLATES, plain_share=0.5, class_images=8)
    write_json(folder / "tinydb.json", replace(info, recipe=recipe).to_dict())
    return folder


@pytest.fixture
def prompts_learnt(monkeypatch) -> list[list[list[str]]]:
    """The prompts that each training from now on is given: of the subject's pictures, and of the class's."""
    given, original = [], train.DreamBoothLoss.__init__
    monkeypatch.setattr(train.DreamBoothLoss, "__init__", lambda self, sd, prompts, *more: (
        given.append(prompts), original(self, sd, prompts, *more))[1])
    return given


# ------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("content, caption", [
    (None, ""), (b"", ""), (b" a  [V] dog\r\n at night \n", "a [V] dog at night"),
    (b"\xef\xbb\xbfa [V] dog", "a [V] dog"), (b"a [v] dog", "a [V] dog"), ("ein Fuß".encode(), "ein Fuß"),
])
def test_caption_is_the_text_beside_a_picture(tmp_path, content, caption):
    """In one line, whatever the editor."""
    if content is not None:
        (tmp_path / "my dog.1.txt").write_bytes(content)
    assert read_captions(tmp_path, ["my dog.1.jpg"]) == [caption]


def test_names_in_capitals(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "capitals")
    name = next(iter(read_pictures(folder, 16)[0]))
    (folder / name).with_suffix(".TXT").write_text("a red [V] dog")
    pictures, remarks = read_pictures(folder, 16)
    assert remarks == [] and read_captions(folder, [name]) == ["a red [V] dog"]


def test_caption_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("a [V] dog".encode("utf-16"))
    assert "a.txt" in (text := refusal(read_captions, tmp_path, ["a.png"])) and "UTF-8" in text
    (tmp_path / "b.txt").mkdir()
    assert "b.txt" in refusal(read_captions, tmp_path, ["b.png"])


def test_texts_beside_pictures_are_no_junk(captioned):
    (captioned / "notes.txt").write_text("beside no picture")
    pictures, remarks = read_pictures(captioned, 16)
    assert list(pictures) == ["0.png", "1.png", "2.png"] and remarks == ["notes.txt is skipped: not a picture"]


def test_each_picture_is_learnt_under_its_caption(teach, captioned, tmp_path, prompts_learnt, capsys):
    """Or under the usual prompt; one that does not name the subject is said aloud; person and page see them."""
    out = teach(tmp_path / "out", images=str(captioned), identifier="zwx", steps=1)
    expected = ["a red zwx dog", "a dog in the snow", "a photo of zwx dog"]
    assert prompts_learnt == [[expected, ["a photo of a dog"] * 5]]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "does not name" in line]
    assert "'a dog in the snow'" in line and "[V]" in line
    shown = [f"{i}.png: {prompt}" for i, prompt in enumerate(expected)]
    assert Image.open(out / "inputs.png").text["parameters"].splitlines() == shown
    assert "\n".join(shown) in (out / "report.html").read_text()


def test_captions_change_the_training_and_usual_ones_do_not(teach, photos, captioned, tmp_path):
    for path in captioned.glob("*.txt"):
        path.write_text("a photo of [V] dog")
    plain, same = teach(tmp_path / "a", steps=1), teach(tmp_path / "b", images=str(captioned), steps=1)
    (captioned / "0.txt").write_text("a red [V] dog")
    other = teach(tmp_path / "c", images=str(captioned), steps=1)
    assert files(plain / "model") == files(same / "model") != files(other / "model")


def test_subjects_in_the_box_have_captions():
    for folder in (ROOT / "weights" / "subjects").iterdir():
        captions = read_captions(folder, read_pictures(folder, 64)[0])
        assert len(set(captions)) == len(captions) == 5 and all("[V]" in caption for caption in captions)


# --------------------------------------------------------------------------------------- class prompts


@pytest.mark.parametrize("template, noun, prompt", [
    ("a {noun} at night", "owl", "an owl at night"), ("a {noun}, a {noun}", "dog", "a dog, a dog"),
    ("A {noun}", "owl", "An owl"), ("a sea {noun}", "otter", "a sea otter"),
    ("the {noun}", "\\1", "the \\1"), ("a {dog}", "dog", "a {dog}"),
])
def test_template_is_filled_with_the_class(template, noun, prompt):
    assert fill(template, noun) == prompt


@pytest.mark.parametrize("caption, names", [
    ("a photo of pho dog", True), ("a Pho dog", True), ("pho's dog", True), ("pho_dog", True),
    ("pho2 dog", True), ("a photo of a dog", False)])
def test_identifier_is_found_as_words(pairs, caption, names):
    """As the text encoder reads them."""
    tokenizer = pairs("nano").sd.tokenizer
    assert (prompt_remarks(tokenizer, [[caption]], "pho") == []) == names
    assert (prompt_remarks(tokenizer, [["pho dog"], [caption]], "pho") == []) != names


def test_prompts_of_class_images(teach, varied, captioned, tmp_path, prompts_learnt):
    """Every second one is varied, in turn; each is drawn, learnt and noted under its own."""
    plain, red, snow = "a photo of a dog", "a red dog", "a dog in the snow"
    out = teach(tmp_path / "out", weights=str(varied), images=str(captioned), steps=1)
    expected = [plain, red, plain, snow, plain, red, plain, snow]
    assert prompts_learnt[0][1] == expected
    paths = sorted((out / "class_images").glob("*/*.png"))
    assert [path.with_suffix(".txt").read_text() for path in paths] == [prompt + "\n" for prompt in expected]
    assert [Image.open(path).text["parameters"].splitlines()[0] for path in paths] == expected
    drawn = tinydb.load(varied).generate(expected, steps=2, guidance_scale=2.0, seed=0)
    assert [image.tobytes() for image in drawn] == [Image.open(path).tobytes() for path in paths]


def test_without_captions_the_recipes_class_images_are_plain(teach, varied, tmp_path, prompts_learnt, capsys):
    """Which is said; a file of class prompts that somebody gives is taken all the same."""
    teach(tmp_path / "out", weights=str(varied), steps=1)
    assert set(prompts_learnt[0][1]) == {"a photo of a dog"} and "all class images are plain" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a red {noun}\n")
    teach(tmp_path / "own", weights=str(varied), class_prompts=str(tmp_path / "a.txt"), steps=1)
    assert "a red dog" in prompts_learnt[1][1] and "all class images are plain" not in capsys.readouterr().err


def test_varied_class_images_are_topped_up(teach, varied, captioned, tmp_path):
    given = {"weights": str(varied), "images": str(captioned), "steps": 1}
    few = teach(tmp_path / "few", **given, class_images=8) / "class_images"
    before = files(few)
    teach(tmp_path / "more", **given, class_images=11, class_dir=str(few))
    all_at_once = teach(tmp_path / "all", **given, class_images=11) / "class_images"
    assert files(few) == files(all_at_once) and before.items() < files(few).items()


def test_class_prompts_from_a_file(teach, nano, tmp_path, prompts_learnt):
    """A quarter of the class images, unless the recipe has another share; comments are passed over."""
    (tmp_path / "a.txt").write_text("# colours\n\n  a red   {noun}\n")
    out = teach(tmp_path / "out", class_prompts=str(tmp_path / "a.txt"), steps=1)
    assert prompts_learnt[0][1] == ["a photo of a dog"] * 3 + ["a red dog", "a photo of a dog"]
    (tmp_path / "a.txt").write_text("a blue {noun}\n")
    assert "model was " in refusal(teach, out, class_prompts=str(tmp_path / "a.txt"), steps=2, resume=True)


def test_plain_prior_is_the_papers(varied, nano):
    """Also where the recipe varies: the class images of older runs are taken for it."""
    sd = tinydb.load(varied)
    plain = ClassImages(sd, varied, "dog", 0, "plain")
    assert set(plain.prompts(9)) == {"a photo of a dog"}
    assert plain.key == ClassImages(tinydb.load(nano), nano, "dog", 0).key != ClassImages(sd, varied, "dog", 0).key


@pytest.mark.parametrize("content, words", [
    (None, ["a.txt", "no such file"]), (b"", ["a.txt", "no class prompt"]), (b"# only this\n", ["no class prompt"]),
    (b"a red dog\n", ["'a red dog'", "{noun}"]), (b"\xff\xfe", ["a.txt", "UTF-8"]),
])
def test_file_of_class_prompts_that_cannot_be_used(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    text = refusal(read_templates, tmp_path / "a.txt")
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("templates, captioned, own, words", [
    (None, True, None, "what only captions name"), ("plain", True, None, "what only captions name"),
    ("a.txt", False, None, "what only class prompts name"), (None, False, None, None), ("a.txt", True, None, None),
    ("plain", True, "a dog in the snow", None), ("plain", False, "a dog in the snow", "what only class prompts name"),
    ("a.txt", True, "a photo of a dog", "what only captions name"),
])
def test_captions_and_varied_class_prompts_belong_together(nano, photos, tmp_path, monkeypatch, templates, captioned,
                                                           own, words):
    """With one of them alone, places come to mean the subject, or anything but it; which is said. `own`: the text
    beside each class picture of one's own, of which there are enough."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a {noun} in the snow\n")
    if own:
        shutil.copytree(photos, "own")
        for picture in list(Path("own").iterdir()):
            picture.with_suffix(".txt").write_text(own)
    prior = ClassImages(tinydb.load(nano), nano, "dog", 0, templates, captioned, "own" if own else None)
    count = len(prior.own) or 8
    assert [words in remark for remark in prior.advice(count)] == ([True] if words else [])


def test_list_for_stable_diffusion_can_be_used():
    prompts = [fill(template, "owl") for template in read_templates(ROOT / "weights" / "class_prompts.txt")]
    assert len(set(prompts)) == len(prompts) >= 30 and not any("{" in prompt or "a owl" in prompt for prompt in prompts)


def test_own_class_pictures_have_captions_too(teach, nano, tmp_path, prompts_learnt):
    """Without one, the plain prompt; the folder of an earlier run's pictures can be handed in as one's own."""
    first = teach(tmp_path / "first", steps=2)
    [drawn] = (first / "class_images").iterdir()
    (drawn / "00001.txt").write_text("a red dog\n")
    (drawn / "00002.txt").unlink()
    own = teach(tmp_path / "own", class_dir=str(drawn), steps=2)
    assert prompts_learnt[1][1] == ["a photo of a dog", "a red dog"] + ["a photo of a dog"] * 3
    assert files(own / "model") != files(first / "model")
    (drawn / "00001.txt").write_text("a photo of a dog\n")
    again = teach(tmp_path / "again", class_dir=str(drawn), steps=2)
    assert files(again / "model") == files(first / "model")


def test_own_class_pictures_beyond_the_number_are_said(teach, photos, tmp_path, capsys):
    teach(tmp_path / "out", class_dir=str(photos), class_images=2, steps=1)
    assert "the first 2 of your 3 class images are used" in capsys.readouterr().err


def test_class_prompt_that_names_the_subject_is_said_aloud(teach, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red {noun}\na photo of [V] {noun}\nohwx {noun}\n")
    teach(tmp_path / "out", class_prompts=str(tmp_path / "a.txt"), class_images=12, steps=1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "names your subject" in line]
    assert ["'a photo of [V] dog'" in lines[0], "'ohwx dog'" in lines[1], len(lines)] == [True, True, 2]


def test_stopped_run_with_captions_and_varied_prior_goes_on(teach: Callable, varied, captioned, tmp_path):
    settings = {"images": str(captioned), "weights": str(varied), "save_every": 2}
    whole = teach(tmp_path / "whole", steps=4, **settings)
    out = teach(tmp_path / "out", steps=2, **settings)
    shutil.rmtree(out / "model")
    teach(out, steps=4, resume=True, **settings)
    assert files(out / "model") == files(whole / "model")


def test_usual_prompts():
    assert subject_prompts(["", "the [V]"], "zwx", "dog") == ["a photo of zwx dog", "the zwx"]
    assert [class_prompt(noun) for noun in ("dog", "Owl")] == ["a photo of a dog", "a photo of an Owl"]

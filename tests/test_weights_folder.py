"""The world, and the model in the box: its recipe and its folder."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import difference, refusal
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "weights"))
import evaluate  # noqa: E402
import judge  # noqa: E402
import pretrain  # noqa: E402
import pretrain_clip  # noqa: E402
import reference  # noqa: E402
import world  # noqa: E402

import tinydb  # noqa: E402
from tinydb.clip import preprocess  # noqa: E402
from tinydb.config import ModelInfo  # noqa: E402
from tinydb.data import fit, open_picture  # noqa: E402
from tinydb.pictures import to_pixels  # noqa: E402


@pytest.mark.parametrize("arguments", [["--weights=nowhere"], ["--weights=nowhere", "--dreambooth"],
                                       ["--weights=runs", "--dreambooth", "--quick"]], ids=str)
def test_evaluate_without_a_model(command, arguments):
    code, _, error = command("weights/evaluate.py", *arguments)
    assert code == 2 and error.count("\n") == 1 and arguments[0].partition("=")[2] in error, error


def test_a_scene_and_its_caption_depend_on_the_generator_alone():
    first, again = (np.random.default_rng(3) for _ in range(2))
    for _ in range(20):
        scene = world.sample_scene(first)
        assert scene == world.sample_scene(again)
        assert world.caption(scene, first) == world.caption(scene, again)
        assert np.array_equal(world.render(scene, first), world.render(scene, again))


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_scenes_are_kept_apart(held_out: bool):
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, held_out) for _ in range(500)]
    assert all(world.is_held_out(scene) == held_out for scene in scenes)
    for seen, everything in (({s.noun for s in scenes}, world.NOUNS), ({s.place for s in scenes}, world.PLACES),
                             ({s.color for s in scenes}, world.COLORS)):
        assert seen == set(everything), "a word that training never meets cannot be composed"


def test_a_caption_says_nothing_that_the_picture_does_not_show():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = world.sample_scene(rng)
        allowed = set(f"a an photo picture of plain {world.full_caption(scene)}".split())
        assert set(world.caption(scene, rng).split()) <= allowed


def test_the_pictures_of_the_subjects_are_those_that_world_draws():
    for name, subject in world.SUBJECTS.items():
        files = sorted((ROOT / "weights" / "subjects" / name).glob("*.png"))
        assert len(files) == len(subject.places)
        for i, (file, place) in enumerate(zip(files, subject.places)):
            drawn = world.render_subject(name, place, np.random.default_rng(i))
            assert np.array_equal(Image.open(file).convert("RGB"), drawn), file


def test_every_word_of_the_world_is_one_token_and_any_other_text_is_bytes():
    tokenizer = pretrain.make_tokenizer(["dog", "dogs", "moon", "ohwx"])
    bos, eos = tokenizer.vocab["<|startoftext|>"], tokenizer.vocab["<|endoftext|>"]
    for word in ("dog", "dogs", "moon", "ohwx"):
        assert tokenizer.encode(word)[0, :3].tolist() == [bos, tokenizer.vocab[word + "</w>"], eos]
    strange = tokenizer.encode("zebra 日本 😀 !?")[0].tolist()
    assert tokenizer.dropped("zebra 日本 😀 !?") == "" and strange.index(eos) > 10


def test_pretraining_that_was_interrupted_ends_as_if_it_was_not(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pretrain, "CHECKPOINT_SECONDS", 0)  # a checkpoint after each step

    def run(name: str, interrupted_at: int | None) -> nn.Module:
        """Train for 30 steps; the loss of one of them raises what Ctrl-C does."""
        def loss_of(model: nn.Module) -> torch.Tensor:
            seen.append(0)
            if len(seen) == interrupted_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4)
            return (model(x) - x).square().mean()

        torch.manual_seed(0)
        seen, out = [], tmp_path / name
        out.mkdir(exist_ok=True)
        average = pretrain.train("linear", nn.Sequential(nn.Linear(4, 4)), loss_of, 30, 1e-2, 0, out, lambda _: "")
        assert len(seen) == (30 if name == "once" else 11)
        return average

    once = run("once", None)
    with pytest.raises(KeyboardInterrupt):
        run("twice", 20)
    twice = run("twice", None)
    assert torch.equal(once[0].weight, twice[0].weight) and torch.equal(once[0].bias, twice[0].bias)


def test_the_recipe_runs_from_nothing_to_a_folder_and_goes_on_where_it_was(tmp_path: Path):
    """All of pretrain.py with a step or two of each part; run again with more steps, it draws and encodes nothing."""
    few = pretrain.Settings(str(tmp_path / "out"), str(tmp_path / "tiny"), images=20, vae_steps=2, steps=2, vae_batch=2,
                            batch=2, device="cpu")
    pretrain.main(few)
    first = tinydb.load(tmp_path / "tiny")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*20*")}
    pretrain.main(replace(few, steps=3))
    second = tinydb.load(tmp_path / "tiny")
    assert len(times) == 2 and times == {path: path.stat().st_mtime_ns for path in times}
    assert torch.equal(first.vae.decoder.conv_in.weight, second.vae.decoder.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)


@pytest.fixture(scope="module")
def tiny() -> tinydb.StableDiffusion:
    return tinydb.load(ROOT / "weights" / "tiny")


def test_the_folder_is_small_and_says_where_it_comes_from(tiny: tinydb.StableDiffusion):
    size = sum(path.stat().st_size for path in (ROOT / "weights" / "tiny").rglob("*") if path.is_file())
    assert size < 30e6
    assert tiny.info.class_noun is None and tiny.info.base["license"] == "MIT"
    assert tiny.info.recipe == pretrain.RECIPE  # so pretraining anew loses none of it


@pytest.mark.parametrize("taught", [False, True])
def test_diffusers_opens_the_folder_and_draws_the_same_pictures(tiny: tinydb.StableDiffusion, tmp_path: Path,
                                                                taught: bool):
    """As shipped, and as train.py writes it: its own fp32 weights beside the fp16 autoencoder it started from."""
    folder = ROOT / "weights" / "tiny"
    if taught:
        tiny.write(tmp_path / "model", torch.float32, vae_from=folder)
        folder = tmp_path / "model"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red dog on the moon", "a green teapot in the snow"]
    latents = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = pipeline(prompts, num_inference_steps=10, guidance_scale=4.0, latents=latents).images
    images = tinydb.load(folder).generate(prompts, steps=10, guidance_scale=4.0, guidance_stop=1.0,
                                            latents=latents)
    assert difference(images, expected) <= 2


def test_the_autoencoder_reproduces_unseen_scenes(tiny: tinydb.StableDiffusion):
    rng = np.random.default_rng(1234)
    pixels = to_pixels([world.render(world.sample_scene(rng), rng, tiny.resolution) for _ in range(32)])
    with torch.no_grad():
        decoded = tiny.vae.decode(tiny.vae.encode(pixels)[0]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    assert psnr.mean() >= 31


def test_the_autoencoder_reproduces_the_subjects(tiny: tinydb.StableDiffusion):
    files = sorted((ROOT / "weights" / "subjects").glob("*/*.png"))
    pixels = to_pixels([fit(open_picture(file), tiny.resolution) for file in files])
    with torch.no_grad():
        decoded = tiny.vae.decode(tiny.vae.encode(pixels)[0]).clamp(-1, 1)
    assert (10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))).mean() >= 26.5


def test_a_prompt_decides_colour_and_place(tiny: tinydb.StableDiffusion):
    """On average over pictures: the moon's sky is darker than the beach's, and a red car is redder than a blue one."""
    prompts = ["a red car on the beach", "a blue car on the beach", "a red car on the moon", "a blue car on the moon"]
    images = tiny.generate([prompt for prompt in prompts for _ in range(2)], steps=10, seed=5)
    pixels = to_pixels(images).unflatten(0, (4, 2)).mean(1)  # (prompt, 3, H, W)
    sky, body = pixels[:, :, 4:20].mean((1, 2, 3)), pixels[:, :, 72:104, 32:96].mean((2, 3))
    assert sky[:2].min() > sky[2:].max() + 0.3
    assert body[0, 0] - body[0, 2] > body[1, 0] - body[1, 2] + 0.3
    assert body[2, 0] - body[2, 2] > body[3, 0] - body[3, 2] + 0.3


@pytest.mark.parametrize("held_out", [False, True])
def test_judge_knows_what_a_scene_shows(held_out):
    """At most 2% wrong in each attribute of real scenes; of captions that belong to others, most."""
    rng = np.random.default_rng(7)
    scenes = [world.sample_scene(rng, held_out) for _ in range(150)]
    pictures = [world.render(scene, rng) for scene in scenes]
    model = judge.load_judge()
    assert min(evaluate.accuracy(model, pictures, scenes)) >= 98
    assert evaluate.accuracy(model, pictures, scenes[1:] + scenes[:1])[-1] < 10


@pytest.mark.parametrize("name", world.SUBJECTS)
def test_judge_tells_a_subject_from_others_of_its_class(name):
    subject, rng, model = world.SUBJECTS[name], np.random.default_rng(8), judge.load_judge()
    own = [fit(world.render_subject(name, place, rng), world.SIZE) for place in world.PLACES]
    others = [world.render(world.Scene(subject.noun, color, subject.look.marking, place, False), rng)
              for color, place in zip(world.COLORS, world.PLACES)]
    seen = evaluate.shows_subject(model, evaluate.similarity_to(model), own + others, subject)["all"].float()
    assert seen[: len(own)].mean() >= 0.9 and seen[len(own) :].mean() <= 0.1


def test_measures_of_the_study_point_where_the_paper_has_them():
    """A perfect model has nearly all; one that draws the subject for its class has drifted."""
    model = judge.load_judge()
    similarity = evaluate.similarity_to(model)
    images, class_images, placed = evaluate.draw_real("rex")
    perfect = evaluate.measure(model, similarity, "rex", images, class_images, placed)
    drifted = evaluate.measure(model, similarity, "rex", class_images[:10], images, images)
    mixed = evaluate.measure(model, similarity, "rex", images, class_images, images)
    assert mixed["drift"] <= 10 and mixed["drift in places"] >= 50
    assert perfect["all"] >= 80 and perfect["prompt"] >= 85
    assert drifted["all"] == 0 and drifted["prompt"] < 50
    assert all(perfect[drift] <= 10 and drifted[drift] >= 50 for drift in ("drift", "drift in places"))
    assert drifted["PRES"] > perfect["PRES"] + 20 and perfect["likeness"] > drifted["likeness"] + 20
    same = evaluate.measure(model, similarity, "rex", images, class_images[:1] * 5, placed)
    assert same["DIV"] < 1e-3 < 10 < perfect["DIV"]


def test_mean_of_pairs_leaves_out_each_with_itself():
    assert evaluate.mean_of_pairs(torch.eye(3)) == 0


def test_the_model_in_the_box_composes(tiny: tinydb.StableDiffusion):
    """Pairs that it never saw, as evaluate.py does it, but few of them in few steps: most have all that is asked."""
    rng = np.random.default_rng(5)
    scenes = [world.sample_scene(rng, held_out=True) for _ in range(20)]
    images = tiny.generate([world.full_caption(scene) for scene in scenes], steps=12, sampler="dpm")
    assert evaluate.accuracy(judge.load_judge(), images, scenes)[-1] >= 75


def test_prompts_of_the_study_ask_for_what_the_pictures_of_a_subject_do_not_show():
    for subject in world.SUBJECTS.values():
        prompts = evaluate.study_prompts(subject)
        assert len(prompts) == len({prompt for prompt, _ in prompts}) == 10
        assert not any(place in prompt for prompt, _ in prompts for place in subject.places)


def test_prior_that_names_nothing_asked():
    """No colour, no place and no hat of the study's prompts."""
    for subject in world.SUBJECTS.values():
        asked = {value for _, values in evaluate.study_prompts(subject) for value in values.values()}
        prompts = evaluate.unasked_prompts(subject)
        assert len(set(prompts)) == len(prompts) > 20 and all("{noun}" in prompt for prompt in prompts)
        assert not [prompt for prompt in prompts for words in asked | {"hat"} if words in prompt]


def test_arms_with_one_prior_have_one_set_of_class_images():
    """Without captions train.py takes the plain prior, whose pictures are others than the recipe's."""
    assert {arm.captions for arm in evaluate.ARMS.values() if arm.prior == "recipe"} == {True}


def test_study_goes_on_and_compares_the_same_subjects_and_seeds(tmp_path, monkeypatch, capsys):
    """What matters most comes first; what is there is not done again."""
    study, taught = evaluate.Study(ROOT / "weights" / "tiny", tmp_path, judge.load_judge()), []

    def teach(way: str, name: str, seed: int) -> None:
        taught.append((way, name, seed))
        study.rows[f"{way}/{name}/{seed}"] = {"all": 90.0 + 4 * seed - (way != "the recipe") * (10 + 2 * seed)}

    monkeypatch.setattr(study, "teach", teach)
    monkeypatch.setattr(study, "measure", lambda way, name, seed, pictures: study.rows.update(
        {f"{way}/{name}/{seed}": {"all": 0.0}}))
    monkeypatch.setattr(evaluate, "draw_taught", lambda folder, name: [])
    first, paper, *others = list(evaluate.ARMS)[:3]
    study.run(["rex"], 2, [first, paper])
    assert taught == [(first, "rex", 0), (paper, "rex", 0), (first, "rex", 1), (paper, "rex", 1)]
    study.run(["rex"], 2, [first, paper, *others])
    assert taught[4:] == [(others[0], "rex", 0)]
    study.print()
    printed = capsys.readouterr().out
    assert f"| {first} | 2 | 92 ± 2 |" in printed and f"| {paper} | 2 | -11 ± 1 |" in printed


def test_the_autoencoder_of_the_reference_keeps_its_precision(nano):
    """It computes in that of the step, and is saved as it was."""
    pipeline = reference.load_pipeline(nano, torch.device("cpu"))
    pixels, recipe = torch.rand(2, 3, 16, 16), ModelInfo.read(nano / "tinydb.json").recipe
    reference.training_step(pipeline, [["a dog"] * 2] * 2, [pixels, pixels], 2, recipe, torch.bfloat16)()
    assert {tensor.dtype for tensor in pipeline.vae.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("given", [False, True])
def test_computation_of_diffusers_trains_and_saves_a_model_that_we_open(nano: Path, photos: Path, tmp_path: Path,
                                                                        given: bool):
    """Text encoder and UNet move, the VAE does not, with class images that it draws and with given ones."""
    out = tmp_path / "theirs"
    reference.main(reference.Settings(images=str(photos), weights=str(nano), out=str(out), device="cpu",
                                      class_dir=str(photos) if given else None))
    before, after = tinydb.load(nano), tinydb.load(out)
    for part, moves in (("text_encoder", True), ("unet", True), ("vae", False)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters())
        assert any(not torch.equal(a, b) for a, b in pairs) == moves
    assert (after.info.class_noun, after.info.step, after.info.recipe) == ("dog", 4, before.info.recipe)


def test_start_is_not_slowed_by_what_it_does_not_need():
    """torch._dynamo takes longer to import than torch itself."""
    command = "import sys, tinydb; tinydb.load('weights/tiny'); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_papers_table_of_one_subject(teach, small_clip, photos, tmp_path, capsys):
    model = teach(tmp_path / "run", steps=1) / "model"
    settings = evaluate.Settings(weights=str(model), subject=str(photos), clip=str(small_clip), quick=True)
    capsys.readouterr()
    evaluate.paper_table(settings, tinydb.load(model), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = {name.strip(): [float(value) for value in values] for _, name, *values, _ in (
        line.split("|") for line in lines if line.startswith(("| a ", "| mean")))}
    assert list(rows) == ["a [V] dog in the jungle", "a [V] dog on top of a wooden floor",
                          "a [V] dog wearing a red hat", "a [V] dog in a firefighter outfit", "a red [V] dog", "mean"]
    *each, mean = rows.values()
    assert mean == pytest.approx(np.mean(each, axis=0), abs=1e-3)
    assert any(line.startswith("PRES ") for line in lines) and Image.open(tmp_path / "prompts.png").size == (512, 640)


@pytest.mark.parametrize("noun, in_the_box, last", [
    ("dog", False, "a [V] dog in a purple wizard outfit"), ("teapot", False, "a [V] teapot on top of a white rug"),
    ("dog", True, "a [V] dog on the grass wearing a red hat")])
def test_25_prompts(noun, in_the_box, last):
    prompts = evaluate.paper_prompts(noun, in_the_box)
    assert len(set(prompts)) == 25 and prompts[19] == last and all(f"[V] {noun}" in prompt for prompt in prompts)


def test_papers_table_needs_a_subject_a_clip_and_pictures(teach, nano, small_clip, photos, tmp_path):
    taught = tinydb.load(teach(tmp_path / "run", steps=1) / "model")
    given = evaluate.Settings(subject=str(photos), clip=str(small_clip))
    assert "it was taught no subject" in refusal(evaluate.paper_table, given, tinydb.load(nano), tmp_path)
    assert "no --clip" in refusal(evaluate.paper_table, replace(given, clip=None), taught, tmp_path)
    (tmp_path / "empty").mkdir()
    empty = replace(given, subject=str(tmp_path / "empty"))
    assert "0 pictures in it, expected more" in refusal(evaluate.paper_table, empty, taught, tmp_path)


def test_clip_in_the_box_answers_about_scenes_that_it_never_saw():
    clip = tinydb.load_clip(ROOT / "weights" / "tiny-clip")
    assert min(pretrain_clip.answers(clip, 200, seed=5).values()) >= 99


def test_clip_in_the_box_tells_each_subject_from_its_class():
    """And opens in transformers, of which it takes 4 MB at most."""
    folder, rng = ROOT / "weights" / "tiny-clip", np.random.default_rng(6)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    clip, reference = tinydb.load_clip(folder), CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    for name, subject in world.SUBJECTS.items():
        paths = (folder.parent / "subjects" / name).glob("*.png")
        photographs = [Image.open(path).convert("RGB") for path in paths]
        elsewhere = [world.compose(subject.noun, subject.look, place, rng) for place in world.PLACES]
        others = [world.render(replace(world.sample_scene(rng), noun=subject.noun), rng) for _ in range(10)]
        of_photographs = clip.images(photographs)
        like, unlike = ((clip.images(images) @ of_photographs.T).mean(1) for images in (elsewhere, others))
        assert like.min() > unlike.max(), name
    with torch.inference_mode():
        features = reference.get_image_features(preprocess(photographs, clip.side))
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    assert torch.allclose(nn.functional.normalize(features, dim=1), of_photographs, atol=1e-5)


def test_pretraining_of_the_clip_begins_and_ends(tmp_path: Path):
    settings = pretrain_clip.Settings(str(tmp_path / "out"), str(tmp_path / "clip"), things=20, steps=2, batch=4)
    pretrain_clip.main(settings)
    assert tinydb.load_clip(tmp_path / "clip").text(["a dog"]).shape == (1, 96)

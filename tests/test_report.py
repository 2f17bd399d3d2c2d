"""OUT/report.html: it stands alone, shows what the run's files hold, and never stands in the way of a training."""

import json
import re
import shlex
import shutil
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import files, refusal
from PIL import Image

import tinydb.run
from tinydb.pictures import save_png
from tinydb.report import POINTS, PREVIEWS, write_report


class Page(HTMLParser):
    """What a browser makes of the page: elements with their attributes, texts, and pictures as bytes."""

    def __init__(self, out: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.html = (out / "report.html").read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def pictures(self) -> list[bytes]:
        return [b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in self.all("img")]

    @property
    def state(self) -> str:
        return next(text for text in self.texts if text.startswith("Step "))

    def curve(self, loss: str, kind: str) -> list[tuple[int, float]]:
        """The steps and losses of a curve: of "prior_loss", say, "each" step or the "mean" around it."""
        [points] = [line["points"] for line in self.all("polyline")
                    if line["class"] == kind and line["stroke"] == f"var(--{loss})"]
        return [(int(x), -float(y)) for x, y in (point.split(",") for point in points.split())]


@pytest.fixture
def run(tmp_path) -> Callable[..., Path]:
    """run(metrics, preview_steps, **settings): OUT as a training leaves it, without a model."""
    def make(metrics: list[dict], preview_steps: list[int], **settings) -> Path:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        config = {"class_noun": "dog", "identifier": "ohwx", "steps": 10, "out": str(out), "run": {"device": "cpu"}}
        save_png(Image.new("RGB", (3, 3)), out / "inputs.png", settings.pop("names", "0.png, 1.png"))
        for step in preview_steps:
            image = Image.new("RGB", (3, 3), (step, 0, 0))
            save_png(image, out / "samples" / f"step-{step:06d}.png", settings.get("prompts", "a dog | a cat"))
        (out / "config.json").write_text(json.dumps({**config, **settings}))
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        return out
    return make


def losses(steps: int) -> list[dict[str, float]]:
    return [{"step": i, "instance_loss": 1 / i, "prior_loss": 0.2 + 0.01 * (i % 3)} for i in range(1, steps + 1)]


def report(out: Path) -> Page:
    write_report(out)
    return Page(out)


# ---------------------------------------------------------------------------------------------- the page


def test_nothing_begun(run):
    page = report(run([], []))
    assert page.state == "Step 0 of 10, not finished yet" and page.all("progress") == [{"value": "0", "max": "10"}]
    assert len(page.pictures) == 1 and not page.all("polyline") and not page.all("code")
    assert {"ohwx", "dog", "cpu", "0.png, 1.png"} <= set(page.texts)


def test_needs_nothing_beside_it(run):
    page = report(run(losses(3), [1, 2]))
    assert not re.search(r"<script|<link|@import|url\(|https?:|//|\son\w+=", re.sub(r'src="data:[^"]*"', "", page.html))
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))


@pytest.mark.parametrize("line", [
    "", "null", "[]", "{", '{"step": 1, "instance_loss": {}}', '{"instance_loss": 1}', '{"step": NaN}', "[" * 10**5,
    '{"step": 1, "instance_loss": 1e999}', "\udcff", f'{{"step": {10**400}}}'], ids=lambda line: line[:30])
def test_damaged_metrics_are_left_out(run, line):
    """The rest of the page, and of the curves, is there."""
    out = run(losses(40), [], steps=100)
    page = report(out).html
    with (out / "metrics.jsonl").open("r+", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
        file.seek(0)
        file.write(line + "\n" + text + '{"step": 41, "inst')
    assert report(out).html == page


def test_curves_are_the_metrics(run):
    """In the units of the data; the frame holds the whole run from left to right."""
    metrics = losses(40)
    metrics[19]["likeness"], metrics[39]["likeness"] = 0.9, 0.8
    page = report(run(metrics, [], steps=100))
    for name in ("instance_loss", "prior_loss"):
        expected = [line[name] for line in metrics]
        assert page.curve(name, "each") == [(i, pytest.approx(loss, rel=1e-3)) for i, loss in enumerate(expected, 1)]
        means = dict(page.curve(name, "mean"))
        assert means[1] == pytest.approx(sum(expected[:3]) / 3, rel=1e-3)
        assert means[30] == pytest.approx(sum(expected[27:32]) / 5, rel=1e-3)
    assert page.curve("likeness", "mean") == [(20, 0.9), (40, 0.8)]
    for i in (1, 3):  # the losses' plot, and the scores'
        left, top, width, height = map(float, page.all("svg")[i]["viewbox"].split())
        assert (left, width) == (0, 100) and top == -height and 0.6 < height < 1.5
    assert {"instance loss 0.0257", "prior loss 0.21", "likeness 0.8"} <= set(page.texts)


def test_curve_below_zero_is_in_its_frame(run):
    """The cosines of CLIP may be negative."""
    scores = [{"step": step, "likeness": value} for step, value in ((1, -0.1), (2, 0.2), (3, -0.3))]
    page = report(run(scores, [], steps=3))
    _, top, _, height = map(float, page.all("svg")[1]["viewbox"].split())
    assert all(top <= -value <= top + height for _, value in page.curve("likeness", "mean")) and height > 0


def test_curves_of_a_long_run_are_short(run):
    metrics = losses(5 * POINTS + 1)
    page = report(run(metrics, [], steps=len(metrics)))
    curve = page.curve("instance_loss", "each")
    assert len(curve) <= POINTS and curve[-1][0] == len(metrics)
    assert curve[0] == (6, pytest.approx(sum(line["instance_loss"] for line in metrics[:6]) / 6, rel=1e-3))


def test_without_class_pictures(run):
    page = report(run([{"step": 1, "instance_loss": 0.3}, {"step": 2, "instance_loss": 0.2}], []))
    assert {line["stroke"] for line in page.all("polyline")} == {"var(--instance_loss)"}


def test_previews_newest_first_as_they_are(run):
    """Only those up to the step that the metrics end with: a resumed run has been further once."""
    out = run(losses(4), [2, 4, 6])
    page = report(out)
    paths = [out / "inputs.png", *(out / "samples" / f"step-00000{step}.png" for step in (4, 2))]
    assert page.pictures == [path.read_bytes() for path in paths]
    assert {"a dog", "a cat", "4", "2"} <= set(page.texts)


def test_many_previews_are_thinned_out(run):
    steps = list(range(1, 2 * PREVIEWS + 2))
    page = report(run(losses(steps[-1]), steps, steps=99))
    shown = [int(image["alt"].split()[-1]) for image in page.all("img")[1:]]
    assert shown == steps[::-3] and len(shown) <= PREVIEWS


def test_what_the_user_wrote_stays_text(run):
    """In the settings, the command, the names of files and the prompts."""
    odd = "<u title='1'>\"dog\" & co</u>"
    out = run(losses(2), [1], class_noun=odd, identifier="<i>", images=odd, names=odd, prompts=f"{odd} | {odd}")
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    page = report(out)
    assert not page.all("u") and not page.all("i")
    assert page.texts.count(odd) == 5 and f"a photo of <i> {odd}" in page.texts
    assert any(text.startswith("python sample.py") and "&" in text for text in page.texts)


def test_half_a_line_of_metrics(run):
    out = run(losses(3), [])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "inst')
    assert report(out).state.startswith("Step 3 of 10")


def test_command_where_out_was_given_as_a_relative_path(run, monkeypatch):
    out = run(losses(3), []).rename(Path(run([], []).parent / "my dog"))
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    monkeypatch.chdir(out.parent)
    [line] = [text for text in report(Path("my dog")).texts if text.startswith("python sample.py")]
    assert shlex.split(line)[2:] == ["[V] dog on the moon", "--weights", "my dog"]


def test_folder_without_a_run(tmp_path):
    assert "config.json" in refusal(write_report, tmp_path)
    assert not files(tmp_path)


# -------------------------------------------------------------------------------------------- train.py


@pytest.fixture
def states(monkeypatch) -> list[str]:
    """What the page says of the run's state each time that a training writes it."""
    told = []

    def write(out: Path) -> None:
        write_report(out)
        told.append(Page(out).state)

    monkeypatch.setattr(tinydb.run, "write_report", write)
    return told


def test_run_writes_it_again_at_each_preview_and_checkpoint(teach, tmp_path, states, capsys):
    out = teach(tmp_path / "out", steps=5, sample_every=2, save_every=3)
    assert states == [f"Step {step} of 5, not finished yet" for step in (0, 2, 3, 4, 5)] + ["Step 5 of 5, finished"]
    page = Page(out)
    assert page.pictures[1:] == [(out / "samples" / f"step-00000{step}.png").read_bytes() for step in (4, 2)]
    assert any(text.startswith("python sample.py") and text.endswith("--weights OUT") for text in page.texts)
    assert str(tmp_path / "out") not in page.html
    assert str(out / "report.html") in capsys.readouterr().err


def test_resumed_run_goes_back_and_ends_in_the_same_page(teach, tmp_path, states):
    """Wherever it is."""
    settings = {"sample_every": 1, "save_every": 2}
    whole = teach(tmp_path / "whole", **settings)
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree(out / "model")
    states.clear()
    teach(out, resume=True, **settings)
    assert states[0] == "Step 2 of 4, not finished yet" and states[-1] == "Step 4 of 4, finished"
    assert (out / "report.html").read_bytes() == (whole / "report.html").read_bytes()


def test_finished_run_that_goes_on_is_not_finished(teach, tmp_path, states):
    out = teach(tmp_path / "out", steps=2, save_every=1)
    states.clear()
    teach(out, steps=4, save_every=1, resume=True)
    assert states[:2] == ["Step 2 of 4, not finished yet", "Step 3 of 4, not finished yet"]


def test_page_that_fails_does_not_change_the_training(teach, tmp_path, monkeypatch, capsys):
    def fail(out: Path) -> None:
        raise ZeroDivisionError("a fault of ours")

    whole = teach(tmp_path / "whole")
    monkeypatch.setattr(tinydb.run, "write_report", fail)
    out = teach(tmp_path / "out")
    assert files(out / "model") == files(whole / "model") and not (out / "report.html").exists()
    assert "no report this time: a fault of ours" in capsys.readouterr().err

"""A training run as one HTML page that needs nothing beside it: no script, no other file, no network."""

import json
import math
from base64 import b64encode
from html import escape
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

from PIL import Image

from tinydb.config import read_json
from tinydb.tokenizer import PLACEHOLDER
from tinydb.storage import written_whole

Curve = list[tuple[int, float]]  # steps and losses

PREVIEWS = 12  # at most on the page: one of Stable Diffusion's size is 2 MB
POINTS = 1000  # at most on a curve: one or two in a pixel

STYLE = """
:root { color-scheme: light dark; --page: #fff; --box: #f5f5f2; --rule: #e4e4e0; --faint: #686e76; --ink: #1d1f23;
        --instance: #c8500a; --prior: #1c6dc0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --box: #22252a; --rule: #32353a; --faint: #9a9fa7; --ink: #e7e7e3;
          --instance: #ff9a52; --prior: #6cb2ff; } }
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.125rem; }
p { margin: .25rem 0 .5rem; }
.note, th, dt { color: var(--faint); font-size: .8125rem; font-weight: normal; }
progress { width: 100%; accent-color: var(--instance); }
code { display: block; padding: .75rem 1rem; border-radius: .375rem; background: var(--box); user-select: all;
       font: .875rem/1.5 ui-monospace, monospace; }
img { display: block; width: 100%; border-radius: .25rem; }
table { width: 100%; table-layout: fixed; border-spacing: 0 .375rem; }
td { padding: 0; }
th { padding: 0 .25rem; line-height: 1.3; }
th:first-child { width: 4rem; padding: 0; text-align: left; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.5rem; margin: .5rem 0; padding: 0; list-style: none;
          font-size: .875rem; }
.legend li::before { content: ""; display: inline-block; width: 1.25rem; margin-right: .5rem; vertical-align: middle;
                     border-top: 3px solid var(--line); }
.instance_loss { --line: var(--instance); }
.prior_loss { --line: var(--prior); }
.validation_loss { --line: var(--ink); }
.plot { padding: 1.5rem 1rem 3rem 2.5rem; font-size: .75rem; }
.plot > svg { display: block; width: 100%; height: 16rem; overflow: visible; }
line { stroke: var(--rule); }
text { fill: var(--faint); text-anchor: middle; }
.level { text-anchor: end; }
polyline { fill: none; stroke: var(--line); stroke-width: 2.5; stroke-linejoin: round;
           vector-effect: non-scaling-stroke; }
.each { stroke-width: 1; opacity: .3; }
circle { fill: var(--line); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 0 2rem; margin: .5rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .25rem 0;
         border-bottom: 1px solid var(--rule); }
dt { flex: none; }
dd { margin: 0; font-size: .875rem; text-align: right; }
"""


def write_report(out: Path) -> None:
    """Write `out`/report.html from what a run has put into its folder `out` so far, finished or not.

    The page holds inputs.png and the previews as they are; of these the newest and, before it, every one, or every
    second, third, ... so that there are at most PREVIEWS. It tells no time, and where `out` is only if that is a
    relative path: the same run gives the same bytes. InputError where `out` holds no run or cannot be written to.
    """
    config, metrics = read_json(out / "config.json"), read_metrics(out / "metrics.jsonl")
    steps, done = config["steps"], metrics[-1]["step"] if metrics else 0
    finished = done == steps and (out / "model").exists()
    subject = escape(f"a photo of {config['identifier']} {config['class_noun']}")
    state = f"Step {done} of {steps}, {'finished' if finished else 'not finished yet'}"
    page = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{subject}: {state}</title>
<style>{STYLE}</style>
<h1>{subject}</h1>
<p>{state}</p>
<progress value="{done}" max="{steps}"></progress>
<h2>Try it</h2>
{command(out, config["class_noun"], finished)}
<h2>What the model sees</h2>
{picture(out / "inputs.png", "The pictures of the subject")}
<p class="note">{escape(parameters(out / "inputs.png"))}</p>
<h2>Previews</h2>
{previews(out / "samples", done)}
<h2>Losses</h2>
{loss_plot(metrics, steps) if metrics else '<p class="note">No step is done yet.</p>'}
<h2>Settings</h2>
{settings_list(config)}
</html>
"""
    with written_whole(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, one for each step; a last one that is there in half is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def sample_command(weights: Path, class_noun: str) -> str:
    """The line for a shell that draws the subject with a model folder."""
    return f'python sample.py "{PLACEHOLDER} {class_noun} on the moon" --weights {quote(weights.as_posix())}'


def command(out: Path, class_noun: str, finished: bool) -> str:
    """How to sample from the result or, as long as there is none, from the newest checkpoint."""
    saved = [out / "model"] if finished else sorted((out / "checkpoints").glob("step-*"))
    if not saved:
        return '<p class="note">Nothing is saved yet.</p>'
    path, remark = saved[-1], ""
    if out.is_absolute():
        path, remark = "OUT" / path.relative_to(out), '<p class="note">OUT is the folder of this page.</p>'
    return f"<code>{escape(sample_command(path, class_noun))}</code>{remark}"


def picture(path: Path, alt: str) -> str:
    """A PNG as part of the page."""
    return f'<img alt="{alt}" src="data:image/png;base64,{b64encode(path.read_bytes()).decode()}">'


def parameters(path: Path) -> str:
    """What a PNG says about itself, see pictures.save_png."""
    with Image.open(path) as image:
        return image.info.get("parameters", "")


def previews(folder: Path, done: int) -> str:
    """The grids in `folder`, a row for each step and a column for each prompt; none that a resumed run will redraw."""
    paths = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.png")}
    drawn = sorted((step for step in paths if step <= done), reverse=True)
    if not drawn:
        return '<p class="note">None yet; --sample-every N draws them.</p>'
    shown = drawn[:: math.ceil(len(drawn) / PREVIEWS)]
    remark = "" if shown == drawn else f" Here are {len(shown)} of {len(drawn)}; samples/ has them all."
    prompts = parameters(paths[shown[0]]).split(" | ")
    rows = [f"<tr><th>step{''.join(f'<th>{escape(prompt)}' for prompt in prompts)}"]
    for step in shown:
        rows.append(f'<tr><th>{step}<td colspan="{len(prompts)}">{picture(paths[step], f"Previews at step {step}")}')
    return "\n".join([f'<p class="note">From the same noise each time, the newest first.{remark}</p>',
                      "<table>", *rows, "</table>"])


def smoothed(metrics: list[dict[str, float]], name: str) -> tuple[Curve, Curve]:
    """A loss at each step (groups of them beyond POINTS), and its mean over the tenth of all steps around each."""
    size = math.ceil(len(metrics) / POINTS)
    groups = [metrics[i : i + size] for i in range(0, len(metrics), size)]
    steps = [group[-1]["step"] for group in groups]
    each = [fmean(line[name] for line in group) for group in groups]
    reach = len(each) // 20
    means = [fmean(each[max(0, i - reach) : i + reach + 1]) for i in range(len(each))]
    return list(zip(steps, each)), list(zip(steps, means))


def ticks(end: float) -> list[float]:
    """Round numbers at even distances from 0 to the first that is not below `end`: four to six of them."""
    unit = 10 ** math.floor(math.log10(end / 5))
    distance = next(unit * factor for factor in (1, 2, 5, 10) if 5 * unit * factor >= end)
    return [i * distance for i in range(math.ceil(end / distance) + 1)]


def loss_plot(metrics: list[dict[str, float]], steps: int) -> str:
    """The losses over a run of `steps` steps.

    The curves have the units of the data (x is the step, y minus the loss) and are stretched to the width of the page;
    all around them is placed in percent, so that text and lines are as large on a telephone as on a desk.
    """
    light, strong = {}, {}
    for name in ("instance_loss", "prior_loss"):
        if name in metrics[0]:
            light[name], strong[name] = smoothed(metrics, name)
    validation = [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    if validation:
        strong["validation_loss"] = validation
    levels = ticks(1.1 * max(loss for curve in strong.values() for _, loss in curve))
    top = levels[-1]  # single steps may lie above: they are cut off

    around = []
    for level in levels:
        y = f"{100 - 100 * level / top:g}%"
        around.append(f'<line x2="100%" y1="{y}" y2="{y}"/><text class="level" x="-8" y="{y}" dy="4">{level:g}</text>')
    for step in ticks(steps):
        if step <= steps:
            around.append(f'<text x="{100 * step / steps:g}%" y="100%" dy="20">{step:g}</text>')
    curves = [f'<polyline class="{name} {kind}" points="{" ".join(f"{step},{-loss:.4g}" for step, loss in curve)}"/>'
              for kind, group in (("each", light), ("mean", strong)) for name, curve in group.items()]
    dots = [f'<circle class="validation_loss" cx="{100 * step / steps:g}%" cy="{100 - 100 * loss / top:g}%" r="3"/>'
            for step, loss in validation]
    legend = [f'<li class="{name}">{name.replace("_", " ")} {curve[-1][1]:.3g}</li>' for name, curve in strong.items()]
    return "\n".join([
        '<ul class="legend">', *legend, "</ul>",
        '<div class="plot"><svg role="img" aria-label="Losses over steps">', *around,
        '<text x="50%" y="100%" dy="40">step</text><text class="level" x="-8" dy="-14">loss</text>',
        f'<svg viewBox="0 {-top:g} {steps} {top:g}" preserveAspectRatio="none">', *curves, "</svg>",
        *dots, "</svg></div>",
        '<p class="note">Light: step by step. Strong: the mean around a step. Validation: both losses together, on '
        "noise that stays the same.</p>"])


def settings_list(config: dict[str, Any]) -> str:
    """The entries of config.json but for `out`: this page lies there, wherever that is moved."""
    entries = config | {f"run: {name}": value for name, value in config["run"].items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()
             if name not in ("out", "run")}
    rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items()]
    return "\n".join(["<dl>", *rows, "</dl>"])

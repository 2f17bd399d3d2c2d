"""A training run as one HTML page that needs nothing beside it: no script, no other file, no network."""

import json
import math
from base64 import b64encode
from contextlib import suppress
from html import escape
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

from PIL import Image

from tinydb.config import read_json
from tinydb.storage import LORA_FILE, by_step, checkpoints, step_of, written_whole
from tinydb.tokenizer import PLACEHOLDER

PREVIEWS = 12  # at most on the page: one of Stable Diffusion's size is 2 MB
POINTS = 1000  # at most on a curve: one or two in a pixel
PLOTS = {  # what is on a plot, by its title: names in metrics.jsonl, and in the style below
    "Losses": ("instance_loss", "prior_loss"), "Likeness to your pictures, by CLIP": ("likeness",),
    "Fit to the prompts, by CLIP": ("prompt",),
}

STYLE = """
:root { color-scheme: light dark; --instance_loss: #c8500a; --prior_loss: #1c6dc0;
        --likeness: #c8500a; --prompt: #1c6dc0; }
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif;
       font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.125rem; }
progress, img, table, svg { width: 100%; }
img { display: block; border-radius: .25rem; }
code { display: block; padding: .75rem 1rem; background: #8882; user-select: all; }
table { table-layout: fixed; }
th { font-size: .8125rem; font-weight: normal; }
th:first-child { width: 4rem; text-align: left; }
.note, .level { opacity: .65; font-size: .8125rem; }
.lines { white-space: pre-line; }
.plot { padding: 1rem 1rem 2.5rem 2.5rem; }
svg { display: block; height: 16rem; overflow: visible; fill: currentColor; font-size: .75rem; }
polyline { fill: none; stroke-width: 2.5; vector-effect: non-scaling-stroke; }
polyline.each { stroke-width: 1; opacity: .3; }
dl { columns: 19rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid #8884; }
dd { margin: 0; text-align: right; }
"""


def write_report(out: Path) -> None:
    """Write `out`/report.html from what a run has put into its folder `out` so far, finished or not.

    The page holds no time of day, and names `out` only where that is a relative path: the same run gives the same
    bytes. InputError where `out` holds no run or cannot be written to.
    """
    config, metrics = read_json(out / "config.json"), read_metrics(out / "metrics.jsonl")
    steps, done = config["steps"], metrics[-1]["step"] if metrics else 0
    result = out / (LORA_FILE if config.get("lora") else "model")
    finished = done == steps and result.exists()
    saved = finished or bool(checkpoints(out))
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
{command(out, config["class_noun"], saved)}
<h2>What the model sees</h2>
{picture(out / "inputs.png", "The pictures of the subject")}
<p class="note lines">{escape(parameters(out / "inputs.png"))}</p>
<h2>Previews</h2>
{previews(out / "samples", done)}
{"".join(plot(title, metrics, steps) for title in PLOTS)}
<h2>Settings</h2>
{settings_list(config)}
</html>
"""
    with written_whole(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, one for each step; those that are damaged, or there in half, are left out."""
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry and all(
                    type(value) in (int, float) and abs(value) < 1e30 for value in entry.values()):
                metrics.append(entry)
    return metrics


def sample_command(out: Path, class_noun: str) -> str:
    """The line for a shell that draws the subject with what is in a run's folder, or in that of a checkpoint."""
    prompt = f"{PLACEHOLDER} {class_noun} on the moon"
    return f"python sample.py {quote(prompt)} --weights {quote(out.as_posix())}"


def command(out: Path, class_noun: str, saved: bool) -> str:
    """How to sample from the run, once something of it is saved."""
    if not saved:
        return '<p class="note">Nothing is saved yet.</p>'
    path, remark = out, ""
    if out.is_absolute():
        path, remark = Path("OUT"), '<p class="note">OUT is the folder of this page.</p>'
    return f"<code>{escape(sample_command(path, class_noun))}</code>{remark}"


def picture(path: Path, alt: str) -> str:
    """A PNG as part of the page."""
    return f'<img alt="{alt}" src="data:image/png;base64,{b64encode(path.read_bytes()).decode()}">'


def parameters(path: Path) -> str:
    """What a PNG says about itself, see pictures.save_png."""
    with Image.open(path, formats=["PNG"]) as image:
        return image.info.get("parameters", "")


def previews(folder: Path, done: int) -> str:
    """The grids in `folder`, a row for each step and a column for each prompt; not those that a resumed run draws
    again. Of many, every second, third, ... from the newest."""
    drawn = [path for path in by_step(folder, ".png") if step_of(path) <= done][::-1]
    if not drawn:
        return '<p class="note">None yet; --sample-every N draws them.</p>'
    prompts = parameters(drawn[0]).split(" | ")
    rows = [f"<tr><th>step{''.join(f'<th>{escape(prompt)}' for prompt in prompts)}"]
    for path in drawn[:: math.ceil(len(drawn) / PREVIEWS)]:
        alt = f"Previews at step {step_of(path)}"
        rows.append(f'<tr><th>{step_of(path)}<td colspan="{len(prompts)}">{picture(path, alt)}')
    note = f"From the same noise each time, the newest first. samples/ has all {len(drawn)}."
    return "\n".join([f'<p class="note">{note}</p>', "<table>", *rows, "</table>"])


def plot(title: str, metrics: list[dict[str, float]], steps: int) -> str:
    """Numbers over a run of `steps` steps: light, each of them (groups of them beyond POINTS), and strong, the mean of
    the tenth of all around it. Empty where there are none.

    The curves have the units of the data (x is the step, y minus the number), stretched to the width of the page.
    """
    curves, legend, top, bottom = [], [], 0.0, 0.0
    for name in PLOTS[title]:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if len(points) < 2:  # no line
            continue
        size = math.ceil(len(points) / POINTS)
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        each = [(group[-1][0], fmean(value for _, value in group)) for group in groups]
        reach = len(each) // 20
        mean = [(step, fmean(value for _, value in each[max(0, i - reach) : i + reach + 1]))
                for i, (step, _) in enumerate(each)]
        for kind, curve in (("each", each), ("mean", mean)):
            line = " ".join(f"{step},{-value:.4g}" for step, value in curve)
            curves.append(f'<polyline class="{kind}" stroke="var(--{name})" points="{line}"/>')
        legend.append(f'<b style="color: var(--{name})">{name.replace("_", " ")} {mean[-1][1]:.3g}</b>')
        means = [value for _, value in mean]  # single steps may lie outside
        top, bottom = max(top, 1.1 * max(means)), min(bottom, 1.1 * min(means))
    if not curves:
        return ""
    heights = [bottom + (top - bottom) * i / 4 for i in range(5)]
    levels = [f'<text class="level" x="-40" y="{100 - 25 * i}%">{height:.2g}</text>'
              for i, height in enumerate(heights)]
    marks = [f'<text class="level" x="{25 * i}%" y="100%" dy="20">{steps * i / 4:g}</text>' for i in range(5)]
    return "\n".join([
        f"<h2>{title}</h2>", f'<p>{", ".join(legend)}</p>',
        f'<div class="plot"><svg role="img" aria-label="{title} over steps">',
        *levels, *marks, f'<svg viewBox="0 {-top:g} {steps} {top - bottom:g}" preserveAspectRatio="none">', *curves,
        "</svg></svg></div>", '<p class="note">Light: step by step. Strong: the mean around a step.</p>'])


def settings_list(config: dict[str, Any]) -> str:
    """The entries of config.json but for `out`: this page lies there, wherever that is moved."""
    entries = config | {f"run: {name}": value for name, value in config["run"].items()}
    rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in entries.items()
            if name not in ("out", "run")]
    return "\n".join(["<dl>", *rows, "</dl>"])

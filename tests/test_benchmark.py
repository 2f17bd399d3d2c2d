"""The benchmark measures what it says, here on a model of 16 pixels, in the low precision that a GPU would use."""

from dataclasses import replace

import benchmark
import pytest
import torch
from conftest import small

import tinydb


@pytest.fixture
def model(nano) -> benchmark.Model:
    return benchmark.Model(nano, torch.device("cpu"), torch.bfloat16)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]


@pytest.mark.parametrize("encode, lora", [(True, 0), (False, 0), (True, 2)])
def test_row_of_a_training_step(model, encode, lora):
    """On a machine of 1 GFLOP/s and 1 GB/s."""
    row = replace(benchmark.step_row(model, "a step", 2, "0.5", encode=encode, lora=lora), repeats=2)
    name, ours, theirs, ratio, goal, floor = cells(benchmark.measure(row, 1, 1e9, 1e9))
    assert (name, goal) == ("a step", "0.5") and (floor == "" if lora else float(floor[:-1]) > 0)
    assert float(ratio) == pytest.approx(float(ours[:-2]) / float(theirs[:-2]), abs=0.02)


def test_row_of_drawing(model):
    *_, floor = cells(benchmark.measure(benchmark.draw_row(model, "pictures", 2, "0.5"), 1, 1e9, 1e9))
    assert float(floor[:-1]) > 0


def test_rows_of_a_gpu(model, tmp_path, one_thread, monkeypatch):
    """All of them, in miniature: the code that a GPU will run."""
    monkeypatch.setattr(benchmark, "STEPS", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with one, too
    rows = benchmark.gpu_rows(model, 2, tmp_path)
    table = {row.name: cells(benchmark.measure_gpu(row, 1e9, 1e9)) for row in rows}
    assert len(table) == len(rows)
    for name, (_, ours, theirs, ratio, goal, floor, peak, planned, their_peak, waits) in table.items():
        assert float(ours.removesuffix(" s")) > 0 and goal and peak == "0.0"
        if theirs:
            assert float(ratio) == pytest.approx(float(ours[:-2]) / float(theirs[:-2]), rel=0.05, abs=0.006)
    for name in ("step, batch 1+1", "step, batch 4+4", "--freeze-text", "--recompute", "--lora 16"):
        assert table[name][-1] == "1" and table[name][7] == "0.0"  # one wait a step, and a plan


def test_row_that_does_not_fit_is_said_and_the_next_one_measured(model):
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    numbers = benchmark.Numbers(2.0, 3e9, 1.0, 4e9)
    ours_fails = benchmark.measure_gpu(benchmark.GpuRow("a step", "1", fails, lambda: numbers), 1e9, 1e9)
    theirs_fails = benchmark.measure_gpu(benchmark.GpuRow("a step", "1", lambda: numbers, fails), 1e9, 1e9)
    assert cells(ours_fails) == ["a step", "out of memory", "2 s", "", "1", "", "", "", "3.0", ""]
    assert cells(theirs_fails) == ["a step", "2 s", "out of memory", "", "1", "", "3.0", "4.0", "", "1"]


@pytest.mark.parametrize("batch", [1, 2])
def test_floor_counts_attention(model, batch):
    """Whose kernels torch's counter knows on no CPU; twice the batch is twice the work, but for the text."""
    floors = [benchmark.step_floor(model, n).flops for n in (batch, 2 * batch)]
    assert 1.5 < floors[1] / floors[0] < 2


def test_model_with_random_weights(monkeypatch, tmp_path):
    """Which stands for Stable Diffusion 1.5 where its weights cannot be had; here in small."""
    kind = small("nano")
    text_encoder = replace(kind.text, vocab_size=benchmark.SD1.text_encoder.vocab_size)
    kind = replace(benchmark.SD1, text_encoder=text_encoder, unet=kind.unet, vae=kind.vae)
    monkeypatch.setattr(benchmark, "SD1", kind)
    sd = tinydb.load(benchmark.stable_diffusion(tmp_path / "model"))
    assert sd.tokenizer.max_length == 77 and sd.generate("a dog", steps=2)[0].size == (16, 16)
    assert all(tensor.isfinite().all() for part in (sd.text_encoder, sd.unet, sd.vae) for tensor in part.parameters())


def test_without_a_gpu_nothing_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main(benchmark.Settings(device="cuda"))
    assert "no GPU" in capsys.readouterr().out

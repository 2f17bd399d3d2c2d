"""The benchmark measures what it says, here on a model of 16 pixels, in the low precision that a GPU would use."""

import benchmark
import pytest
import torch



@pytest.fixture
def model(nano) -> benchmark.Model:
    return benchmark.Model(nano, torch.device("cpu"), torch.bfloat16)


def cells(row: benchmark.Row) -> list[str]:
    """What the table has for a row on a machine of 1 GFLOP/s and 1 GB/s."""
    return [cell.strip() for cell in benchmark.measure(row, 1, 1e9, 1e9).strip("|").split("|")]


@pytest.mark.parametrize("encode", [True, False])
def test_row_of_a_training_step(model, encode):
    name, ours, theirs, ratio, goal, floor = cells(benchmark.step_row(model, "a step", 2, "0.5", encode=encode))
    assert (name, goal) == ("a step", "0.5") and float(floor[:-1]) > 0
    assert float(ratio) == pytest.approx(float(ours[:-2]) / float(theirs[:-2]), abs=0.02)


def test_row_of_drawing(model):
    *_, floor = cells(benchmark.draw_row(model, "pictures", 2, "0.5"))
    assert float(floor[:-1]) > 0

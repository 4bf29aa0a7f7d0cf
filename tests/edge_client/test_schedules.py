"""Schedules against values by hand, torch's schedulers and the formula of Vaswani et al."""

from __future__ import annotations

import math

import pytest

from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.protocol.training import ScheduleConfig


def factors(steps=8, **config):
    return [learning_rate_factor(ScheduleConfig(**config), step, steps) for step in range(steps)]


def test_constant():
    assert factors(3) == [1, 1, 1]


def test_step():
    assert factors(7, name="step", step_size=3, gamma=0.5) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_linear_reaches_zero_after_the_last_step():
    assert factors(4, name="linear") == [1, 0.75, 0.5, 0.25]
    assert factors(4, name="linear", total_steps=2) == [1, 0.5, 0, 0]


def test_warm_up_comes_before_and_is_not_counted():
    assert factors(6, name="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors(5, name="step", step_size=1, gamma=0.1, warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.1, 0.01])


def test_warm_up_longer_than_the_training():
    assert factors(2, name="cosine", warmup_steps=4) == [0.25, 0.5]


@pytest.mark.parametrize("total", [5, 8])
def test_cosine_equals_torch(total):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors(total, name="cosine") == pytest.approx(expected, abs=1e-7)


def test_cosine_stays_at_zero():
    assert factors(4, name="cosine", total_steps=2) == pytest.approx([1, 0.5, 0, 0])


def test_noam_is_the_papers_formula_with_its_peak_at_one():
    model, warmup = 512, 4
    paper = [model**-0.5 * min(s**-0.5, s * warmup**-1.5) for s in range(1, 21)]
    got = factors(20, name="noam", warmup_steps=warmup)
    assert got == pytest.approx([value / max(paper) for value in paper])
    assert got[3] == 1
    assert factors(4, name="noam") == pytest.approx([1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5])

"""When a run is over."""

from __future__ import annotations

import math

import pytest

from edgetrain.coordinator.config import StopConfig
from edgetrain.coordinator.stopping import stop_reason


def losses(*values):
    return [(value, None) for value in values]


def accuracies(*values):
    return [(None, value) for value in values]


def test_without_rules_it_never_stops():
    assert stop_reason(StopConfig(), losses(*[1.0] * 50)) is None


def test_target_accuracy():
    config = StopConfig(target_accuracy=0.9)
    assert stop_reason(config, []) is None
    assert stop_reason(config, accuracies(0.95, 0.89)) is None, "only the last counts"
    assert stop_reason(config, accuracies(0.89, 0.9)) == "accuracy 0.9000 reached the target of 0.9"
    assert stop_reason(config, accuracies(0.95, None)) is None, "not evaluated"


PATIENT = StopConfig(patience=2, min_improvement=0.5)


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ((3.0, 2.0), False),  # too early to say
        ((3.0, 3.0, 2.75), True),
        ((3.0, 3.0, 2.5), False),  # exactly the improvement asked for
        ((3.0, 2.0, 2.5), False),  # the best of the last two counts
        ((1.0, 2.0, 2.0), True),
        ((3.0, None, 3.0, None, 2.9), True),  # rounds without evaluation do not count
        ((3.0, None, 3.0), False),
        ((3.0, math.nan, 2.75), False),  # nor do those that are not finite
        ((3.0, math.nan, math.inf, 3.0, 2.75), True),
        ((math.nan, 3.0, 3.0, 3.0), True),
    ],
)
def test_convergence_of_the_loss(history, stops):
    assert (stop_reason(PATIENT, losses(*history)) is not None) is stops


def test_convergence_of_the_accuracy_goes_up():
    config = StopConfig(patience=2, min_improvement=0.05, metric="accuracy")
    assert stop_reason(config, accuracies(0.5, 0.6, 0.7)) is None
    assert stop_reason(config, accuracies(0.7, 0.71, 0.74)) is not None
    assert "accuracy has not improved by 0.05 over 2 rounds" in stop_reason(config, accuracies(0.7, 0.7, 0.7))

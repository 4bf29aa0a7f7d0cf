"""Strategies of users: from a file, from an installed package, and what goes wrong with them."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from edgetrain.coordinator.strategies import described, make_strategy
from edgetrain.protocol.errors import ConfigError
from support.contributions import contribution, run_round

EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'own_strategy.py'}:tempered"
ITEMS = [contribution("a", [1.0, 0.0], examples=4), contribution("b", [0.0, 2.0], examples=100)]


@pytest.mark.parametrize(
    ("power", "expected"),
    [(1.0, [4 / 104, 200 / 104]), (0.0, [0.5, 1.0]), (0.5, [2 / 12, 20 / 12])],
)
def test_the_example_weighs_as_it_says(power, expected):
    strategy = make_strategy({"name": EXAMPLE, "power": power})
    after, _ = run_round(strategy, [0, 0], ITEMS)
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    again, _ = run_round(strategy, [0, 0], ITEMS[::-1])
    assert after.tobytes() == again.tobytes()


def test_the_example_goes_into_wrappers():
    strategy = make_strategy({"name": "fedavgm", "inner": {"name": EXAMPLE, "power": 0}})
    assert described(strategy) == "fedavgm(tempered)"
    np.testing.assert_allclose(run_round(strategy, [0, 0], ITEMS)[0], [0.5, 1.0])


def test_its_options_are_checked():
    with pytest.raises(ConfigError, match="<= 1"):
        make_strategy({"name": EXAMPLE, "power": 2})
    with pytest.raises(ConfigError, match="no setting called `powr`"):
        make_strategy({"name": EXAMPLE, "powr": 1})


def test_an_installed_strategy_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from edgetrain.coordinator.strategies import make_strategy\n"
        "def plain():\n    return make_strategy({'name': 'fedavg', 'weighted': False})\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgetrain.strategies]\nplain = theirs:plain\nlost = theirs:no\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [point.name for point in importlib.metadata.entry_points(group="edgetrain.strategies")]
    np.testing.assert_allclose(run_round(make_strategy("plain"), [0, 0], ITEMS)[0], [0.5, 1.0])
    with pytest.raises(ConfigError, match="theirs:no cannot be imported"):
        make_strategy("lost")
    with pytest.raises(ConfigError, match="lost, median"):
        make_strategy("unknown")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(**options): ...", "without \\* and"),
        ("def make(): return 3", "returned a int, not a Strategy"),
        ("make = 3", "is not a function"),
        ("", "is not a function"),
        ("1/0", "raised while it was imported: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        make_strategy(f"{tmp_path / 'mine.py'}:make")
    with pytest.raises(ConfigError, match="no such file"):
        make_strategy(f"{tmp_path / 'nowhere.py'}:make")

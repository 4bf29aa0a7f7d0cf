"""Robust strategies against brute force, and against attackers."""

import itertools

import numpy as np
import pytest

from edgetrain.coordinator.strategies import Setting, make_strategy
from edgetrain.coordinator.strategies.comparing import count_byzantine
from edgetrain.coordinator.strategies.table import UpdateTable
from edgetrain.protocol.codecs import CodecSpec, SparseOrDense
from edgetrain.protocol.errors import ConfigError
from support.contributions import contribution, run_deltas

RNG = np.random.default_rng(5)
ROWS = RNG.normal(size=(11, 40)).astype(np.float32)


def test_the_median_of_every_coordinate():
    assert run_deltas(make_strategy("median"), [[1, 9], [5, -7], [2, 0]]).tolist() == [2, 0]
    assert run_deltas(make_strategy("median"), [[1, 9], [5, -7], [2, 0], [3, 1]]).tolist() == [2.5, 0.5]


def test_the_trimmed_mean_by_hand():
    rows = [[-100.0], [1.0], [2.0], [6.0], [1e6]]
    assert run_deltas(make_strategy({"name": "trimmed-mean", "byzantine": 0.2}), rows).tolist() == [3.0]
    assert run_deltas(make_strategy({"name": "trimmed-mean", "byzantine": 0.4}), rows).tolist() == [2.0]


def brute_scores(rows, f):
    """Krum's scores from the definition."""
    rows, scores = rows.astype(np.float64), []
    for i in range(len(rows)):
        distances = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows)) if j != i)
        scores.append(sum(distances[: max(1, len(rows) - f - 2)]))
    return np.array(scores)


def test_krum_is_the_row_with_the_lowest_score():
    after = run_deltas(make_strategy({"name": "krum", "byzantine": 0.25}), ROWS)
    np.testing.assert_allclose(after, ROWS[brute_scores(ROWS, 3).argmin()], rtol=1e-6)


def test_multi_krum_is_the_mean_of_the_lowest():
    order = np.argsort(brute_scores(ROWS, 3))
    after = run_deltas(make_strategy({"name": "multi-krum", "byzantine": 0.25}), ROWS)
    np.testing.assert_allclose(after, ROWS[order[:8]].mean(axis=0), rtol=1e-5, atol=1e-7)
    after = run_deltas(make_strategy({"name": "multi-krum", "byzantine": 0.25, "keep": 2}), ROWS)
    np.testing.assert_allclose(after, ROWS[order[:2]].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_bulyan_by_its_definition():
    f, left, chosen = 2, list(range(11)), []
    while len(chosen) < 11 - 2 * f:
        chosen.append(left.pop(int(brute_scores(ROWS[left], f).argmin())))
    expected = []
    for column in ROWS[chosen].astype(np.float64).T:
        middle = np.median(column)
        expected.append(np.mean(sorted(column, key=lambda value: abs(value - middle))[: 11 - 4 * f]))
    after = run_deltas(make_strategy({"name": "bulyan", "byzantine": 0.18}), ROWS)
    assert count_byzantine(0.18, 11) == f
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-7)


def test_the_geometric_median_has_the_least_sum_of_distances():
    rows = ROWS[:, :3].astype(np.float64)
    best = run_deltas(make_strategy("geometric-median"), rows).astype(np.float64)

    def cost(point):
        return np.linalg.norm(rows - point, axis=1).sum()

    for direction in itertools.product((-1, 0, 1), repeat=3):
        assert cost(best) <= cost(best + 1e-2 * np.array(direction)) + 1e-9
    # Its condition: the unit vectors towards the points cancel.
    units = (rows - best) / np.linalg.norm(rows - best, axis=1, keepdims=True)
    assert np.linalg.norm(units.sum(axis=0)) < 1e-4


def test_the_geometric_median_of_a_line_and_of_a_fermat_point():
    line = run_deltas(make_strategy("geometric-median"), [[0.0], [1.0], [50.0]])
    assert line[0] == pytest.approx(1.0, abs=1e-3)
    triangle = run_deltas(make_strategy("geometric-median"), [[0, 0], [4, 0], [2, 2 * 3**0.5]])
    np.testing.assert_allclose(triangle, [2, 2 / 3**0.5], rtol=1e-5)


def test_the_weighted_geometric_median_stays_where_the_weight_is():
    strategy = make_strategy({"name": "geometric-median", "weighted": True})
    partial = strategy.init(1, {})
    for name, value, examples in (("a", 0.0, 10), ("b", 1.0, 1), ("c", 2.0, 1)):
        partial = strategy.fold(partial, contribution(name, [value], examples=examples))
    after, _ = strategy.finish(partial, np.zeros(1, np.float32), {})
    assert abs(after[0]) < 1e-5


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median"])
def test_three_of_fifteen_cannot_move_it_far(name):
    rng = np.random.default_rng(1)
    honest = 1 + 0.1 * rng.normal(size=(12, 30))
    attack = np.full((3, 30), -1e4)
    after = run_deltas(make_strategy(name), np.concatenate([honest, attack]))
    assert np.abs(after - 1).max() < 0.3
    average = run_deltas(make_strategy("fedavg"), np.concatenate([honest, attack]))
    assert np.abs(average - 1).max() > 1000


# --- the table ---------------------------------------------------------------------------------------


def test_the_table_is_the_same_in_blocks_on_disk_and_sparse():
    rng = np.random.default_rng(3)
    dense = rng.normal(size=(6, 1000)).astype(np.float32)
    dense[:, rng.random(1000) < 0.7] = 0
    whole, tight = UpdateTable(1000), UpdateTable(1000, memory_bytes=5000, block_bytes=6 * 8 * 37)
    for number, row in enumerate(dense):
        whole.add(contribution(f"c{number}", row))
        indices = np.flatnonzero(row)
        sparse = SparseOrDense(1000, indices, row[indices])
        tight.add(contribution(f"c{number}", sparse if number % 2 else row))
    assert len(list(tight.blocks())) == 28
    np.testing.assert_array_equal(np.concatenate([block for _, block in tight.blocks()], axis=1), dense)
    np.testing.assert_allclose(tight.gram(), dense.astype(np.float64) @ dense.T.astype(np.float64))
    np.testing.assert_allclose(whole.gram(), tight.gram())
    mapped = [row.position for row in tight._rows if row.update is None]
    assert len(mapped) == 2


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "bulyan"])
def test_coordinate_wise_strategies_refuse_sparse_codecs(name):
    setting = Setting(codec=CodecSpec.parse("topk:0.05|int8"), minimum=15, goal=15)
    with pytest.raises(ConfigError, match=r"dense codec such as 'dense\|int8'"):
        make_strategy(name, setting)
    make_strategy(name, Setting(minimum=15, goal=15))


@pytest.mark.parametrize(("name", "least"), [("trimmed-mean", 3), ("krum", 5), ("multi-krum", 5), ("bulyan", 7)])
def test_strategies_need_their_majority(name, least):
    table = {"name": name, "byzantine": 0.1}
    make_strategy(table, Setting(minimum=least, goal=least))
    with pytest.raises(ConfigError, match=r"raise rounds\.goal"):
        make_strategy(table, Setting(minimum=least - 1, goal=10))


def test_comparing_strategies_refuse_secure_aggregation():
    with pytest.raises(ConfigError, match="only sums are seen"):
        make_strategy({"name": "fedadam", "inner": "median"}, Setting(minimum=3, goal=3, only_sums=True))

"""Who is whose neighbour, and how many neighbours are enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation.graph import choose_topology, is_secure, make_graph


@given(size=st.integers(4, 60), half=st.integers(1, 20), seed=st.binary(min_size=32, max_size=32))
def test_regular_symmetric_and_the_same_for_everybody(size, half, seed):
    degree = min(2 * half, size - 1)
    graph = make_graph(size, degree, seed)
    assert graph == make_graph(size, degree, seed)
    for client in range(size):
        neighbours = graph.neighbours(client)
        assert len(neighbours) == len(set(neighbours)) == degree
        assert client not in neighbours
        assert list(neighbours) == sorted(neighbours)
        assert all(client in graph.neighbours(other) for other in neighbours)
        assert graph.holders(client) == sorted({*neighbours, client})


def test_neighbours_are_uniform():
    """Over seeds, every other client is a neighbour equally often: 19 others, 4 of them, 2,000 seeds."""
    counts = np.zeros(20)
    for seed in range(2000):
        counts[list(make_graph(20, 4, seed.to_bytes(32, "little")).neighbours(3))] += 1
    assert counts[3] == 0
    expected = 2000 * 4 / 19
    others = np.delete(counts, 3)
    # 18 degrees of freedom, standard deviation 6.
    assert ((others - expected) ** 2 / expected).sum() < 18 + 5 * 6


@pytest.mark.parametrize(("size", "degree"), [(5, 5), (5, 0), (9, 3), (2, 4)])
def test_graphs_that_there_are_not(size, degree):
    with pytest.raises(SecureAggregationError, match="no graph"):
        make_graph(size, degree, bytes(32))


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("size", [3, 4, 5, 10, 50, 100, 1000])
def test_the_choice_is_secure_and_a_smaller_threshold_is_not(size, lying):
    degree, threshold = choose_topology(size, dropout=0.2, colluding=0.1, lying=lying)
    assert is_secure(size, degree, threshold, colluding=0.1, lying=lying)
    assert 2 * threshold > degree + 1
    weaker = threshold - 1
    # Not a majority any more, or too few against those who collude.
    assert not is_secure(size, degree, weaker, colluding=0.1, lying=lying)


def test_what_a_choice_promises_by_simulation():
    """100 clients, 30 dropped out, 5 colluding: no neighbourhood in 300 random rounds fails or gives way."""
    generator = np.random.default_rng(0)
    degree, threshold = choose_topology(100, dropout=0.3, colluding=0.05, lying=True)
    assert degree < 99
    for seed in range(300):
        graph = make_graph(100, degree, seed.to_bytes(32, "little"))
        gone = set(generator.choice(100, 30, replace=False).tolist())
        bad = set(generator.choice(100, 5, replace=False).tolist())
        for client in range(100):
            holders = set(graph.holders(client))
            assert len(holders - gone) >= threshold
            assert 2 * threshold > len(holders) + len(holders & bad - {client})


def test_more_colluders_need_more_neighbours():
    degrees = [choose_topology(1000, dropout=0.1, colluding=share, lying=True)[0] for share in (0.0, 0.05, 0.1, 0.2)]
    assert degrees == sorted(set(degrees))
    assert degrees[-1] < 999

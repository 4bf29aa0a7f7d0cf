"""Who shares masks and secrets with whom: a ring in random order, everyone with the k/2 next on either side.

Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020, section 3: a Harary
graph H(k, n) whose nodes are permuted at random, so that a client's neighbours are k uniform others and the graph
stays connected unless k/2 nodes that stand next to each other are all missing. With k = n - 1 it is the complete
graph of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017.

The order comes from the digest of the roster, which is made of all clients' keys: both sides compute it, and
nobody chooses it alone.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from edgetrain.protocol.combinatorics import log_binomial
from edgetrain.protocol.errors import SecureAggregationError

# The chance that a client's secrets can be had by those who must not, or that a whole round fails for the
# dropouts that it was chosen for (Bell et al. use 2^-40 and 2^-20, too).
SECURITY_BITS = 40
CORRECTNESS_BITS = 20
# Among so few, fewer neighbours than everybody would save next to nothing.
SMALL = 32


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one session. Clients are called 0 to size - 1, their positions in the roster.

    Attributes:
        degree: neighbours of each; even, or the number of clients less one.
        adjacent: the neighbours of each client, ascending.
    """

    degree: int
    adjacent: tuple[tuple[int, ...], ...]

    def neighbours(self, client: int) -> tuple[int, ...]:
        """Ascending."""
        return self.adjacent[client]

    def holders(self, client: int) -> list[int]:
        """Who holds shares of a client's secrets: its neighbours and itself, ascending."""
        return sorted([*self.adjacent[client], client])


def make_graph(size: int, degree: int, seed: bytes) -> Graph:
    """The graph that a seed stands for: clients in the order of SHA-256(seed | position, u32 little-endian).

    Raises:
        SecureAggregationError: there is no such graph.
    """
    if not (0 < degree <= size - 1 and (degree == size - 1 or degree % 2 == 0)):
        raise SecureAggregationError(f"no graph of {size} clients has {degree} neighbours for each")
    order = sorted(range(size), key=lambda client: hashlib.sha256(seed + client.to_bytes(4, "little")).digest())
    half = degree // 2
    # With everybody for a neighbour the ring does not matter; degree may be odd then.
    steps = range(1, size) if degree == size - 1 else (*range(-half, 0), *range(1, half + 1))
    adjacent: list[tuple[int, ...]] = [()] * size
    for place, client in enumerate(order):
        adjacent[client] = tuple(sorted(order[(place + step) % size] for step in steps))
    return Graph(degree, tuple(adjacent))


def choose_topology(size: int, *, dropout: float, colluding: float, lying: bool) -> tuple[int, int]:
    """(degree, threshold) for a number of clients: the smallest degree that is secure and correct.

    A client's secrets are shared among m = degree + 1 holders and need t of them. With c of them colluding:

    - t - 1 >= c: what colluders hold of an honest client's secrets tells nothing.
    - 2 t > m: nobody can have both kinds of share from t honest holders each. If the server lies, colluders
      serve both sides, so then 2 t > m + c.
    - at least t of the holders survive, also of a client that has dropped out itself.
    - the graph of honest survivors is connected: no k/2 next to each other are all colluding or gone.

    Each may fail for any of the `size` clients with a total probability of 2^-40, the third of 2^-20; since
    neighbours are uniform, c is hypergeometric.

    Args:
        size: number of clients.
        dropout: largest share of them that may drop out.
        colluding: largest share of them that may collude with the server.
        lying: also against a server that deviates from the protocol.
    """
    gone, bad = math.floor(dropout * size), math.floor(colluding * size)
    others = size - 1
    for degree in range(4, others if size > SMALL else 0, 2):
        if size * _run(size, gone + bad, degree // 2) > 2.0**-SECURITY_BITS:
            continue
        # The smallest threshold that is secure is the best for dropouts.
        holders = degree + 1
        threshold = _least_threshold(size, bad, degree, lying=lying)
        if threshold is None:
            continue
        if size * _tail(others, gone, degree, degree - threshold + 1) <= 2.0**-CORRECTNESS_BITS:
            return degree, min(threshold, holders)
    if lying:
        return others, (size + bad) // 2 + 1
    return others, max(size // 2, bad) + 1


def is_secure(size: int, degree: int, threshold: int, *, colluding: float, lying: bool) -> bool:
    """Whether a client goes along with a topology that the server has chosen; one bit is left for rounding."""
    bad, holders = math.floor(colluding * size), degree + 1
    if not holders < 2 * threshold <= 2 * holders:
        return False
    enough = 2 * threshold - holders if lying else threshold
    return size * _tail(size - 1, bad, degree, enough) <= 2.0 ** (1 - SECURITY_BITS)


def _least_threshold(size: int, bad: int, degree: int, *, lying: bool) -> int | None:
    holders = degree + 1
    for threshold in range(holders // 2 + 1, degree + 1):
        enough = 2 * threshold - holders if lying else threshold
        if size * _tail(size - 1, bad, degree, enough) <= 2.0**-SECURITY_BITS:
            return threshold
    return None


def _run(size: int, missing: int, length: int) -> float:
    """The chance that `length` given clients are all among the `missing`."""
    if length > missing:
        return 0.0
    return math.exp(log_binomial(size - length, missing - length) - log_binomial(size, missing))


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """The chance of at least `least` marked ones among `drawn` of a population."""
    low, high = max(least, 0, drawn - (population - marked)), min(drawn, marked)
    total = log_binomial(population, drawn)
    return sum(
        math.exp(log_binomial(marked, count) + log_binomial(population - marked, drawn - count) - total)
        for count in range(low, high + 1)
    )

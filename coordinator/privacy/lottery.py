"""Who takes part in a round whose privacy counts on chance.

Amplification by sampling holds only if nobody can predict the sample, so it is drawn from a cryptographically strong
generator and not from the run's seed, which every plan names. And only if nothing else decides: those who were drawn
are waited for (up to the deadline), and nobody takes the place of one who is away.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.coordinator.privacy.chance import NEGLIGIBLE, chance_of_fewer
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.strategies import Private
from edgetrain.protocol.errors import ConfigError, SecureAggregationError
from edgetrain.protocol.privacy.randomness import Keystream, RandomBytes, bernoulli, sample


class Lottery:
    """Draws the clients of rounds.

    Args:
        private: of the strategy; its release says how it is drawn.
        random_bytes: from the operating system if left out.
        least: fewest whose sum secure aggregation can show; 0 without it. A draw of fewer would give away that it was
            one, which amplification does not allow for: so none is made while that is not next to impossible.
    """

    def __init__(self, private: Private, *, random_bytes: RandomBytes | None = None, least: int = 0) -> None:
        self._release = private.release
        self._population = private.population
        self._least = least
        self._random = random_bytes or Keystream()

    @classmethod
    def of(cls, private: Private | None, *, least: int = 0) -> Lottery | None:
        """The lottery of a strategy, or None if its privacy does not count on chance."""
        return cls(private, least=least) if private and private.release.sampling != "none" else None

    def resume(self, current: OpenRound) -> None:
        """Takes up the draw of an earlier process, or attempt, if one was made for this round."""
        if current.collection.was_invited:
            self._limit(current, frozenset(current.collection.invited))

    def invite(self, current: OpenRound, pool: Sequence[str]) -> list[str]:
        """Those of the pool who were drawn for the round; draws, the first time.

        Args:
            current: the round; its goal becomes the number of those who were drawn.
            pool: names of those who are there.

        Raises:
            ConfigError: more clients than the population that the budget was planned for.
            SecureAggregationError: so few are there that the draw might be too small; none was made.
        """
        if current.drawn is None:
            self._check_enough(len(pool))
            self._limit(current, frozenset(self._draw(sorted(pool))))
        assert current.drawn is not None, "just drawn"
        return sorted(current.drawn.intersection(pool))

    def _check_enough(self, present: int) -> None:
        if not self._least:
            return
        chance = chance_of_fewer(self._release, self._population, present, self._least)
        if chance > NEGLIGIBLE:
            raise SecureAggregationError(
                f"of {present} clients that are here fewer than {self._least} may be drawn (probability {chance:.2g}): "
                "wait for more (rounds.gather_seconds), or lower rounds.minimum"
            )

    @staticmethod
    def _limit(current: OpenRound, drawn: frozenset[str]) -> None:
        """Holds a round to those who were drawn, now or by an earlier process."""
        current.drawn = drawn
        current.state.goal = len(drawn)
        current.state.minimum = min(current.state.minimum, len(drawn))

    def _draw(self, names: list[str]) -> list[str]:
        if self._release.sampling == "poisson":
            coins = bernoulli(self._random, self._release.sampling_rate, len(names))
            return [name for name, coin in zip(names, coins, strict=True) if coin]
        if len(names) > self._population:
            raise ConfigError(
                f"strategy.population is {self._population}, but {len(names)} clients are here: set it to at least that"
            )
        # Places in the population that belong to nobody who is here stay empty.
        size = round(self._release.sampling_rate * self._population)
        return [names[place] for place in sample(self._random, self._population, size) if place < len(names)]

"""Real clients that are killed by SIGKILL at random moments, with their coordinator.

As a script: `kill_clients.py BUNDLE DIRECTORY SEED KILLS`. SCAFFOLD with a sparse codec and a layer that stays on the
devices, so that residuals, control variates and personal parameters matter in every round: one that was lost or counted
twice changes the final parameters.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig
from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.protocol.training import TrainingConfig
from support.in_memory import Federation, shards

ROUNDS = 5
SIZES = (24, 16)


def serve(bundle: Path, directory: Path) -> None:
    """Coordinator and clients, to the end of the run."""
    federation = Federation(directory, bundle, shards(SIZES))
    federation.start()
    coordinator = federation.coordinator(
        strategy="scaffold",
        codec="topk:0.2|int8:block=256|rice",
        personal=("second.*",),
        rounds=RoundsConfig(total=ROUNDS, goal=len(SIZES), gather_seconds=30.0, deadline_seconds=30.0),
        training=TrainingConfig(epochs=1, batch_size=4, learning_rate=0.1),
        evaluation=EvaluationConfig(by_clients=False),
    )
    coordinator.run()
    # Clients that come after the end of a run wait for the next one; this process ends with them.
    assert not federation.failures, federation.failures


def kill_at_commit(number: int) -> None:
    """Lets this process die when a client is about to store its n-th update, and has stored what stays with it."""
    left = [number]

    def commit(*_arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*_arguments)

    real, ErrorFeedback.commit = ErrorFeedback.commit, commit


def forked(bundle: Path, directory: Path, kill_after: float | None, *, at_commit: int = 0) -> bool:
    """Whether they came to the end before they were killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if at_commit:
                kill_at_commit(at_commit)
            serve(bundle, directory)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "a federation failed"
    return True


def main(bundle: Path, directory: Path, seed: int, kills: int) -> None:
    """Prints how many were killed and in how many runs."""
    chance = random.Random(seed)
    (directory / "undisturbed").mkdir()
    started = time.monotonic()
    forked(bundle, directory / "undisturbed", None)
    whole = time.monotonic() - started
    # Between what a client keeps for itself and what it sends.
    killed = runs = 0
    for number in (1, 4, 7):
        place = directory / f"run-{runs}"
        place.mkdir()
        assert not forked(bundle, place, None, at_commit=number)
        assert forked(bundle, place, None)
        killed, runs = killed + 1, runs + 1
    while killed < kills:
        place = directory / f"run-{runs}"
        place.mkdir()
        runs += 1
        for _ in range(chance.randrange(4, 10)):
            if forked(bundle, place, chance.uniform(0, whole * chance.choice((0.2, 0.5, 1.0)))):
                break
            killed += 1
        assert forked(bundle, place, None)
    print(f"killed {killed}, runs {runs}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

"""Coordinators that are killed by SIGKILL at random moments, one after the other, in one run directory.

As a script: `kill_nine.py BUNDLE DIRECTORY SEED KILLS`. Each coordinator lives in a forked child, together with fresh
scripted clients; what the clients were told goes to `verdicts.log`, which a kill cannot take back.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

from edgetrain.coordinator import events
from support.scripted import ScriptedClient, ScriptedFederation

NAMES = ("a", "b", "c", "d", "e")
ROUNDS = 6
# A coordinator that has been killed is at work again after so long.
BACK_SECONDS = 5.0


class LoggingClient(ScriptedClient):
    log = -1

    def on_verdict(self, verdict):
        os.write(LoggingClient.log, f"{self.name} {verdict.round} {verdict.accepted}\n".encode())
        super().on_verdict(verdict)


def serve(bundle: Path, directory: Path, log: Path) -> None:
    """One coordinator's life, to its end."""
    LoggingClient.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    federation = ScriptedFederation(bundle, directory / "run", rounds={"total": ROUNDS, "goal": len(NAMES)})
    for name in NAMES:
        federation.add(name, LoggingClient)
    started = time.monotonic()

    def observe(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted | events.RunEnded) and time.monotonic() - started > BACK_SECONDS:
            raise AssertionError(f"back only after {time.monotonic() - started:.1f} s")

    try:
        federation.serve(observe)
    finally:
        os.close(LoggingClient.log)


def forked(bundle: Path, directory: Path, kill_after: float | None) -> bool:
    """Whether the coordinator came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(KeyboardInterrupt):
            try:
                serve(bundle, directory, directory / "verdicts.log")
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
        os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "a coordinator failed"
    return True


def main(bundle: Path, directory: Path, seed: int, kills: int) -> None:
    """Prints how many coordinators were killed and how often the run ended before."""
    chance = random.Random(seed)
    # How long a run takes here and now.
    (directory / "trial").mkdir()
    started = time.monotonic()
    forked(bundle, directory / "trial", None)
    whole = time.monotonic() - started
    killed = runs = 0
    while killed < kills:
        place = directory / f"run-{runs}"
        place.mkdir()
        runs += 1
        # A few lives per run: short ones die in what the one before has left.
        for _ in range(chance.randrange(2, 12)):
            if forked(bundle, place, chance.uniform(0, whole * chance.choice((0.1, 0.5, 1.0)))):
                break
            killed += 1
        assert forked(bundle, place, None)
    print(f"killed {killed}, runs {runs}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

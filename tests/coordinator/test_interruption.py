"""Signals of this very process: the first waits until nothing is half done, the second does not."""

from __future__ import annotations

import signal
import threading

import pytest

from edgetrain.coordinator.interruption import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_it_is_looked_for(number):
    interruption, reached = Interruption(), False
    with pytest.raises(KeyboardInterrupt), interruption:
        interruption.check()
        signal.raise_signal(number)
        reached = True
        interruption.check()
        pytest.fail("it was looked for")
    assert reached
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1], (SIGNALS[0], SIGNALS[0])])
def test_another_one_is_an_interrupt_at_once(first, second):
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(first)
        signal.raise_signal(second)
        pytest.fail("it came at once")


def test_one_that_nobody_looked_for_is_raised_at_the_end_unless_something_worse_is():
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="worse"), Interruption():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("worse")
    with Interruption():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as _:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_leaves_signals_alone():
    seen = []

    def run():
        with Interruption():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[signal.default_int_handler] * len(SIGNALS)]

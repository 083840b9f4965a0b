"""Signals, wherever they come."""

import os
import signal
import sys

import pytest
from core.signals import stoppable


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_and_the_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, stoppable():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_what_must_not_be_interrupted_is_done_first():
    done = []

    def work():
        with stoppable() as stop, stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("to its end")

    with pytest.raises(SystemExit):
        work()
    assert done == ["to its end"]


def test_a_signal_that_comes_while_a_finaliser_runs_is_not_lost_and_shows_no_traceback(monkeypatch):
    done, told = [], []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigpending()  # Python looks for signals here at the latest, and drops what the handler raises

    def work():
        with stoppable() as stop:
            Finalised()
            done.append("it went on")
            stop.check()
            done.append("too far")

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143
    assert done == ["it went on"]
    assert not told

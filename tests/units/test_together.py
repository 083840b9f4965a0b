"""Several things at the same time: what comes out, in which order, and how failures are told."""

import threading
import time

import pytest
from core.errors import UserError
from level_1_pipeline import together


def fail(message):
    """What only fails."""
    raise UserError(message)


def test_all_run_at_the_same_time_and_are_told_in_the_order_of_their_names():
    barrier, told = threading.Barrier(3, timeout=30), []

    def call(number):
        barrier.wait()  # breaks where one waits for another
        time.sleep((3 - number) * 0.01)
        return number

    made = together.gather(
        {name: lambda number=number: call(number) for number, name in enumerate("cab")}, told.append
    )
    assert made == {"c": 0, "a": 1, "b": 2}
    assert told == [0, 1, 2]


@pytest.mark.parametrize(
    ("told_once", "message"),
    [
        (False, "a: no Docker\n       c: no Docker\n       d: no space"),
        (True, "a, c: no Docker\n       d: no space"),
    ],
)
def test_every_failure_is_told_and_the_others_are_done(told_once, message):
    done = []
    work = {
        "a": lambda: fail("no Docker"),
        "b": lambda: 2,
        "c": lambda: fail("no Docker"),
        "d": lambda: fail("no space"),
    }
    with pytest.raises(UserError) as told:
        together.gather(work, done.append, told_once=told_once)
    assert str(told.value) == message
    assert done == [2]


def test_what_is_nobody_s_mistake_comes_through_when_the_others_have_ended():
    ended, done = threading.Event(), threading.Event()

    def last():
        ended.wait(30)
        done.set()

    def broken():
        ended.set()
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError, match="a mistake of ours"):
        together.gather({"broken": broken, "last": last})
    assert done.is_set()


def test_nothing_to_do_is_nothing_made():
    assert together.gather({}) == {}

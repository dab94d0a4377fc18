"""Tests of work that several threads share."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import suppress

import pytest

from peftstate import _work
from peftstate._work import WORTH_A_THREAD, Work, collecting_seldom, in_threads

PATIENCE = 30.0
"""Seconds after which a thread that a test waits for will never come."""


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    """Whatever the machine has, there is one other thread."""
    monkeypatch.setattr(_work, "usable_cores", lambda: 2)


def test_the_order_is_kept():
    """Results come in the order of the jobs, whichever is done first."""

    def work(job: int) -> int:
        time.sleep(0.05 if job == 0 else 0)
        return job

    assert in_threads(range(4), work) == [0, 1, 2, 3]


@pytest.mark.parametrize("jobs", [[1, 0], [0, 1], [0], [1, 1, 1, 0]])
def test_an_error_is_raised(jobs):
    """A tensor that cannot be digested is no tensor without a digest, whoever reads it."""
    with pytest.raises(ZeroDivisionError):
        in_threads(jobs, lambda job: 1 / job)


def test_what_takes_no_time_is_left_to_this_thread():
    """A thread takes longer to start than the work."""
    assert set(_threads_of(WORTH_A_THREAD - 1)) == {threading.current_thread()}


def _threads_of(nbytes: int) -> list[threading.Thread]:
    """Which thread does each of three jobs."""
    return in_threads(range(3), lambda _: threading.current_thread(), nbytes=nbytes)


def test_one_core_has_no_other_thread(monkeypatch):
    """The one that works on the model would have to wait for it."""
    monkeypatch.setattr(_work, "usable_cores", lambda: 1)
    assert set(_threads_of(WORTH_A_THREAD)) == {threading.current_thread()}


def test_it_begins_before_anybody_waits():
    """Another thread does what it can in the meantime, in order."""
    done = threading.Semaphore(0)
    begun = Work.begun(range(3), lambda job: (done.release(), job)[1])
    try:
        assert all(done.acquire(timeout=PATIENCE) for _ in range(3))
        assert begun.results(lambda _: None) == [0, 1, 2]
    finally:
        begun.end()


def test_who_waits_takes_a_hand():
    """While another thread is at one job, this one does the others, and counts."""
    others_are_done, reached = threading.Event(), []

    def work(job: int) -> threading.Thread:
        if job == 0:
            assert others_are_done.wait(PATIENCE)
        return threading.current_thread()

    def reach(number: int) -> None:
        reached.append(number)
        if number == 2:
            others_are_done.set()

    begun = Work.begun(range(3), work)
    try:
        while len(begun._todo) == 3:  # until the other thread has the first one
            time.sleep(0.001)
        first, *rest = begun.results(reach)
    finally:
        begun.end()
    assert first is not threading.current_thread()
    assert set(rest) == {threading.current_thread()}
    assert reached == [1, 2, 3]


def test_nothing_is_begun_after_the_end():
    """What is being done is waited for, and the rest is left."""
    may_go_on, done = threading.Event(), []

    def work(job: int) -> None:
        assert may_go_on.wait(PATIENCE)
        done.append(job)

    begun = Work.begun(range(100), work)
    while len(begun._todo) == 100:
        time.sleep(0.001)
    threading.Timer(0.05, may_go_on.set).start()
    begun.end()
    assert done == [0]


def test_threads_that_cannot_be_started_are_done_without(monkeypatch):
    """As when Python shuts down, or the system has no more of them."""

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert set(_threads_of(WORTH_A_THREAD)) == {threading.current_thread()}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process has all cores")
def test_the_cores_that_the_process_may_use(monkeypatch):
    """A container has fewer cores than its machine."""
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    assert _work.usable_cores() == 3


def test_no_more_threads_than_make_it_faster(monkeypatch):
    """Memory has no more speed than some cores take."""
    monkeypatch.setattr(_work, "usable_cores", lambda: 200)
    begun = Work.begun(range(100), abs)
    begun.end()
    assert len(begun._others) == 15


@pytest.mark.parametrize("usual", [(700, 10, 10), (10**6, 5, 5), (0, 10, 10)])
def test_garbage_is_looked_for_seldom(usual):
    """No oftener than before, not at all where that was so, and afterwards as before."""
    before = gc.get_threshold()
    gc.set_threshold(*usual)
    try:
        for error in (None, ZeroDivisionError):
            with suppress(ZeroDivisionError), collecting_seldom():
                first, *others = gc.get_threshold()
                if error:
                    raise error
            assert first == (max(usual[0], 10**5) if usual[0] else 0)
            assert others == list(usual[1:])
            assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*before)

"""A signal waits until the state is safe, the second one does not, and afterwards all is as it was before."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vitkd.process.signals import (
    POSTPONED,
    PostponedSignals,
    exit_on_termination,
    orderly_stops,
    stop_at_once,
)

INT, TERM, USR1, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
HUP = signal.SIGHUP


@pytest.fixture(autouse=True)
def _as_a_process_begins() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in POSTPONED}
    signal.signal(INT, signal.default_int_handler)
    for number in (TERM, HUP, USR1, USR2):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def handled() -> list[int]:
    """The SIGUSR1 and SIGUSR2 that were handled, by a handler that returns as submitit's bypass does."""
    numbers: list[int] = []
    for number in (USR1, USR2):
        signal.signal(number, lambda number, _: numbers.append(number))
    return numbers


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def is_survived(*numbers: int) -> bool:
    """Whether a body that gets these signals comes to its end."""
    with PostponedSignals() as signals:
        try:
            send(*numbers)
        except (KeyboardInterrupt, SystemExit):
            return False
        finally:
            signals.waiting.clear()
    return True


@pytest.mark.parametrize(
    ("number", "error"),
    [(INT, KeyboardInterrupt), (TERM, SystemExit), (HUP, SystemExit)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_the_first_waits_and_then_has_its_effect(number, error):
    with PostponedSignals() as signals:
        send(number)
        assert signals.waiting == [number]
        with pytest.raises(error):
            signals.deliver()


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (HUP, 129)], ids=["SIGTERM", "SIGHUP"])
def test_a_request_to_end_is_an_exit_with_its_code(number, code):
    with PostponedSignals() as signals:
        send(number)
        with pytest.raises(SystemExit) as end:
            signals.deliver()

    assert end.value.code == code


@pytest.mark.parametrize("number", [INT, TERM, HUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_the_second_does_not_wait(number):
    assert is_survived(number)
    assert not is_survived(number, number)


def test_the_second_leaves_the_first_where_it_was(handled):
    with PostponedSignals() as signals:
        send(USR1, USR1)

        assert handled == [USR1]
        assert signals.waiting == [USR1]
    assert handled == [USR1, USR1]


def test_another_signal_is_no_second_one():
    assert is_survived(TERM, INT)


def test_they_are_delivered_as_they_came(handled):
    with PostponedSignals() as signals:
        send(USR2, USR1)
        assert not handled
        signals.deliver()
        assert handled == [USR2, USR1]
        assert not signals.waiting


def test_one_that_is_survived_may_come_again_and_waits_again(handled):
    """As submitit's SIGTERM, which SLURM sends to say that another signal follows."""
    with PostponedSignals() as signals:
        send(USR1)
        signals.deliver()
        send(USR1)

        assert handled == [USR1]
        assert signals.waiting == [USR1]

        signals.deliver()
        assert handled == [USR1, USR1]


def test_one_that_comes_during_delivery_is_delivered_too():
    seen: list[int] = []

    def again(number: int, _: Any) -> None:
        seen.append(number)
        if len(seen) == 1:
            send(number)

    signal.signal(USR1, again)
    with PostponedSignals() as signals:
        send(USR1)
        signals.deliver()

        assert seen == [USR1, USR1]
        assert not signals.waiting


def test_what_still_waits_at_the_end_has_its_effect_there(handled):
    with PostponedSignals():
        send(USR1)
        assert not handled

    assert handled == [USR1]


def test_at_the_end_ctrl_c_has_its_effect_too():
    with pytest.raises(KeyboardInterrupt), PostponedSignals():
        send(INT)


def test_an_error_does_not_swallow_what_waits(caplog, monkeypatch):
    """Else the job would count as failed, and a sweep that was asked to end would continue."""
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)

    def fail() -> None:
        with PostponedSignals():
            send(TERM)
            raise ValueError("out of luck")

    with pytest.raises(SystemExit) as ended:
        fail()

    assert ended.value.code == 143
    assert "out of luck" in caplog.text, "what went wrong is still logged"


def test_a_process_that_is_ending_handles_no_waiting_signal(handled):
    with contextlib.suppress(SystemExit), PostponedSignals():
        send(USR1)
        raise SystemExit

    assert not handled


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_the_handlers_are_put_back(fails, handled):
    exit_on_termination()
    before = [signal.getsignal(number) for number in POSTPONED]

    with contextlib.suppress(ValueError), PostponedSignals():
        assert not set(before) & {signal.getsignal(number) for number in POSTPONED}
        if fails:
            raise ValueError

    assert [signal.getsignal(number) for number in POSTPONED] == before


@pytest.mark.parametrize("left_alone", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "default"])
def test_a_signal_without_a_handler_is_left_as_it_is(left_alone):
    signal.signal(USR1, left_alone)

    with PostponedSignals() as signals:
        assert signal.getsignal(USR1) is left_alone
        if left_alone is signal.SIG_IGN:
            send(USR1)
        assert not signals.waiting


@pytest.mark.parametrize("number", [TERM, HUP, INT], ids=["SIGTERM", "SIGHUP", "Ctrl-C"])
def test_a_request_to_end_that_is_ignored_stays_ignored(number):
    """As `nohup`, some schedulers and shells that start a job in the background have it."""
    signal.signal(number, signal.SIG_IGN)
    stop_at_once()
    exit_on_termination()

    with orderly_stops(pytest.fail), PostponedSignals():
        send(number)
        assert signal.getsignal(number) is signal.SIG_IGN


def test_a_handler_that_is_there_is_not_replaced_by_an_exit(handled):
    signal.signal(TERM, lambda number, _: handled.append(number))

    exit_on_termination()
    send(TERM)

    assert handled == [TERM]


def test_what_was_put_in_front_meanwhile_is_taken_over_again(handled):
    with PostponedSignals() as signals:
        signal.signal(USR1, lambda *_: pytest.fail("this one is in front"))
        signals.install()
        send(USR1)

        assert signals.waiting == [USR1]
    assert handled == [USR1]


def test_in_another_thread_nothing_is_touched():
    failures: list[BaseException] = []
    before = [signal.getsignal(number) for number in POSTPONED]

    def work() -> None:
        try:
            exit_on_termination()
            with PostponedSignals() as signals:
                signals.install()
                assert [signal.getsignal(number) for number in POSTPONED] == before
                signals.deliver()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert not failures
    assert [signal.getsignal(number) for number in POSTPONED] == before


def test_one_inside_another_hands_on_to_it(handled):
    with PostponedSignals() as outer:
        with PostponedSignals() as inner:
            send(USR1)
            assert (inner.waiting, outer.waiting) == ([USR1], [])
            inner.deliver()
            assert (inner.waiting, outer.waiting) == ([], [USR1])
            assert not handled
        outer.deliver()
        assert handled == [USR1]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(INT, 130, "stopped by Ctrl-C"), (TERM, 143, "stopped by SIGTERM"), (HUP, 129, "stopped by SIGHUP")],
)
def test_what_stops_a_command_unwinds_it_and_is_one_line(number, code, line):
    said, unwound = [], []
    stop_at_once()
    before = [signal.getsignal(number) for number in POSTPONED]

    def run() -> None:
        with orderly_stops(said.append):
            try:
                send(number)
            finally:
                unwound.append(number)

    with pytest.raises(SystemExit) as end:
        run()

    assert (end.value.code, said, unwound) == (code, [line], [number])
    assert [signal.getsignal(number) for number in POSTPONED] == before


@pytest.mark.parametrize("code", [0, 1, 2, None])
def test_any_other_exit_is_left_as_it_is(code):
    with pytest.raises(SystemExit) as end, orderly_stops(pytest.fail):
        raise SystemExit(code)

    assert end.value.code == code

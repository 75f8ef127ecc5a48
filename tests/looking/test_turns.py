"""Turns: in the order in which they came, and whoever is interrupted is out of the queue."""

import signal
import threading
from threading import Event, Thread

import pytest

from actsteer.looking.turns import Turns

WAIT = 20.0  # seconds after which a test that hangs fails


def test_a_turn_is_had_in_the_order_in_which_it_was_asked_for():
    turns, order, threads = Turns(), [], []

    def wait(number):
        with turns:
            order.append(number)

    with turns:
        for number in range(5):
            threads.append(Thread(target=wait, args=(number,)))
            threads[-1].start()
            while len(turns) < number + 2:
                Event().wait(0.001)
    for thread in threads:
        thread.join(WAIT)
    assert order == list(range(5))
    assert len(turns) == 0


def test_who_is_interrupted_while_waiting_leaves_the_queue():
    turns, main, is_held, is_over = Turns(), threading.main_thread().ident, Event(), Event()

    def hold():
        with turns:
            is_held.set()
            while len(turns) < 2:
                is_over.wait(0.001)
            signal.pthread_kill(main, signal.SIGINT)
            is_over.wait(WAIT)

    before, thread = signal.signal(signal.SIGINT, signal.default_int_handler), Thread(target=hold)
    try:
        thread.start()
        is_held.wait(WAIT)
        with pytest.raises(KeyboardInterrupt), turns:
            pass
        assert len(turns) == 1
    finally:
        signal.signal(signal.SIGINT, before)
        is_over.set()
        thread.join(WAIT)
    with turns:
        assert len(turns) == 1

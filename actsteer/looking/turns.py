"""turns: a lock that threads hand on, in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import final


@final
class Turns:
    """A lock whose waiters have it in the order in which they came.

    >>> turns = Turns()
    >>> with turns:
    ...     with turns.left():
    ...         pass  # others have it here
    """

    def __init__(self) -> None:
        self._queue: deque[object] = deque()
        self._changed = Condition()

    def __len__(self) -> int:
        """How many have it, or wait for it."""
        return len(self._queue)

    def __enter__(self) -> None:
        mine = object()
        with self._changed:
            self._queue.append(mine)
            try:
                self._changed.wait_for(lambda: self._queue[0] is mine)
            except BaseException:  # an interrupt
                self._queue.remove(mine)
                self._changed.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()

    @contextmanager
    def left(self) -> Iterator[None]:
        """A while in which others have their turn; then it is waited for again."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

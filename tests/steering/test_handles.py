"""Handles: every step that was added is undone, the last first, whatever fails and however often it is tried."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsteer.steering.handles import Handles


class Step:
    """Fails as often as it is told to, and notes when it does its work."""

    def __init__(self, name, failures, done, error=ValueError):
        self.name, self.failures, self.done, self.error = name, failures, done, error

    def __call__(self):
        if self.failures:
            self.failures -= 1
            raise self.error(self.name)
        self.done.append(self.name)


@given(st.lists(st.integers(0, 2), max_size=6))
def test_every_step_runs_at_last_and_once(failures):
    done, handles = [], Handles()
    for name, times in enumerate(failures):
        handles.add(Step(name, times, done))
    for attempt in range(3):
        left = [name for name, times in enumerate(failures) if times > attempt]
        if left:
            with pytest.raises(ValueError, match=str(left[-1])):  # the first that failed
                handles.close()
        else:
            handles.close()
        assert bool(handles) == bool(left)
        assert sorted(done) == [name for name in range(len(failures)) if name not in left]
    handles.close()
    assert sorted(done) == list(range(len(failures)))
    if not any(failures):
        assert done == list(range(len(failures)))[::-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("times", [1, 2])
def test_after_an_interrupt_the_rest_is_undone_and_after_two_no_step_is_lost(times, error):
    done, handles = [], Handles()
    handles.add(Step("first", 0, done))
    handles.add(Step("second", times, done, error))
    handles.add(Step("third", 0, done))
    with pytest.raises(error):
        handles.close()
    assert done == (["third", "second", "first"] if times == 1 else ["third"])
    handles.close()
    assert done == ["third", "second", "first"]
    assert not handles


def test_a_warning_that_is_an_error_is_raised_after_all_work_is_done():
    done, handles = [], Handles()

    def warn():
        done.append("warned")
        warnings.warn("of this", UserWarning, stacklevel=1)

    handles.add(Step("first", 0, done))
    handles.add(warn)
    with pytest.raises(UserWarning, match="of this"):
        handles.close()
    assert done == ["warned", "first"]
    assert not handles


def test_a_step_that_is_added_twice_is_undone_twice():
    done, handles = [], Handles()
    step = Step("one", 0, done)
    handles.add(step)
    handles.add(step)
    handles.close()
    assert done == ["one", "one"]

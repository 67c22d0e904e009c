"""Warnings are left out for a while, and the process's filters are then what they were."""

import threading
import warnings

from catp_lightning.utils.messages import without_warnings


def test_warning_filters_are_as_before_whichever_thread_began_first() -> None:
    before, inside, first_leaves, second_leaves = warnings.filters[:], *(threading.Event() for _ in range(3))

    def leave_out(text: str, entered: threading.Event, leave: threading.Event) -> None:
        with without_warnings(text):
            entered.set()
            leave.wait(10)

    first = threading.Thread(target=leave_out, args=("a", inside, first_leaves))
    second = threading.Thread(target=leave_out, args=("b", second_inside := threading.Event(), second_leaves))
    first.start()
    assert inside.wait(10)
    second.start()
    second_inside.wait(0.2)  # without a lock it is inside by then
    first_leaves.set()
    first.join(10)
    second_leaves.set()
    second.join(10)
    assert second_inside.is_set() and warnings.filters == before

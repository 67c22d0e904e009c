"""Which run is alive: locks of files that one run at a time writes to."""

import os
import signal
from pathlib import Path

import pytest

from catp_lightning import PolicyError
from catp_lightning.utils.locks import only_run, refuse_running
from tests.support.processes import in_fork


def test_a_lock_of_a_dead_process_is_free_and_new_folders_are_removed_with_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"

    def dying() -> None:
        with only_run(file, 3, PolicyError):
            os.kill(os.getpid(), signal.SIGKILL)

    in_fork(dying)
    assert [one.name for one in file.parent.iterdir()] == [".file.3.lock"]
    refuse_running(file, PolicyError)
    assert not list(file.parent.iterdir())
    with only_run(file, 3, PolicyError):
        for wait in (lambda: refuse_running(file, PolicyError), only_run(file, 3, PolicyError).__enter__):
            with pytest.raises(PolicyError, match=rf"has not ended is writing to '.*': process {os.getpid()} on"):
                wait()
    assert not list(file.parent.iterdir())
    with only_run(tmp_path / "c" / "d" / "file", 0, PolicyError):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["a"]

"""A calibration that was killed ends where an undisturbed one ends, and does nothing twice."""

from pathlib import Path

import pytest

from catp_lightning import PolicyError
from catp_lightning.calibration.replay.base import Replay
from tests.support.interrupted_calibrations import calibrate
from tests.support.killed_calibrations import first, killed_and_started_again, position, run, same_result

pytestmark = pytest.mark.usefixtures("small_calibrations")


@pytest.mark.slow
def test_a_killed_calibration_ends_in_the_same_policy_and_repeats_nothing(
    undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """In the middle of writing what was probed, the second time."""
    writing = [n for n, line in enumerate(undisturbed[1], 1) if line.startswith("replaces p.json.partial")]
    killed_and_started_again(tmp_path, writing[1], undisturbed)


@pytest.mark.slow
def test_killed_at_every_single_moment(undisturbed: tuple[Path, list[str]], tmp_path: Path) -> None:
    for line in range(1, first(undisturbed[1], "deletes") + 1):
        killed_and_started_again(tmp_path / str(line), line, undisturbed)


@pytest.mark.slow
def test_killed_after_every_saving_it_needs_no_other_run_than_the_last(
    undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, log = undisturbed
    done = 0
    for line in (n for n, line in enumerate(log, 1) if line.startswith("replaced p.json.partial")):
        assert run(tmp_path, line - done)[0] == log[done:line]
        done = line
    assert run(tmp_path, None)[0] == log[done:]
    same_result(tmp_path, expected)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run(folder, None, None)


@pytest.mark.slow
def test_two_processes_killed_in_a_round_each_go_on_where_they_were(
    two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """The first has saved nothing of the round, the second all of it."""
    expected, logs = two
    kills = [first(logs[0], "compare in round 1"), first(logs[1], "compare in round 2") - 1]
    assert position(logs[1][: kills[1]]) == kills[1] > first(logs[1], "compare in round 1")
    assert run(tmp_path, *kills) == [log[:line] for log, line in zip(logs, kills, strict=True)]
    with pytest.raises(PolicyError, match="process was 0 of 2, is 0 of 1"):
        calibrate(tmp_path / "p.json")
    assert run(tmp_path, None, None) == [log[position(log[:line]) :] for log, line in zip(logs, kills, strict=True)]
    same_result(tmp_path, expected)


@pytest.mark.slow
def test_a_process_killed_when_the_other_had_finished_goes_on_while_that_one_starts_anew(
    two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    expected, logs = two
    line = first(logs[1], "deletes")
    run(tmp_path, None, line)
    assert [file.name for file in tmp_path.glob("*partial*")] == ["p.json.partial-1.safetensors"]
    (tmp_path / "p.json").unlink()
    assert run(tmp_path, None, None) == [logs[0], logs[1][position(logs[1][:line]) :]]
    same_result(tmp_path, expected)


@pytest.mark.slow
def test_a_process_without_a_batch_takes_part_before_and_after(
    undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, log = undisturbed
    line = first(log, "compare in round 2")
    assert run(tmp_path, line, None, uneven=True)[0] == log[:line]
    assert run(tmp_path, None, None, uneven=True) == [
        log[position(log[:line]) :],
        ["deletes", "deleted", log[-1]],
    ]
    same_result(tmp_path, expected)


@pytest.mark.slow
def test_a_calibration_interrupted_by_an_exception_goes_on(
    undisturbed: tuple[Path, list[str]], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = undisturbed[1]
    probed: list[int] = []
    real = Replay.answer_log_probability
    monkeypatch.setattr(Replay, "answer_log_probability", lambda *args: probed.append(0) or real(*args))
    calibrate(path)
    same_result(path.parent, undisturbed[0])
    at = [n for n, line in enumerate(log) if line.startswith("replaced")][1]  # four batches were saved
    assert len(probed) == sum(line.startswith("probe") for line in log[at:]) > 0

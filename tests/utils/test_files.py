"""Files are written whole, with the mode they had, and only regular ones are read: nothing waits for a pipe."""

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from catp_lightning import DataError, PolicyError, PruningPolicy
from catp_lightning.data.vqa_dataset import VQADataset, VQASplit
from catp_lightning.policy.frozen import LARGEST
from catp_lightning.utils import files as files_module
from catp_lightning.utils.files import check_writable, read_bytes, write_text


def pipe(place: Path) -> None:
    os.mkfifo(place)


def zeros(place: Path) -> None:
    place.symlink_to("/dev/zero")


def link_to_a_pipe(place: Path) -> None:
    target = Path(tempfile.mkdtemp(dir=place.parent)) / "pipe"
    os.mkfifo(target)
    place.symlink_to(target)


def listening(place: Path) -> None:
    short = Path(tempfile.mkdtemp()) / "s"  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short))
    place.symlink_to(short)


def folder(place: Path) -> None:
    place.mkdir()


def loop(place: Path) -> None:
    place.symlink_to(place)


def endless(place: Path) -> None:
    with open(place, "wb") as file:
        file.truncate(2**40)  # a terabyte that takes no room


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (pipe, "a named pipe, not a regular file"),
    "a link to /dev/zero": (zeros, "a device, not a regular file"),
    "a link to a pipe": (link_to_a_pipe, "a named pipe"),
    "a socket": (listening, "a socket"),
    "a folder": (folder, "a folder"),
    "a link to itself": (loop, "symbolic link"),
    "a terabyte": (endless, "larger than 4,194,304 bytes"),
}


@pytest.fixture(autouse=True)
def at_once() -> object:
    """A test that waits is stopped by a writer that opens every pipe it can find: it never should have to."""
    timer = threading.Timer(20, os._exit, (3,))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize("name", ["policy.json", "keep-0.5.json"])
@pytest.mark.parametrize("kind", ODD)
def test_a_folder_whose_policy_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    make, says = ODD[kind]
    make(tmp_path / name)
    for keep in (None, 0.5):
        with pytest.raises(PolicyError, match=f"(?i){says}"):
            PruningPolicy.load(tmp_path, keep=keep)
    with pytest.raises(PolicyError):
        PruningPolicy.load(tmp_path / name, keep=0.5)


def test_a_pipe_beside_the_policy_that_is_asked_for_is_left_alone(tmp_path: Path) -> None:
    PruningPolicy(keep=0.5, evidence={"retention": [1]}).save(tmp_path / "keep-0.5.json")
    pipe(tmp_path / "keep-0.25.json")
    zeros(tmp_path / "keep-0.75.json")
    assert PruningPolicy.load(tmp_path, keep=0.5).keep == 0.5


def test_a_file_that_becomes_a_pipe_before_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PruningPolicy().save(tmp_path / "policy.json")
    real = os.stat

    def swapped(path: object, **options: object) -> os.stat_result:
        found = real(path, **options)  # type: ignore[call-overload]
        if str(path) == str(file):
            file.unlink()
            os.mkfifo(file)
        return found

    monkeypatch.setattr(files_module.os, "stat", swapped)
    with pytest.raises(OSError, match="a named pipe, not a regular file"):
        read_bytes(file)


def test_a_file_that_grows_while_it_is_read_is_read_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "growing"
    file.write_bytes(bytes(101))
    real = os.fstat

    def smaller(descriptor: int) -> os.stat_result:
        found = list(real(descriptor))
        found[stat.ST_SIZE] = 10
        return os.stat_result(found)

    monkeypatch.setattr(files_module.os, "fstat", smaller)
    assert read_bytes(file, 101) == bytes(101)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        read_bytes(file, 100)


def test_a_hundred_megabytes_of_small_objects_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"evidence": {"x": [' + "[]," * (LARGEST // 3) + "0]}}")
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(PolicyError, match="larger than 4,194,304 bytes, the most that is read here"):
        PruningPolicy.load(file)


@pytest.mark.slow
def test_the_largest_policy_that_can_be_made_can_be_saved_and_loaded(tmp_path: Path) -> None:
    policy = PruningPolicy(evidence={"text": "x" * (LARGEST - 2048), "deep": [[[0]] * 100]})
    wide = PruningPolicy(evidence={"deep": [[[[0.125] * 10] * 100] * 100]})
    for each in (policy, wide):
        assert PruningPolicy.load(each.save(tmp_path / "policy.json")) == each


@pytest.mark.parametrize("kind", ["a pipe", "a link to /dev/zero", "a socket"])
def test_a_questions_file_that_is_none_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    make, says = ODD[kind]
    make(tmp_path / "questions.json")
    with pytest.raises(DataError, match=f"cannot be read: .*{says}"):
        VQADataset(VQASplit(str(tmp_path / "questions.json"), str(tmp_path)))


@pytest.mark.parametrize("kind", ["a pipe", "a link to a pipe", "a link to /dev/zero", "a socket"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    make, says = ODD[kind]
    place = tmp_path / "policy.json"
    make(place)
    before = os.stat(place)
    for write in (check_writable, lambda path: write_text(path, "text"), PruningPolicy().save):
        with pytest.raises(OSError, match=f"{says}.*nothing was written"):
            write(place)
    assert os.path.samestat(os.stat(place), before)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    file = PruningPolicy(keep=0.5).save(tmp_path / "policy.json")
    file.chmod(mode)
    PruningPolicy(keep=0.25).save(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_text().count("0.25") == 1


def test_a_new_version_of_a_private_file_is_private_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "policy.json", []
    file.write_text("secret")
    file.chmod(0o600)
    real = os.chmod

    def noting(path: Path, mode: int) -> None:
        seen.append(stat.S_IMODE(os.stat(path).st_mode))
        real(path, mode)

    monkeypatch.setattr(files_module.os, "chmod", noting)
    write_text(file, "another secret")
    assert seen == [0o600] and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_stays_a_link_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "v3.json"
    PruningPolicy(keep=0.5).save(real)
    real.chmod(0o600)
    link, second = tmp_path / "policy.json", tmp_path / "second.json"
    link.symlink_to(Path("elsewhere") / "v3.json")
    second.symlink_to(link)
    PruningPolicy(keep=0.25).save(second)
    assert link.is_symlink() and second.is_symlink() and not real.is_symlink()
    assert PruningPolicy.load(real).keep == 0.25 and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [file.name for file in real.parent.iterdir()] == ["v3.json"]


def test_a_link_that_leads_nowhere_yet_gets_its_file_and_one_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "policy.json"
    link.symlink_to(tmp_path / "new" / "v1.json")
    check_writable(link)
    PruningPolicy(keep=0.25).save(link)
    assert link.is_symlink() and PruningPolicy.load(tmp_path / "new" / "v1.json").keep == 0.25
    loop(tmp_path / "loop.json")
    for write in (check_writable, PruningPolicy().save):
        with pytest.raises(OSError, match="nothing was written"):
            write(tmp_path / "loop.json")
    assert (tmp_path / "loop.json").is_symlink()


def test_a_written_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        file = write_text(tmp_path / "x", "text")
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    finally:
        os.umask(old)


def test_a_file_gets_the_rights_the_umask_gives_without_the_umask_being_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the process's: to read it is to set it, and for that moment other threads make files anybody may write."""
    set_mask = os.umask
    for mask, rights in ((0o077, 0o600), (0o022, 0o644)):
        before = set_mask(mask)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
                file = write_text(tmp_path / f"file of {mask:o}", "text")
        finally:
            set_mask(before)
        assert stat.S_IMODE(file.stat().st_mode) == rights

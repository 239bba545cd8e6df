"""One run writes into a folder: others are refused, and a dead one leaves nothing that refuses them."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ssl.training.run import train
from hf_ssl.training.run_lock import LOCK_FILE, RunInUse, run_lock
from tests.training.test_run import TINY


def in_child(act: Callable[[], Any]) -> int:
    """Run it in a forked process; its id."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hold(folder: Path) -> None:
    with run_lock(folder):
        time.sleep(60)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_second_process_is_refused_and_told_by_whom(tmp_path: Path):
    run = tmp_path / "run"
    child = in_child(lambda: hold(run))
    wait_for(run / LOCK_FILE)
    with (
        pytest.raises(RunInUse, match=rf"another run \(process {child} on .*\) is writing into .*output_dir"),
        run_lock(run),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    with run_lock(run):
        pass
    assert list(run.iterdir()) == []


def test_a_forked_worker_does_not_hold_the_lock_of_a_killed_run(tmp_path: Path):
    def hold_with_worker() -> None:
        with run_lock(tmp_path):
            worker = in_child(lambda: time.sleep(60))
            (tmp_path / "worker").write_text(str(worker))
            time.sleep(60)

    child = in_child(hold_with_worker)
    wait_for(tmp_path / "worker")
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_its_holder_may_enter_again_and_holds_it_until_the_outer_end(tmp_path: Path):
    script = f"import fcntl; fcntl.flock(open({str(tmp_path / LOCK_FILE)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with run_lock(tmp_path):
        with run_lock(tmp_path):
            pass
        assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", script], stderr=-1).stderr
    assert not (tmp_path / LOCK_FILE).exists()


def test_file_left_by_a_killed_run_refuses_nobody(tmp_path: Path):
    (tmp_path / LOCK_FILE).write_text("process 1 on nowhere")
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.parametrize("lacking", ["system", "file system"])
def test_without_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: str
):
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if lacking == "system":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING), run_lock(tmp_path):
        pass
    assert len(caplog.messages) == 1 and "take care that no second run writes into" in caplog.text


def test_training_and_resuming_into_a_folder_in_use_is_refused_and_touches_nothing(
    image_folder: Path, tmp_path: Path
):
    options = {**TINY, "dataset": str(image_folder)}
    run = train("mae", output_dir=str(tmp_path / "run"), **options).folder
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    child = in_child(lambda: hold(run))
    wait_for(run / LOCK_FILE)
    try:
        for arguments in ({"resume": str(run)}, {"method": "mae", "output_dir": str(run), **options}):
            with pytest.raises(RunInUse) as caught:
                train(**arguments)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
        fresh = tmp_path / "fresh"
        other = in_child(lambda: hold(fresh))
        wait_for(fresh / LOCK_FILE)
        try:
            with pytest.raises(RunInUse):
                train("mae", output_dir=str(fresh), **options)
            assert (fresh / LOCK_FILE).is_file()
        finally:
            os.kill(other, signal.SIGKILL)
            exit_code(other)
    finally:
        os.kill(child, signal.SIGKILL)
        exit_code(child)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK_FILE}
    assert {path: after[path] for path in before} == before

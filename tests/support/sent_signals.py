"""Signals that arrive in the middle of a run."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catp_lightning.calibration.replay.base import Replay
from catp_lightning.callbacks import CrossAttentionCalibration, calibration
from tests.support.interrupted_calibrations import sorted_batches
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer


def quick(path: Path) -> CrossAttentionCalibration:
    """A calibration in several rounds at little cost, which asks nothing again for its report."""
    return CrossAttentionCalibration(path, keep=0.5, scorer="catp", settings=QUICKEST, examples=0)


def calibrate(path: Path, **settings: Any) -> None:
    """Calibrate a small BLIP-2 on `sorted_batches`, by default in one process."""
    trainer(quick(path), **{"devices": 1, **settings}).predict(Generating(), loading(sorted_batches()))


def kill_at(call: int, number: int, where: str) -> Callable[..., Any]:
    """A function in whose n-th call the process is sent a signal, by another thread, while it sleeps."""
    owner, name = {
        "probe": (Replay, "answer_log_probability"),
        "compare": (Replay, "compare_each"),
        "step": (Generating, "predict_step"),
        "report": (calibration, "report"),
    }[where]
    real, calls = getattr(owner, name), []

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            time.sleep(60)
        return real(*args, **kwargs)

    setattr(owner, name, killing)
    return killing

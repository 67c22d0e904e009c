"""What belongs to a whole process, and what importing the package changes of it."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import lightning.pytorch  # noqa: F401  # what libraries change is theirs
import numpy as np
import torch
import torchmetrics  # noqa: F401
import transformers.masking_utils
import transformers.modeling_utils
from torch.nn.modules import module

INTERFACES = (
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
    transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
)


def state() -> dict[str, Any]:
    names = ("transformers", "lightning", "lightning.pytorch", "catp_lightning")
    loggers = [logging.root, *map(logging.getLogger, names)]
    return {
        "attention implementations, of masks too": [sorted(interface.keys()) for interface in INTERFACES],
        "dtype, device": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "global hooks": (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)),
        "random states": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # type: ignore[index]
        "loggers": [(log.name, log.level, log.propagate, list(log.handlers)) for log in loggers],
        "warning filters": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "interpreter hooks": (sys.excepthook, sys.displayhook, signal.getsignal(signal.SIGINT)),
    }


def changed_by_importing() -> list[str]:
    """Import the package as if for the first time: what of the process was changed. For a process that ends then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "catp_lightning"]:
        del sys.modules[name]
    for interface in INTERFACES:
        for name in [name for name in interface if "catp" in name]:
            del type(interface)._global_mapping[name]
    logging.Logger.manager.loggerDict.pop("catp_lightning", None)
    warnings.filters.clear()  # type: ignore[attr-defined]
    os.environ.clear()
    random.seed(0), torch.manual_seed(0), np.random.seed(0)
    before = state()
    import catp_lightning

    for name in catp_lightning.__all__:  # imported when they are asked for
        getattr(catp_lightning, name)
    after = state()
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]

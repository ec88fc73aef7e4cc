"""Prepare the process before the heavy libraries load."""

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Keep the libraries' own notes out of the run's output (errors still show), their caches small, and code
    of the Hub out.
    """
    # Where the package `kernels` is installed, bitsandbytes and transformers would download compiled code and
    # run it: to this process
    # there is no such package.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    # In 16 bits on a CPU, torch compiles kernels for every shape of batch and keeps 1,024 of them, twice: 300
    # MB for the tiny model.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # OpenMP's threads wait for each other actively. Where another process has one of two cores, a tiny
    # model's run then takes 40
    # minutes instead of one; with a short wait it does not, and loses nothing on idle cores. (Read when torch
    # is imported.)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On being imported it warns of optional CPU kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)

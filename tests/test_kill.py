"""A run that is killed (SIGKILL) again and again, also while it writes, ends bit for bit like one that was left alone."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_rmu.cli.run import main_job
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset

KILLS = 20
SETTINGS = [
    "rmu.steps=90",
    "rmu.batch_size=2",
    "rmu.retain_batch_size=2",
    "rmu.checkpoint_every=1",
    "rmu.cache_in=disk",
]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


def train(runs_dir: Path, resume: bool) -> None:
    """What the processes do that are killed: the unlearn stage of the shipped model, from the command line's own entry."""
    quiet_libraries()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        main_job("tiny", load_preset("tiny", SETTINGS), runs_dir, "run", "cpu", ["unlearn"], resume)


def steps_made(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def wait_until(condition: Callable[[], bool], process: multiprocessing.process.BaseProcess) -> None:
    """Looks often, for some moments are short; but a loop without a pause would take one of two cores from the run."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0003)


def kill_at_a_random_moment(
    run: Path, process: multiprocessing.process.BaseProcess, chance: random.Random, while_writing: bool
) -> None:
    goal = steps_made(run) + chance.randrange(1, 4)
    wait_until(lambda: steps_made(run) >= goal, process)
    if while_writing:
        wait_until((run / "checkpoint/.state.safetensors.new").exists, process)
    else:
        time.sleep(chance.uniform(0, 0.1))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowmem_rmu.pipeline"])
    chance, killed, torn = random.Random(0), 0, 0
    run = tmp_path / "killed/run"
    for number in range(KILLS):
        process = context.Process(target=train, args=(tmp_path / "killed", number > 0))
        process.start()
        kill_at_a_random_moment(run, process, chance, while_writing=number % 2 == 0)
        killed += process.exitcode == -signal.SIGKILL
        torn += (run / "checkpoint/.state.safetensors.new").exists()
    assert killed == KILLS, "a run came to its end before it was killed"
    assert torn, "no kill hit the writing of a checkpoint"
    assert not (run / "adapter").exists()
    for runs_dir, resume in ((tmp_path / "killed", True), (tmp_path / "whole", False)):
        process = context.Process(target=train, args=(runs_dir, resume))
        process.start()
        process.join()
        assert process.exitcode == 0
    killed_run, whole = run, tmp_path / "whole/run"
    name = "adapter/adapter_model.safetensors"
    assert (killed_run / name).read_bytes() == (whole / name).read_bytes()
    timeless = [
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if key not in ("seconds", "peak_memory_bytes")
            }
            for line in path.open()
        ]
        for path in (killed_run / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 90
    assert not (killed_run / "cache").exists()

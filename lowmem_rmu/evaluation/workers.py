"""Evaluation by several processes: the main process announces each evaluation, the others take their share of
the questions.

All of them then call `evaluate` with the same questions; only the main process reads and writes files.
"""

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowmem_rmu.data.questions import QuestionSet
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.evaluation.multiple_choice import Interrupted, evaluate
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.spec import ModelSpec


@dataclass(frozen=True)
class Announcement:
    """An evaluation that is about to begin."""

    side: str
    batch_tokens: int
    adapter: dict[str, bytes]
    """The files of the adapter by name: the other processes may run on a machine that does not see the run
    folder.
    """


def announce(distributed: Distributed, side: str, batch_tokens: int, adapter: Path) -> None:
    """Tell the other processes, if there are any, to evaluate a side. `adapter` is read for `unlearned`
    only.
    """
    if distributed.num_processes == 1:
        return
    files = {file.name: file.read_bytes() for file in adapter.iterdir()} if side == "unlearned" else {}
    distributed.broadcast(Announcement(side, batch_tokens, files))


def dismiss(distributed: Distributed) -> None:
    """Tell the other processes that nothing is left to evaluate."""
    distributed.broadcast(None)


def work(
    spec: ModelSpec, questions: list[QuestionSet], device: torch.device, distributed: Distributed
) -> None:
    """Take this process's share of every announced evaluation, until dismissed. For all processes except the
    main one.
    """
    model: Any = spec.load(device) if questions else None
    nothing: Announcement | None = None
    while (announced := distributed.broadcast(nothing)) is not None:
        if announced.side == "unlearned":
            with TemporaryDirectory() as folder:
                for name, content in announced.adapter.items():
                    (Path(folder) / name).write_bytes(content)
                model = load_adapter(model, Path(folder))
        with base_only(model) if announced.side == "base" else nullcontext(), suppress(Interrupted):
            evaluate(model, spec.tokenizer, questions, announced.batch_tokens, distributed=distributed)

"""An evaluation that loses nothing: answers are written as they come, and those that are there already are
not asked for again.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.questions import QuestionSet
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.evaluation.multiple_choice import Evaluated, evaluate
from lowmem_rmu.evaluation.scorer import find_batch_tokens
from lowmem_rmu.runs.files import add_lines, make_private, read_lines, write_json, write_lines
from lowmem_rmu.runs.records import Answer, KnownAnswer, file_digest, read_record

BASE_ANSWERS = ".base_answers"
"""The folder next to all runs that holds what base models have answered, for runs to come."""


def evaluate_and_keep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: list[QuestionSet],
    batch_tokens: int,
    path: Path,
    shared: Path | None,
    progress: Callable[[int, float], bool],
    distributed: Distributed,
) -> Evaluated:
    """Evaluate, and keep the answers in `path` as they come, in the order of the questions once all are
    there.

    `shared` holds what the same model has answered elsewhere, and gets what is new. Only the first process
    reads and writes.
    """
    if not distributed.is_main_process:
        return evaluate(model, tokenizer, sets, batch_tokens, distributed=distributed)
    before: list[Answer] = read_lines(path, Answer)
    # Without the line that a kill may have torn, and without damaged ones: they are asked again.
    write_lines(path, before)
    known: dict[str, list[float]] = {}
    for shared_answer in read_lines(shared, KnownAnswer) if shared else []:
        known[shared_answer.prompt] = shared_answer.logprobs
    for row in before:
        if row.logprobs:
            known[row.prompt] = row.logprobs

    def keep(answers: list[Answer]) -> None:
        # The shared file comes first: after a kill in between, the run finds there what it lacks itself.
        if shared:
            add_lines(shared, [KnownAnswer(row.prompt, row.logprobs or []) for row in answers])
        add_lines(path, answers)

    evaluated = evaluate(model, tokenizer, sets, batch_tokens, known, keep, progress, distributed)
    write_lines(path, evaluated.answers)
    # So that a later reader sees whether the file is still whole.
    evaluated.scores["answers_sha256"] = file_digest(path)
    return evaluated


def fixed_batch_tokens(asked: int | str, model: nn.Module, pad_id: int, folder: Path) -> int:
    """Return the tokens per forward pass: those asked for or, for `auto`, the fastest, kept so that a resumed
    evaluation makes the same batches.
    """
    if isinstance(asked, int):
        return asked
    path = folder / "batch_tokens.json"
    if not path.exists():
        write_json(path, find_batch_tokens(model, pad_id))
    return read_record(path, int, "Delete it: it is measured again.")


def shared_answers(folder: Path, digest: str) -> Path:
    """Return the file that keeps the answers of the model with this digest, in a folder of runs."""
    path = folder / BASE_ANSWERS / f"{digest}.jsonl"
    make_private(path.parent, exist_ok=True)
    return path

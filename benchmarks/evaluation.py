r"""Questions of MMLU asked by this package and by lm-evaluation-harness: seconds, peak memory, and how far
their answers differ.

    python benchmarks/evaluation.py --model ./SmolLM2-135M-Instruct --data ./mmlu  # 0-shot, every subject
    python benchmarks/evaluation.py --model ./SmolLM2-135M-Instruct --data ./mmlu --num-fewshot 5 \
        --subjects astronomy,anatomy --limit 50

Each side runs in a process of its own, one after the other. What is timed begins with the questions in memory
and ends with the averages: prompts, tokens, the model, the sums. Loading the model, reading the files, one
small batch before, and finding the batch size are not. The harness gets the fastest of a few batch sizes, and
its own definitions of tasks, prompts and groups (`pip install -r requirements-dev.txt`).
"""

import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any, TypeVar

import torch
import typer
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from benchmarks.harness import harness_model, mmlu, quiet_harness
from benchmarks.rmu_step import PeakMemory
from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.schema import ModelSettings, Task, known_tasks
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.data.questions import QuestionSet, load_task
from lowmem_rmu.errors import UserError, nearest
from lowmem_rmu.evaluation.multiple_choice import ask, evaluate
from lowmem_rmu.evaluation.scorer import find_batch_tokens
from lowmem_rmu.memory.estimate import gib
from lowmem_rmu.model.loading import resolve_device
from lowmem_rmu.model.spec import ModelSpec

T = TypeVar("T")
BATCH_SIZES = (1, 4, 8, 16)  # of the harness, tried out on about so many questions, so often:
TRIAL, PASSES = 16, 2


@dataclass(frozen=True)
class Setup:
    """What is asked of which model: the first `limit` questions of each subject, each after `num_fewshot`
    examples.
    """

    model: str
    data: Path
    subjects: tuple[str, ...]
    num_fewshot: int
    limit: int | None
    device: str
    dtype: str


@dataclass(frozen=True)
class Found:
    """By task, prompts and the log-probabilities of the four letters, a question each; by task and group,
    accuracy and its standard error.
    """

    prompts: dict[str, list[str]]
    logprobs: dict[str, list[list[float]]]
    figures: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """`loaded`: bytes in memory before the first question, model included; `above`: at the peak beyond
    them.
    """

    seconds: float
    cpu_seconds: float
    loaded: int
    above: int
    found: Found


class Ours:
    name, batch_unit = "lowmem-rmu", "tokens"

    def __init__(self, setup: Setup) -> None:
        settings = ModelSettings.model_validate(
            {"name": setup.model, "quantisation": "none", "dtype": setup.dtype}
        )
        spec = ModelSpec(settings)
        self.model, self.tokenizer = spec.load(torch.device(setup.device)), spec.tokenizer

    def best_batch(self, setup: Setup) -> int:
        return find_batch_tokens(self.model, self.tokenizer.pad_token_id)

    def read(self, setup: Setup) -> list[QuestionSet]:
        given = {
            "source": str(setup.data.resolve()),
            "subjects": list(setup.subjects),
            "num_fewshot": setup.num_fewshot,
        }
        sets = load_task("mmlu", Task.model_validate(known_tasks()["mmlu"] | given))
        return [replace(each, questions=each.questions[: setup.limit]) for each in sets]

    def score(self, sets: list[QuestionSet], setup: Setup, batch: int) -> Found:
        evaluated = evaluate(self.model, self.tokenizer, sets, batch)
        tasks = {
            each.name: [row.logprobs or [] for row in evaluated.answers if row.task == each.name]
            for each in sets
        }
        prompts = {
            name: [each.prompt.context for each in ask(sets) if each.asked.name == name] for name in tasks
        }
        summaries = evaluated.scores["tasks"] | evaluated.scores["groups"]
        return Found(
            prompts,
            tasks,
            {name: (summary["accuracy"], summary["stderr"]) for name, summary in summaries.items()},
        )


class Harness:
    name, batch_unit = "lm-evaluation-harness", "questions"

    def __init__(self, setup: Setup) -> None:
        quiet_harness()
        self.model = harness_model(setup.model, setup.device, setup.dtype, 1)

    def best_batch(self, setup: Setup) -> int:
        few = replace(setup, limit=math.ceil(TRIAL / len(setup.subjects)))
        return min((timed(self, few, size)[0], size) for _ in range(PASSES) for size in BATCH_SIZES)[1]

    def read(self, setup: Setup) -> Any:
        return TaskManager(include_defaults=False).load(
            mmlu(setup.data, list(setup.subjects), setup.num_fewshot)
        )

    def score(self, tasks: Any, setup: Setup, batch: int) -> Found:
        self.model.batch_size_per_gpu = batch
        results: Any = harness_evaluate(self.model, tasks, limit=setup.limit)
        samples = results["samples"]
        return Found(
            {name: [each["arguments"][0][0] for each in rows] for name, rows in samples.items()},
            {
                name: [[logprob for logprob, _ in each["filtered_resps"]] for each in rows]
                for name, rows in samples.items()
            },
            {name: (row["acc,none"], row["acc_stderr,none"]) for name, row in results["results"].items()},
        )


Side = type[Ours] | type[Harness]


def timed(side: Ours | Harness, setup: Setup, batch: int) -> tuple[float, float, Found]:
    """Seconds by the clock, seconds of all processor cores together, and what was found."""
    questions = side.read(setup)
    started, worked = perf_counter(), process_time()
    found = side.score(questions, setup, batch)
    return perf_counter() - started, process_time() - worked, found


def find_batch(side: Side, setup: Setup) -> int:
    quiet_libraries()
    return side(setup).best_batch(setup)


def measure(side: Side, setup: Setup, batch: int) -> Measured:
    quiet_libraries()
    ready = side(setup)
    timed(ready, replace(setup, subjects=setup.subjects[:1], limit=2), batch)
    peak = PeakMemory(torch.device(setup.device))
    seconds, cpu_seconds, found = timed(ready, setup, batch)
    return Measured(seconds, cpu_seconds, peak.before, peak.read(), found)


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def print_costs(setup: Setup, batches: dict[Side, int], rounds: dict[Side, list[Measured]]) -> None:
    """Return the fastest round of each side; memory is that of the round that took most."""
    best = {side: min(measured, key=lambda each: each.seconds) for side, measured in rounds.items()}
    asked, yardstick = sum(map(len, best[Ours].found.prompts.values())), best[Harness]
    title = (
        f"{setup.model}, {setup.dtype} on {setup.device}: {asked} questions of {len(setup.subjects)} "
        f"subjects, {setup.num_fewshot}-shot"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "",
        "batch",
        "seconds",
        "questions/s",
        "speed",
        "CPU seconds",
        "CPU speed",
        "memory above the model",
        "share",
        "in all",
    ):
        table.add_column(column, justify="right" if column else "left")
    above = {side: max(each.above for each in measured) for side, measured in rounds.items()}
    for side, each in best.items():
        speeds = (
            f"{yardstick.seconds / each.seconds:.1f}x",
            f"{yardstick.cpu_seconds / each.cpu_seconds:.1f}x",
        )
        cost = (
            f"{each.seconds:.1f}",
            f"{asked / each.seconds:.2f}",
            speeds[0],
            f"{each.cpu_seconds:.1f}",
            speeds[1],
        )
        memory = (
            gib(above[side]),
            f"1/{above[Harness] / above[side]:.1f}",
            gib(max(each.loaded + each.above for each in rounds[side])),
        )
        table.add_row(side.name, f"{batches[side]} {side.batch_unit}", *cost, *memory)
    console = Console(width=150)
    console.print(table)
    for side, measured in rounds.items():
        console.print(
            f"{side.name}: {', '.join(f'{each.seconds:.1f}' for each in measured)} s", highlight=False
        )


def answers(found: Found, task: str) -> list[int]:
    return [row.index(max(row)) for row in found.logprobs[task]]


def largest_difference(ours: Found, harness: Found, task: str) -> float:
    pairs = zip(ours.logprobs[task], harness.logprobs[task], strict=True)
    return max(abs(one - other) for rows in pairs for one, other in zip(*rows, strict=True))


def print_parity(ours: Found, harness: Found) -> None:
    """Tasks, then groups, which have no questions of their own."""
    table = Table(title="Harness and lowmem-rmu on the same questions", title_justify="left")
    for column in (
        "",
        "questions",
        "harness",
        "stderr",
        "ours",
        "stderr",
        "equal prompts",
        "equal answers",
        "log-probabilities differ by",
    ):
        table.add_column(column, justify="right" if column else "left")
    counts = [0, 0, 0]
    for name in [*ours.prompts, *(ours.figures.keys() - ours.prompts.keys())]:
        figures = [f"{figure:.4f}" for side in (harness, ours) for figure in side.figures[name]]
        if name not in ours.prompts:
            table.add_row(name, "", *figures)
            continue
        prompts = sum(
            one == other for one, other in zip(ours.prompts[name], harness.prompts[name], strict=True)
        )
        same = sum(
            one == other for one, other in zip(answers(ours, name), answers(harness, name), strict=True)
        )
        asked = len(ours.prompts[name])
        counts = [count + more for count, more in zip(counts, (asked, prompts, same), strict=True)]
        table.add_row(
            name,
            str(asked),
            *figures,
            str(prompts),
            str(same),
            f"{largest_difference(ours, harness, name):.1e}",
        )
    largest = max(largest_difference(ours, harness, name) for name in ours.prompts)
    table.add_row(
        "together", str(counts[0]), "", "", "", "", str(counts[1]), str(counts[2]), f"{largest:.1e}"
    )
    Console(width=150).print(table)


def choose_subjects(data: Path, names: str | None) -> tuple[str, ...]:
    """Those that are named, or all that there are. Raises UserError where one is missing."""
    there = sorted(path.stem.removesuffix("_test") for path in (data / "test").glob("*_test.csv"))
    if not there:
        raise UserError(
            f"{data} holds no test/<subject>_test.csv.",
            "Give the folder that holds MMLU's test and dev.",
        )
    chosen = names.split(",") if names else there
    for name in chosen:
        if name not in there:
            raise UserError(f'{data} holds no subject "{name}". {nearest(name, there)}')
    return tuple(chosen)


def main(
    model: Annotated[str, typer.Option(help="A local folder with the model.")],
    data: Annotated[
        Path, typer.Option(help="MMLU's CSV files: test/<subject>_test.csv and dev/<subject>_dev.csv.")
    ],
    num_fewshot: Annotated[int, typer.Option(min=0, max=5)] = 0,
    subjects: Annotated[
        str | None, typer.Option(help="Which subjects, with commas between them; all if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Questions a subject: the first ones.")] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Both sides so often, in turns; the fastest of each counts.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, on both sides.")] = "float32",
    harness_batch: Annotated[
        int | None, typer.Option(min=1, help="Questions; the fastest of a few if left out.")
    ] = None,
) -> None:
    """Find each side's batch size, measure both, and print what they cost and how far they differ."""
    quiet_libraries()
    with friendly_exit():
        setup = Setup(
            model,
            data,
            choose_subjects(data, subjects),
            num_fewshot,
            limit,
            str(resolve_device(device)),
            dtype,
        )
        batches: dict[Side, int] = {Ours: in_new_process(find_batch, Ours, setup)}
        batches[Harness] = harness_batch or in_new_process(find_batch, Harness, setup)
        measured: dict[Side, list[Measured]] = {Harness: [], Ours: []}
        for number in range(rounds):
            for side in list(measured)[:: (-1) ** number]:
                measured[side].append(in_new_process(measure, side, setup, batches[side]))
        print_costs(setup, batches, measured)
        print_parity(measured[Ours][0].found, measured[Harness][0].found)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)

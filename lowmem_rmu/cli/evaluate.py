"""The verb `evaluate`: any model, adapter or run on any tasks."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.plan import print_left_out
from lowmem_rmu.cli.progress import watched
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.cli.tables import accuracy_table
from lowmem_rmu.config.schema import Evaluation
from lowmem_rmu.console import Console, print_json
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.folder import RunFolder

EVALUATIONS = Path("evaluations")

if TYPE_CHECKING:
    from lowmem_rmu.evaluation.summary import EvaluationSummary


def evaluate(
    model_or_run: Annotated[
        str | None, typer.Argument(help="A Hub id, or the folder of a model, of an adapter or of a run.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="With commas: wmdp, wmdp_bio, mmlu, mmlu_stem, mmlu_virology, ...")
    ] = "wmdp,mmlu",
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Answered examples before each question; what the task says if left out."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions a task at most: a sample over its subjects, always the same."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TASK.KEY=VALUE", help="Change a task, e.g. mmlu.source=./mmlu."),
    ] = None,
    quantisation: Annotated[
        Literal["nf4", "none"] | None, typer.Option(help="nf4 or none; the run's, or nf4, if left out.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="bfloat16, float16 or float32.")
    ] = None,
    batch_tokens: Annotated[
        str, typer.Option(help="Tokens in a forward pass at most; auto tries what is fastest.")
    ] = "auto",
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask an OpenAI-compatible server instead (key: OPENAI_API_KEY)."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on that server.")] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Where results go; evaluations/<model>-<time> if left out. An existing one is continued."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Ask any model, adapter or run A-D questions, as lm-evaluation-harness does."""
    quiet_libraries()
    with friendly_exit():
        from lowmem_rmu.measure import choose_tasks  # heavy libraries load only once there is work for them

        asked = choose_tasks(
            tasks,
            num_fewshot,
            set_ or [],
            limit,
            int(batch_tokens) if batch_tokens.isdecimal() else batch_tokens,
        )
        if model_or_run is not None and endpoint is None and model is None:
            summary = ask_model(model_or_run, quantisation, dtype, device, asked, to)
        elif model_or_run is None and endpoint is not None and model is not None:
            summary = ask_server(endpoint, model, asked, to)
        else:
            raise UserError("Which model? Give either a model or a run, or --endpoint URL with --model NAME.")
        if summary is None:  # another process of several
            return
        if as_json:
            print_json(asdict(summary))
        else:
            Console().print(accuracy_table(summary.rows, summary.unasked))


def ask_model(
    name: str, quantisation: str | None, dtype: str | None, device: str, asked: Evaluation, to: Path | None
) -> "EvaluationSummary | None":
    """Return the summary; None in all processes but the first."""
    from lowmem_rmu.data.sources import find_task_sources
    from lowmem_rmu.distributed import Distributed
    from lowmem_rmu.measure import find_subject, measure
    from lowmem_rmu.model.loading import resolve_device

    subject, distributed = find_subject(name, quantisation, dtype), Distributed()
    folder = to or EVALUATIONS / RunFolder.new_name(subject.file_name)
    if distributed.is_main_process:
        print_left_out(find_task_sources(asked))
    with watched(folder) if distributed.is_main_process else nullcontext() as watcher:
        return measure(
            subject, asked, resolve_device(distributed.device(device)), folder, watcher, distributed
        )


def ask_server(url: str, model: str, asked: Evaluation, to: Path | None) -> "EvaluationSummary":
    from lowmem_rmu.data.sources import find_task_sources
    from lowmem_rmu.evaluation.endpoint import Endpoint
    from lowmem_rmu.measure import as_file_name, measure_endpoint

    endpoint, folder = Endpoint(url, model), to or EVALUATIONS / RunFolder.new_name(as_file_name(model))
    print_left_out(find_task_sources(asked))
    with watched(folder) as watcher:
        return measure_endpoint(endpoint, asked, folder, watcher)

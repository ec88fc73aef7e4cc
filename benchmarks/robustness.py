"""How long unlearning holds against fine-tuning: variants of a preset, and what is known again after so many
steps on unseen text of the topic.

    python benchmarks/robustness.py --seeds 0,1  # the tiny model, steered at layer 0 and as it is
    python benchmarks/robustness.py --variant "" --variant "rmu.rank=64" --learning-rate 3e-3

Each variant is unlearned by the pipeline's own stage and relearned by the audit's own attack
(`lowmem_rmu/audit/attacks/relearning.py`: a fresh LoRA of rank 16 in every linear module of every layer,
AdamW, batches of 8, the learning rate given). Only questions are asked that the text does not tell about:
what comes back was there. A preset without questions is measured on held-out text, in nats/token; what base
gains by the same steps is no part of what makes half.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from lowmem_rmu.audit.attacks import relearning
from lowmem_rmu.audit.context import SIDES, Audited, prepare
from lowmem_rmu.audit.knowledge import Knowledge, Questions, Texts, evenly, held_out_documents
from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.data.corpora import tokenise
from lowmem_rmu.data.questions import QuestionSet
from lowmem_rmu.evaluation.multiple_choice import ask
from lowmem_rmu.inputs import read_inputs
from lowmem_rmu.model.loading import resolve_device
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.pipeline import RunContext, run_config, run_stages
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.status import Silent, StatusWriter

LOWEST_LAYER = " ".join(
    [
        "rmu.target_layer=0 rmu.adapter_layers=[0] rmu.steps=1000 rmu.learning_rate=4e-3",
        "rmu.batch_size=8 rmu.retain_batch_size=16",
        *(f"topics.{name}.alpha=100 topics.{name}.adaptive_scale=3" for name in ("compounds", "locks")),
    ]
)
"""What `tiny` did before: it holds longer, and is not where the paper steers."""


@dataclass(frozen=True)
class Held:
    """In % of the questions, or in nats/token: what is known before and after unlearning, and by relearning
    steps.
    """

    base: float
    unlearned: float
    kept: float
    """Of what was to stay, once unlearned."""
    measured: float | None
    """Of the tasks that were neither to stay nor to go, once unlearned; None where there are none."""
    after: dict[str, float]
    half: int | None
    """The first measured step at which half of what was forgotten is back."""

    def row(self) -> list[str]:
        figures = [self.base, self.unlearned, self.kept, self.measured, *self.after.values()]
        return [*map(in_digits, figures), str(self.half or f"> {[*self.after][-1]}")]


def in_digits(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def unlearn(preset: Preset, device: torch.device, runs: Path) -> Path:
    """Return the adapter that a run makes."""
    folder = RunFolder.create(runs, "measured")
    write_json(folder.path / "config.json", run_config("measured", preset, device))
    stages, spec = ["unlearn"], ModelSpec.of_preset(preset)
    inputs = read_inputs(preset, spec, stages)
    status = StatusWriter(folder.path / "status.json", Silent())
    run_stages(RunContext(preset, spec, folder, inputs, device, stages, status))
    return folder.adapter


def questions_of(audited: Audited, sets: list[QuestionSet], limit: int) -> Questions:
    return Questions(
        evenly(ask(sets), limit), audited.tokenizer, audited.preset.evaluation.planned_batch_tokens
    )


def what_stays(audited: Audited, limit: int) -> Knowledge:
    """At most `limit` questions of the tasks to keep, or where there are none the retain set's held-out
    text.
    """
    if audited.kept:
        return questions_of(audited, audited.kept, limit)
    preset = audited.preset
    documents = [text for half in held_out_documents(preset.retain.corpora) for text in half]
    sequences = tokenise(documents, audited.tokenizer, preset.retain.max_tokens, split=True)
    return Texts(sequences, audited.tokenizer, preset.evaluation.planned_batch_tokens)


def figure(knowledge: Knowledge, values: list[float]) -> float:
    """% of the questions, or nats/token."""
    return knowledge.figure(values) * (100 if knowledge.are_questions else 1)


def measure(preset: Preset, device: torch.device, limit: int, steps: tuple[int, ...]) -> Held:
    forgotten = [name for name, task in preset.evaluation.tasks.items() if task.role == "forgotten"]
    with TemporaryDirectory() as runs:
        audited = prepare(
            "measured", preset, unlearn(preset, device, Path(runs)), device, forgotten, limit, 0
        )
        known, stays, others = (
            audited.knowledge,
            what_stays(audited, limit),
            questions_of(audited, audited.measured, limit),
        )
        plain = {side: audited.measure(side) for side in SIDES}
        with audited.side("unlearned") as model:
            kept, measured = (
                figure(stays, stays.of(model)),
                figure(others, others.of(model)) if others.asked else None,
            )
        text = audited.relearning[: relearning.TOPIC_SAMPLES]
        points = relearning.curve(audited, "unlearned", text, steps)
        twin = None if known.are_questions else relearning.curve(audited, "base", text, steps)
        audited.free()
    base, unlearned = (figure(known, plain[side]) for side in SIDES)
    after = {step: figure(known, values) for step, values in points.items()}
    return Held(
        base, unlearned, kept, measured, after, relearning.steps_to_half(audited, plain, points, twin)
    )


def main(
    preset: Annotated[str, typer.Option(help="A preset's name, or the path of a YAML file.")] = "tiny",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting of all variants."),
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Settings with spaces between them; again for each variant.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of unlearning, with commas between them.")] = "0",
    limit: Annotated[
        int,
        typer.Option(
            min=1, help="Questions of each forgotten task, of all that is kept, and of all that is measured."
        ),
    ] = 100,
    steps: Annotated[str, typer.Option(help="Of relearning, after which to measure.")] = ",".join(
        map(str, relearning.STEPS)
    ),
    learning_rate: Annotated[float, typer.Option(help="Of relearning.")] = relearning.LEARNING_RATE,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Unlearns and relearns each variant with each seed, and prints the table."""
    quiet_libraries()
    relearning.LEARNING_RATE = learning_rate
    measured_after = tuple(sorted(map(int, steps.split(","))))
    table = Table(title=f"{preset}, relearned at {learning_rate:g}", title_justify="left")
    table.add_column("Variant", overflow="fold")
    for column in (
        "Seed",
        "Base",
        "Unlearned",
        "Kept",
        "Measured",
        *(f"{step} steps" for step in measured_after),
        "Half",
    ):
        table.add_column(column, justify="right")
    with friendly_exit():
        for each in variant or [LOWEST_LAYER, ""]:
            for seed in seeds.split(","):
                chosen = load_preset(preset, [*(set_ or []), *each.split(), f"rmu.seed={seed}"])
                table.add_row(
                    each or "as it is",
                    seed,
                    *measure(chosen, resolve_device(device), limit, measured_after).row(),
                )
    Console(width=150).print(table)


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)

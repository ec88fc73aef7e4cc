r"""Does a real model forget a real topic and keep the rest? Variants of the default settings, each a whole
run of the pipeline.

    python benchmarks/selectivity.py --model ./Qwen2.5-Coder-1.5B-Instruct --data ./data --runs ./runs
    python benchmarks/selectivity.py ... --topic psychology --seeds 0,1,2
    python benchmarks/selectivity.py ... --variant "" --variant "rmu.sinks=counted" \
        --variant "retain.questions=0 retain.chat=0"

`--data` holds `openstax/economics.jsonl` and `psychology.jsonl` (running text, a section a line),
`wikitext-2/test.txt` and `mmlu/test`. A topic is forgotten from its textbook; the other textbook, WikiText
and passages that the base model writes about subjects next to the topic are the retain set. Questions about
the subject of the retain textbook are not asked. The settings of both topics are the same, whatever the
topic.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Preset
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.data.questions import LETTERS
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Pairs
from lowmem_rmu.evaluation.multiple_choice import balanced_accuracy
from lowmem_rmu.evaluation.statistics import change_bounds
from lowmem_rmu.inputs import read_inputs
from lowmem_rmu.model.loading import resolve_device
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.neighbors import save_passages, write_passages
from lowmem_rmu.pipeline import RunContext, run_config, run_stages
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.runs.records import Answer, StepRow
from lowmem_rmu.runs.status import Silent, StatusWriter
from lowmem_rmu.unlearning.guard import Check, best_of


@dataclass(frozen=True)
class Subjects:
    """The MMLU subjects of a topic: those to forget, those close to the topic, and those to keep."""

    forgotten: list[str]
    adjacent: list[str]
    kept: list[str]
    neighbors: list[str]
    """What base writes about for the retain set."""

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The subjects by the name and role of their task."""
        return {"forgotten": self.forgotten, "adjacent": self.adjacent, "kept": self.kept}


KEPT = [
    "anatomy",
    "astronomy",
    "college_biology",
    "college_physics",
    "computer_security",
    "elementary_mathematics",
    "global_facts",
    "high_school_chemistry",
    "high_school_geography",
    "international_law",
    "logical_fallacies",
    "machine_learning",
    "nutrition",
    "philosophy",
    "prehistory",
    "virology",
    "world_religions",
    "clinical_knowledge",
]
TOPICS = {
    "economics": Subjects(
        ["high_school_macroeconomics", "high_school_microeconomics"],
        ["econometrics", "management", "marketing", "professional_accounting"],
        KEPT,
        # Without econometrics: what the model writes under that name is economics.
        ["management", "marketing", "accounting"],
    ),
    "psychology": Subjects(
        ["high_school_psychology", "professional_psychology"],
        ["human_aging", "human_sexuality", "sociology", "moral_disputes"],
        KEPT,
        ["human aging", "human sexuality", "sociology", "moral philosophy"],
    ),
}
PASSAGES = 40
"""Passages about each neighbor."""
OTHER = {"economics": "psychology", "psychology": "economics"}
"""The textbook that stays, by the one that is forgotten."""


@dataclass(frozen=True)
class GroupResult:
    """How a group of questions was answered; accuracies and their change in percent and points."""

    pairs: Pairs
    balanced: float
    """Of the unlearned model, the mean over the letters A to D of the share that is answered right where that
    letter is right: 25 for a model that answers one letter to everything, whatever the share of that letter
    among the right answers.
    """
    letters: str

    @property
    def base(self) -> float:
        return 100 * self.pairs.known / self.pairs.questions

    @property
    def unlearned(self) -> float:
        return 100 * self.pairs.right / self.pairs.questions

    @property
    def change(self) -> float:
        return 100 * self.pairs.change

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95% interval of the change, paired by question."""
        low, high = change_bounds(self.pairs.lost, self.pairs.gained, self.pairs.questions)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Measured:
    """What a run found: each group's result, and what the guard saw at the point that was kept."""

    groups: dict[str, GroupResult]
    step: int
    steps: int
    retain_kl: float | None
    topic_kl: float | None
    seconds: float


def preset_of(topic: str, model: Path, data: Path, limit: int, neighbors: Path | None) -> dict[str, Any]:
    """Return the raw preset that forgets a topic, as YAML would hold it; layers and alpha are chosen as for
    any preset without them.

    `neighbors` is the file with the passages about neighboring subjects; None leaves them out of the retain
    set.
    """
    questions = str((data / "mmlu/test").resolve())
    books = {name: str((data / f"openstax/{name}.jsonl").resolve()) for name in (topic, OTHER[topic])}
    articles = {"source": str((data / "wikitext-2/test.txt").resolve()), "title_excludes": "^$"}
    close = [{"source": str(neighbors.resolve()), "share": 0.4}] if neighbors else []
    return {
        "title": f"{model.name} forgets {topic}",
        "model": {"name": str(model.resolve()), "dtype": "bfloat16"},
        "rmu": {
            "steps": 120,
            "schedule": "linear",
            "retain_batch_size": 8,
        },
        "topics": {topic: {"corpus": {"source": books[topic]}, "adaptive_scale": 3, "max_tokens": 128}},
        "retain": {"corpora": [*close, {"source": books[OTHER[topic]]}, articles], "max_tokens": 128},
        "evaluation": {
            "limit": limit,
            "batch_tokens": 2048,
            "tasks": {
                role: {"source": questions, "subjects": each, "role": role}
                for role, each in TOPICS[topic].tasks.items()
            },
        },
    }


def written_neighbors(topic: str, model: Path, folder: Path) -> Path:
    """Return the file of passages about the topic's neighbors, which base writes where it is not there
    yet.
    """
    file = folder / f"neighbors-{topic}.jsonl"
    if not file.exists():
        # Not quantized: on a CPU, generation in 4-bit takes several times as long.
        spec = ModelSpec(ModelSettings(name=str(model.resolve()), dtype="bfloat16", quantisation="none"))
        base = spec.load(resolve_device("auto"))
        save_passages(write_passages(base, spec.tokenizer, TOPICS[topic].neighbors, PASSAGES), file)
    return file


def measure(preset: Preset, name: str, runs: Path) -> Measured:
    """Run all stages of a preset, or read what such a run has left."""
    folder = RunFolder(runs / name)
    device = resolve_device("auto")
    if not folder.path.exists():
        folder = RunFolder.create(runs, name)
        write_json(folder.path / "config.json", run_config(name, preset, device))
    if not (folder.path / "summary.json").exists():
        stages = list(STAGES)
        spec = ModelSpec.of_preset(preset)
        inputs = read_inputs(preset, spec, stages)
        status = StatusWriter(folder.path / "status.json", Silent())
        run_stages(RunContext(preset, spec, folder, inputs, device, stages, status))
    return read_measured(folder)


def read_measured(folder: RunFolder) -> Measured:
    """Read the figures of a finished run."""
    before, after = folder.read_answers("base"), folder.read_answers("unlearned")
    groups = {}
    for group in ("forgotten", "adjacent", "kept"):
        groups[group] = group_result(
            [row for row in before if row.task.startswith(group)],
            [row for row in after if row.task.startswith(group)],
        )
    metrics = folder.read_metrics()
    checks = [row for row in metrics if row.retain_kl is not None]
    kept = kept_check(checks, folder.config["settings"]["rmu"]["guard_limit"])
    return Measured(
        groups=groups,
        step=kept.step if kept else len(metrics),
        steps=len(metrics),
        retain_kl=kept.retain_kl if kept else None,
        topic_kl=kept.topic_kl if kept else None,
        seconds=sum(cost.seconds for cost in folder.read_stages() if cost.stage == "unlearn"),
    )


def group_result(before: list[Answer], after: list[Answer]) -> GroupResult:
    """Compare the answers of base and unlearned to the same questions, in the same order."""
    marks = [(base.correct, unlearned.correct) for base, unlearned in zip(before, after, strict=True)]
    known = sum(base for base, _ in marks)
    pairs = Pairs(len(marks), known, lost=marks.count((True, False)), gained=marks.count((False, True)))
    answered = Counter(LETTERS[row.answer] for row in after if row.answer is not None)
    letters = " ".join(f"{letter}{count}" for letter, count in answered.most_common())
    return GroupResult(pairs, 100 * balanced_accuracy(after), letters)


def kept_check(rows: list[StepRow], limit: float) -> StepRow | None:
    """Return the row of the check whose weights are kept: the guard's best, else the last one; None
    without a guard.
    """
    checks = []
    for row in rows:
        distances = row.retain_kl or 0.0, row.question_kl, row.topic_kl or 0.0, row.topic_question_kl
        checks.append(Check(row.step, *distances))
    best = best_of(checks, limit)
    if best:
        return rows[checks.index(best)]
    return rows[-1] if rows else None


COLUMNS = (
    "Seed",
    "Forgotten",
    "Balanced",
    "Adjacent",
    "Kept",
    "Kept step",
    "Retain KL",
    "Topic KL",
    "Letters, forgotten",
    "Letters, kept",
    "Seconds",
)


def row_of(found: Measured) -> list[str]:
    """Return the cells of a table's row: accuracies with their change in points and its interval, and the
    rest.
    """
    changes = {
        name: f"{group.unlearned:.1f} ({group.change:+.1f}, {group.bounds[0]:+.1f} to {group.bounds[1]:+.1f})"
        for name, group in found.groups.items()
    }
    divergences = [f"{kl:.2f}" if kl is not None else "-" for kl in (found.retain_kl, found.topic_kl)]
    forgotten, kept = found.groups["forgotten"], found.groups["kept"]
    return [
        changes["forgotten"],
        f"{forgotten.balanced:.1f}",
        changes["adjacent"],
        changes["kept"],
        f"{found.step} of {found.steps}",
        *divergences,
        forgotten.letters,
        kept.letters,
        f"{found.seconds:.0f}",
    ]


def main(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The folder of a model.")],
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The folder of texts and questions.")
    ],
    runs: Annotated[
        Path, typer.Option(help="Where the runs go; those that are there are not made again.")
    ] = Path("runs"),
    topic: Annotated[str, typer.Option(help="What to forget: economics or psychology.")] = "economics",
    variant: Annotated[
        list[str] | None, typer.Option(help="Settings with spaces between them; again for each variant.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of unlearning, with commas between them.")] = "0",
    limit: Annotated[int, typer.Option(min=1, help="Questions of each group at most.")] = 200,
    neighbors: Annotated[
        bool, typer.Option(help="Have base write passages about neighboring subjects for the retain set.")
    ] = True,
) -> None:
    """Run each variant with each seed, and print the table."""
    quiet_libraries()
    table = Table(title=f"{model.name} forgets {topic}", title_justify="left")
    table.add_column("Variant", overflow="fold")
    for column in COLUMNS:
        table.add_column(column)
    with friendly_exit():
        if topic not in TOPICS:
            raise UserError(f"There is no topic {topic}. Choose one of: {', '.join(TOPICS)}.")
        runs.mkdir(parents=True, exist_ok=True)
        file = runs / f"{topic}.yaml"
        passages = written_neighbors(topic, model, runs) if neighbors else None
        file.write_text(
            yaml.safe_dump(preset_of(topic, model, data, limit, passages), sort_keys=False), encoding="utf-8"
        )
        for each in variant or [""]:
            for seed in seeds.split(","):
                preset = load_preset(
                    str(file),
                    [change.replace("TOPIC", topic) for change in each.split()] + [f"rmu.seed={seed}"],
                )
                cells = row_of(measure(preset, run_name(topic, each, seed, limit), runs))
                table.add_row(each or "as it is", seed, *cells)
                print("\t".join([each or "as it is", seed, *cells]), flush=True)
    Console(width=220).print(table)


def run_name(topic: str, variant: str, seed: str, limit: int) -> str:
    """Return the name of a variant's run, with nothing in it that a folder may not hold."""
    kept = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in variant)
    return f"{topic}-{limit}-{kept or 'default'}-{seed}"[:100].replace("=", "-")


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)

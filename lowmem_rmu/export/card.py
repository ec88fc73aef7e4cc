"""The model card of an export, and the hashes of its files: what was forgotten and how, what was measured,
and what that does not prove.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from lowmem_rmu.config.paths import is_local, short_name
from lowmem_rmu.config.schema import Corpus, ModelSettings, Preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Row, TextRow, asked_how, counted
from lowmem_rmu.evaluation.multiple_choice import CHANCE
from lowmem_rmu.evaluation.statistics import LUCK
from lowmem_rmu.evaluation.summary import (
    Headline,
    Summary,
    known_in_words,
    read_audit,
    read_summary,
    recovered_in_words,
)
from lowmem_rmu.export.reproduce import sha256
from lowmem_rmu.export.verification import Compared, Verification
from lowmem_rmu.parsing import parse_yaml
from lowmem_rmu.runs.files import write_atomically
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import read_preset
from lowmem_rmu.runs.records import AuditResult
from lowmem_rmu.weights.source import locate

CARD, SUMS = "README.md", "SHA256SUMS"
Kind = Literal["adapter", "merged", "gguf"]


@dataclass(frozen=True)
class Form:
    """What the card says of a kind of export; library and relation in the Hub's words."""

    library: str
    relation: str
    what: str


FORMS: dict[Kind, Form] = {
    "adapter": Form(
        "peft",
        "adapter",
        "An adapter that makes a model forget, in PEFT's format: it is loaded on top of the base model.",
    ),
    "merged": Form(
        "transformers",
        "finetune",
        "A whole model that was made to forget: the update is merged into the base model's own checkpoint.",
    ),
    "gguf": Form(
        "gguf",
        "quantized",
        "A model that was made to forget, its update merged, as GGUF for llama.cpp, Ollama and LM Studio.",
    ),
}

# Whatever Markdown may take for its own, GitHub's links of bare addresses too; left alone where it can mean
# nothing, so that the card reads
# well as it is: hyphens and underscores within words, points within numbers and at the end.
_SPECIAL = re.compile(
    r"[\\`*\[\]<>#|~&@$^!{}=+]|(?<![A-Za-z0-9])[_-]|[_-](?![A-Za-z0-9])|:(?=\S)|(?<!\d)\.(?=\S)|\.(?=[^\s\d])"
)
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


def write_card(run: RunFolder, artefact: Path, kind: Kind, verification: Verification | None) -> None:
    """Write `README.md` and `SHA256SUMS` into the folder of an export that is otherwise complete.

    Raises UserError where the run's results cannot be read.
    """
    files = {name: sha256(artefact / name) for name in file_names(artefact)}
    write_atomically(artefact / CARD, str(model_card(run, kind, verification, files)))
    sums = files | {CARD: sha256(artefact / CARD)}
    write_atomically(
        artefact / SUMS, "".join(sum_line(digest, name) for name, digest in sorted(sums.items()))
    )


def file_names(artefact: Path) -> list[str]:
    """Return every file of an export except the card and the checksums."""
    names = (path.relative_to(artefact).as_posix() for path in artefact.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (CARD, SUMS))


def sum_line(digest: str, name: str) -> str:
    """Return a line that `sha256sum -c` takes, with its way to write a name that has a line break in it."""
    written = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "" if written == name else "\\"
    return f"{mark}{digest}  {written}\n"


def model_card(
    run: RunFolder, kind: Kind, verification: Verification | None, files: dict[str, str]
) -> ModelCard:
    """Return the card of an export with these `files` and their sha256. Raises UserError."""
    config = run.config
    preset = read_preset(run, pinned=False)
    summary = read_summary(run) if (run.path / "summary.json").exists() else None
    terms: dict[str, Any] = base_terms(preset.model, config["model_revision"])
    data = ModelCardData(
        base_model=None if is_local(preset.model.name) else preset.model.name,
        base_model_relation=None if is_local(preset.model.name) else FORMS[kind].relation,
        library_name=FORMS[kind].library,
        pipeline_tag="text-generation",
        tags=["unlearning", "rmu", "lowmem-rmu"],
        model_name=run.path.name,
        eval_results=list(eval_results(preset, summary)) or None if summary else None,
        **terms,
    )
    content = {
        "kind": kind,
        "what": FORMS[kind].what,
        "title": preset.title,
        "model": short_name(preset.model.name),
        "revision": config["model_revision"],
        "licence": ", ".join(terms.values()),
        "run": run.path.name,
        "created": config["created"][:10],
        "versions": config["versions"] | {"lowmem-rmu": config["versions"].get("lowmem-rmu", "not recorded")},
        "device": config["device"],
        "chance": f"{CHANCE:.0%}",
        "verdict_line": Headline.of(run, summary.verdict).sentence if summary else None,
        "verification": verification and _verification(verification),
        "audit": _audit(read_audit(run)),
        "reproduce": "reproduce/preset.yaml" in files,
        "files": files,
    }
    text = _template().render(content | _method(preset) | _results(summary))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def base_terms(model: ModelSettings, revision: str | None) -> dict[str, str]:
    """Return the base model's licence as its own card has it: `license`, `license_name`, `license_link`;
    nothing where that is not known.
    """
    try:
        card = locate(model.name, revision).fetch(CARD)
        header = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8")) if card else None
        data = parse_yaml(header[2])[0] if header else None
    except (UserError, OSError, ValueError):  # it cannot be read, or the Hub cannot be reached
        return {}
    if not isinstance(data, dict):
        return {}
    return {
        key: data[key]
        for key in ("license", "license_name", "license_link")
        if isinstance(data.get(key), str)
    }


def eval_results(preset: Preset, summary: Summary) -> Iterator[EvalResult]:
    """Yield the accuracy on every task and the loss on every held-out text, unlearned and base, with standard
    errors, for the card's `model-index`.
    """
    for row in headline(summary.rows):
        task = preset.evaluation.tasks.get(row.task)
        of: dict[str, Any] = {"dataset_type": row.task, "dataset_name": row.task}
        if task and not is_local(task.source):
            of |= {"dataset_type": task.source, "dataset_config": task.subset, "dataset_split": task.split}
        yield from _both_sides(
            "accuracy", row, of, ("role", "questions", "sampled_from", "num_fewshot", "scoring")
        )
    for text in summary.texts:
        yield from _both_sides(
            "loss",
            text,
            {"dataset_type": text.name, "dataset_name": f"{text.name} (held-out text)"},
            ("role", "tokens"),
        )


def _both_sides(
    metric: str, row: Row | TextRow, of: dict[str, Any], told: tuple[str, ...]
) -> Iterator[EvalResult]:
    how = {key: getattr(row, key) for key in told if getattr(row, key) is not None}
    for side in ("unlearned", "base"):
        for name, value in {
            metric: getattr(row, side),
            f"{metric}_stderr": getattr(row, f"{side}_stderr"),
        }.items():
            if value is not None:
                called = f"{name} on {of['dataset_name']}, {side}"
                yield EvalResult(
                    task_type="text-generation",
                    metric_type=name,
                    metric_name=called,
                    metric_value=value,
                    metric_args=how,
                    **of,
                )


def headline(rows: list[Row]) -> list[Row]:
    """Return the rows of whole tasks and of averages over tasks, without subjects."""
    return [row for row in rows if row.group is None]


def _method(preset: Preset) -> dict[str, Any]:
    """Describe what was forgotten and with which settings, without a path of this machine."""
    rmu, model = preset.rmu, preset.model
    low_rank = f"LoRA of rank {rmu.rank}, lora_alpha {rmu.lora_alpha or rmu.rank}"
    topics = [
        {
            "name": name,
            "corpus": _source(topic.corpus),
            "steering": _steering(topic),
            "alpha": f"{topic.alpha:g}",
            "max_tokens": topic.max_tokens,
        }
        for name, topic in preset.topics.items()
    ]
    settings = {
        "base model while it forgot": _precision(model),
        "trained": "the matrices themselves" if rmu.trainable == "weights" else low_rank,
        "modules": f"{', '.join(rmu.modules)} of layers {', '.join(map(str, rmu.adapter_layers))}",
        "steered": f"the output of layer {rmu.target_layer} (layers count from 0)",
        "steps": (
            f"{rmu.steps}, {rmu.batch_size} forget and {rmu.retain_batch_size or rmu.batch_size} retain "
            "samples each"
        ),
        "optimiser": f"{rmu.optimizer}, learning rate {rmu.learning_rate:g}",
        "losses over": "real tokens" if rmu.padding == "masked" else "all positions, padding too",
        "seed": rmu.seed,
    }
    return {
        "topics": topics,
        "retain": [_source(corpus) for corpus in preset.retain.corpora],
        "settings": settings,
        "precision": _precision(model),
    }


def _precision(model: ModelSettings) -> str:
    return (
        "4-bit (NF4, double quantisation)" if model.quantisation == "nf4" else f"not quantised, {model.dtype}"
    )


def _source(corpus: Corpus) -> str:
    if is_local(corpus.source):
        return f"{Path(corpus.source).name} (a local text)"
    return " ".join(filter(None, (corpus.source, corpus.subset, corpus.split)))


def _steering(topic: Any) -> str:
    number = topic.adaptive_scale if topic.steering == "adaptive" else topic.steering_coefficient
    return f"{topic.steering}, {'scale' if topic.steering == 'adaptive' else 'coefficient'} {number:g}"


def _results(summary: Summary | None) -> dict[str, Any]:
    if summary is None:
        return {"rows": [], "texts": [], "sentences": []}
    rows = [
        {
            "task": row.task,
            "role": row.role,
            "questions": counted(row.questions, row.sampled_from),
            "asked": asked_how(row.num_fewshot, row.scoring) or "0-shot",
            **{
                side: _percent(getattr(row, side), getattr(row, f"{side}_stderr"))
                for side in ("base", "unlearned", "change")
            },
            "beyond_luck": row.p_value is not None and row.p_value < LUCK,
        }
        for row in headline(summary.rows)
    ]
    texts = [
        {"name": text.name, "role": text.role, "tokens": f"{text.tokens:,}"}
        | {
            side: _nats(getattr(text, side), getattr(text, f"{side}_stderr"))
            for side in ("base", "unlearned", "change")
        }
        for text in summary.texts
    ]
    return {"rows": rows, "texts": texts, "sentences": summary.verdict.sentences}


def _verification(verification: Verification) -> dict[str, Any]:
    checked = [
        {
            "name": each.name,
            "mark": each.mark,
            "reason": each.reason,
            "tasks": [_checked_row(task) for task in each.tasks],
        }
        for each in verification.checked
    ]
    return {"mark": verification.mark, "checked": checked}


def _checked_row(task: Compared) -> dict[str, str]:
    return {
        "task": task.task,
        "role": task.role,
        "base": _percent(task.base, task.base_stderr),
        "unlearned": _percent(task.unlearned, task.unlearned_stderr),
        "exported": _percent(task.exported, task.exported_stderr),
        "change": f"{_signed(100 * task.change_from)} to {_signed(100 * task.change_to)}",
        "finding": task.finding,
    }


def _audit(audit: AuditResult | None) -> dict[str, Any] | None:
    """Describe what attacks on the run found; None where there was no audit."""
    if audit is None:
        return None
    attacks = []
    for result in audit.attacks:
        attacked = known_in_words(audit, result.best.attacked) if result.best else None
        recovered = recovered_in_words(result.best).replace("-", "−")
        attacks.append(vars(result) | {"attacked": attacked, "recovered": recovered})
    return {
        "base": known_in_words(audit, audit.base),
        "unlearned": known_in_words(audit, audit.unlearned),
        "sentences": audit.verdict.sentences,
        "asked": f"{audit.items} {'questions' if audit.is_accuracy else 'texts'}",
        "measured_in": "accuracy in %" if audit.is_accuracy else audit.measured_in,
        "attacks": attacks,
        "controls": audit.controls,
    }


def _signed(value: float) -> str:
    """With a real minus sign, which Markdown takes for nothing else."""
    return f"{value:+.1f}".replace("-", "−")


def _percent(share: float | None, stderr: float | None) -> str:
    return (
        "not measured"
        if share is None or stderr is None
        else f"{100 * share:.1f} ± {100 * stderr:.1f}".replace("-", "−")
    )


def _nats(loss: float | None, stderr: float | None) -> str:
    return (
        "not measured" if loss is None or stderr is None else f"{loss:.2f} ± {stderr:.2f}".replace("-", "−")
    )


def escaped(value: Any) -> str:
    """Any text so that Markdown shows it to the letter, on one line: names of topics and files are other
    people's.
    """
    shown = "".join(character for character in " ".join(str(value).split()) if character.isprintable())
    return _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", shown))


def _template() -> jinja2.Template:
    """Whatever stands in `{{ }}` is escaped, wherever it comes from."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {
        "undefined": jinja2.StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }
    return jinja2.Environment(loader=loader, finalize=escaped, **options).get_template("card.md.jinja")

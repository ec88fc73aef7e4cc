"""lm-evaluation-harness on local files: its own tasks, prompts and groups, with nothing but the data set
replaced.
"""

import csv
import logging
from pathlib import Path
from typing import Literal

import lm_eval
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

TASKS = Path(lm_eval.__file__).parent / "tasks"
Form = Literal["default", "continuation"]
"""Folders of the harness's definitions of MMLU: letters, or the choices' texts (here: cloze)."""


def mmlu(data: Path, subjects: list[str], num_fewshot: int, form: Form = "default") -> Group:
    """MMLU with its groups, cut to some subjects: questions from `test/<subject>_test.csv`, examples from
    `dev/<subject>_dev.csv`.
    """
    folder = TASKS / "mmlu" / form
    whole = load_yaml(folder / "_mmlu.yaml")
    group = Group.from_config(whole)
    for part in whole["task"]:
        definition = load_yaml(folder / f"_{part}.yaml") if isinstance(part, str) else part
        member = Group.from_config(definition)
        for subject in subjects:
            path = folder / f"mmlu_{subject}.yaml"
            if load_yaml(path)["tag"] in definition["task"]:
                member.add(
                    task(
                        path,
                        {split: data / split / f"{subject}_{split}.csv" for split in ("dev", "test")},
                        num_fewshot,
                    )
                )
        if len(member):
            group.add(member)
    return group


def task(definition: Path, files: dict[str, Path], num_fewshot: int = 0) -> ConfigurableTask:
    """Return a task of the harness whose splits are CSV files in MMLU's form."""
    config = load_yaml(definition)
    config.pop("tag", None)  # as the harness does it
    config |= {
        "custom_dataset": lambda **_: {split: read(path) for split, path in files.items()},
        "num_fewshot": num_fewshot,
    }
    return ConfigurableTask(config=config)


def read(path: Path) -> Dataset:
    """Return the file's rows in the form of `cais/mmlu`. Read as a table, a choice "None" would become a
    missing value.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Dataset.from_list(
        [
            {
                "question": row["question"],
                "choices": [row[f"choice{index}"] for index in range(4)],
                "answer": int(row["answer"]),
            }
            for row in rows
        ]
    )


def quiet_harness() -> None:
    """Keep back the harness's notes, which are a line or more per task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def harness_model(folder: str, device: str, dtype: str, batch_size: int) -> HFLM:
    return HFLM(pretrained=folder, device=device, dtype=dtype, batch_size=batch_size)

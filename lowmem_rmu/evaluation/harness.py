"""Scores in the layout of lm-evaluation-harness 0.4.13 (`results_*.json`), so that what reads its files reads
ours.

Where the harness measures several things, there is the one that decides here: `acc` for letters, `acc_norm`
for the cloze form.
"""

import re
from dataclasses import replace
from typing import Any

from lowmem_rmu.config.schema import known_tasks
from lowmem_rmu.data.questions import LETTERS, QuestionSet
from lowmem_rmu.evaluation.prompts import prompt

METRICS = {"letters": "acc", "cloze": "acc_norm"}
# The harness's own word: for a version that there is not, and for the standard error of a single question.
UNKNOWN = "N/A"
TASK_VERSIONS = {"mmlu": 1.0, "wmdp_bio": 1, "wmdp_chem": 1, "wmdp_cyber": 1}
GROUP_VERSIONS = {"mmlu": "2", "wmdp": "1"}
TEMPLATES: dict[str, dict[str, Any]] = {
    "letters": {
        "doc_to_text": (
            "{{question.strip()}}\n"
            "A. {{choices[0]}}\n"
            "B. {{choices[1]}}\n"
            "C. {{choices[2]}}\n"
            "D. {{choices[3]}}\n"
            "Answer:"
        ),
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "cloze": {
        "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    },
}

Row = dict[str, Any]
"""A task or group in `results`."""


def harness_results(
    scores: dict[str, Any], sets: list[QuestionSet], model: str, date: float
) -> dict[str, Any]:
    """Return the results file that lm-evaluation-harness would write about the same answers.

    `scores` are those of `evaluation/base.json` for `sets`; `date` is when they were measured, in seconds
    since 1970. Groups whose members are scored in different forms are left out, as the harness has no average
    of them.
    """
    members = {
        name: each for name, each in _members(sets).items() if len({member.scoring for member in each}) == 1
    }
    subtasks = _subtasks(members)
    tasks = {each.name: _row(each.name, _alias(each), [each], scores["tasks"][each.name]) for each in sets}
    groups = {
        name: _group_row(name, subtasks, each, scores["groups"][name]) for name, each in members.items()
    }
    together = {each.name: [each] for each in sets} | members
    shots = {name: {len(each.examples) for each in within} for name, within in together.items()}
    return {
        "results": tasks | groups,
        **({"groups": groups} if groups else {}),
        "group_subtasks": subtasks,
        "configs": {each.name: _config(each) for each in sets},
        "versions": {each.name: _version(each) for each in sets}
        | {name: _group_version(name) for name in members},
        "n-shot": {name: counts.pop() for name, counts in shots.items() if len(counts) == 1},
        "higher_is_better": {name: {METRICS[within[0].scoring]: True} for name, within in together.items()},
        "n-samples": {
            each.name: {
                "original": each.sampled_from or len(each.questions),
                "effective": len(each.questions),
            }
            for each in sets
        },
        "config": {
            "model": "lowmem-rmu",
            "model_args": {"pretrained": model},
            "limit": _limit(sets),
            "gen_kwargs": None,
        },
        "date": date,
        "system_instruction": None,
        "chat_template": None,
        "model_source": "lowmem-rmu",
        "model_name": model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model),
        "total_evaluation_time_seconds": str(scores["seconds"]),
    }


def _members(sets: list[QuestionSet]) -> dict[str, list[QuestionSet]]:
    """Return groups by name, the largest first; of two that hold the same, the one with the shorter name."""
    members: dict[str, list[QuestionSet]] = {}
    for each in sets:
        for group in filter(None, (each.group, *each.averages)):
            members.setdefault(group, []).append(each)
    return dict(sorted(members.items(), key=lambda item: (-len(item[1]), len(item[0]))))


def _subtasks(members: dict[str, list[QuestionSet]]) -> dict[str, list[str]]:
    """Return the members of each group: the groups that lie in it and in no smaller one, and the sets that
    are in none of those.
    """
    names = {group: {each.name for each in within} for group, within in members.items()}
    subtasks: dict[str, list[str]] = {}
    for group in members:
        if outer := [larger for larger in subtasks if names[group] <= names[larger]]:
            subtasks[outer[-1]].append(group)
        subtasks[group] = []
    for group, within in members.items():
        inside = {name for inner in subtasks[group] for name in names[inner]}
        subtasks[group] += [each.name for each in within if each.name not in inside]
    return subtasks


def _row(name: str, alias: str, within: list[QuestionSet], summary: dict[str, Any]) -> Row:
    metric = METRICS[within[0].scoring]
    stderr = summary["stderr"] if all(len(each.questions) > 1 for each in within) else UNKNOWN
    return {
        "name": name,
        "alias": alias,
        "sample_len": summary["questions"],
        f"{metric},none": summary["accuracy"],
        f"{metric}_stderr,none": stderr,
    }


def _group_row(
    name: str, subtasks: dict[str, list[str]], within: list[QuestionSet], summary: dict[str, Any]
) -> Row:
    outer = next((group for group, inner in subtasks.items() if name in inner), "")
    alias = name.removeprefix(f"{outer}_").replace("_", " ") if outer else name
    return _row(name, alias, within, summary) | {
        "sample_count": {f"{METRICS[within[0].scoring]},none": summary["questions"]}
    }


def _alias(each: QuestionSet) -> str:
    return each.name.removeprefix(f"{each.group}_")


def _version(each: QuestionSet) -> float | str:
    """Return the version of the harness's task of this name, which is that of the form with letters for the
    cloze form too.
    """
    return TASK_VERSIONS.get(each.group or each.name, UNKNOWN)


def _group_version(name: str) -> str:
    return GROUP_VERSIONS.get("mmlu" if name in known_tasks()["mmlu"]["averages"] else name, UNKNOWN)


def _config(each: QuestionSet) -> dict[str, Any]:
    """Return the settings that decide the prompts, in the terms of the harness's task definitions."""
    context = prompt(replace(each, examples=()), each.questions[0]).context
    return (
        TEMPLATES[each.scoring]
        | {
            "task": each.name,
            "task_alias": _alias(each),
            "output_type": "multiple_choice",
            "description": context[: context.index("\n\n") + 2],
            "target_delimiter": " ",
            "fewshot_delimiter": "\n\n",
            "num_fewshot": len(each.examples),
            "metadata": {"version": _version(each)},
        }
        | ({"fewshot_config": {"sampler": "first_n"}} if each.examples else {})
    )


def _limit(sets: list[QuestionSet]) -> int | None:
    """Return questions that a task has at most where some were left out, which is what the harness calls the
    limit.
    """
    return max((len(each.questions) for each in sets if each.sampled_from), default=None)

"""Beside lm-evaluation-harness itself on the same questions: prompts, log-probabilities, answers, accuracies, averages and its results file."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import TASKS, harness_model, mmlu, quiet_harness, task
from lowmem_rmu.config.schema import ModelSettings, Task, known_tasks
from lowmem_rmu.data.questions import QuestionSet, load_task
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.multiple_choice import Evaluated, ask, evaluate, score
from lowmem_rmu.model.loading import load_model, load_tokenizer
from tests.records import answer_row

FORMS = {"letters": "default", "cloze": "continuation"}
TINY = Path(__file__).parents[2] / "lowmem_rmu/tiny/model"
SMALL_MMLU, SMALL_SUBJECTS = Path(__file__).parents[1] / "data/mmlu", ["astronomy", "high_school_geography"]
MMLU = Path(__file__).resolve().parents[3] / "shared/data/mmlu"
CASES = [*product(["tiny"], FORMS, [0, 5]), ("random", "cloze", 0), ("random", "letters", 5)]
SMOLLM2 = os.environ.get("LOWMEM_RMU_SMOLLM2", "")


@dataclass(frozen=True)
class Both:
    """The same questions asked of the same model by this package and by the harness."""

    scoring: str
    sets: list[QuestionSet]
    ours: Evaluated
    theirs: dict[str, Any]

    @property
    def metric(self) -> str:
        return {"letters": "acc", "cloze": "acc_norm"}[self.scoring]

    def name(self, each: QuestionSet) -> str:
        """The harness's name of the task."""
        return each.name if self.scoring == "letters" else f"{each.name}_continuation"

    def samples(self) -> list[dict[str, Any]]:
        """A row a question, in the order of our answers."""
        return [row for each in self.sets for row in self.theirs["samples"][self.name(each)]]


def ask_both(
    model: Path, data: Path, subjects: list[str], scoring: str, num_fewshot: int, limit: int | None = None
) -> Both:
    settings = ModelSettings(name=str(model), quantisation="none", dtype="float32")
    given = {"source": str(data), "subjects": subjects, "num_fewshot": num_fewshot, "scoring": scoring}
    sets = [
        cut(each, limit) for each in load_task("mmlu", Task.model_validate(known_tasks()["mmlu"] | given))
    ]
    ours = evaluate(load_model(settings, torch.device("cpu")), load_tokenizer(settings), sets, 2048)
    quiet_harness()
    theirs = simple_evaluate(
        harness_model(str(model), "cpu", "float32", 4),
        tasks=[mmlu(data, subjects, num_fewshot, FORMS[scoring])],
        limit=limit,
        task_manager=TaskManager(include_defaults=False),
    )
    return Both(scoring, sets, ours, dict(theirs))


def cut(each: QuestionSet, limit: int | None) -> QuestionSet:
    return (
        each
        if limit is None
        else replace(each, questions=each.questions[:limit], sampled_from=len(each.questions))
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def both(request: pytest.FixtureRequest, small_model_folder: Path) -> Both:
    """The shipped model, and one with random weights that answers every letter and reads too few tokens for five examples with letters."""
    model, scoring, num_fewshot = request.param
    asked = ask_both(
        TINY if model == "tiny" else small_model_folder, SMALL_MMLU, SMALL_SUBJECTS, scoring, num_fewshot
    )
    assert asked.ours.scores["cut_prompts"] == (26 if request.param == ("random", "letters", 5) else 0)
    return asked


def test_prompts_are_equal_to_the_byte(both: Both) -> None:
    ours = [
        [(each.prompt.context, continuation) for continuation in each.prompt.continuations]
        for each in ask(both.sets)
    ]
    assert ours == [row["arguments"] for row in both.samples()]


def test_log_probabilities_and_answers_are_equal(both: Both) -> None:
    lengths = [
        [len(choice) if both.scoring == "cloze" else 1 for choice in each.question.choices]
        for each in ask(both.sets)
    ]
    for answer, row, length in zip(both.ours.answers, both.samples(), lengths, strict=True):
        logprobs = [logprob for logprob, _ in row["filtered_resps"]]
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert answer.answer == max(range(4), key=lambda choice: logprobs[choice] / length[choice])
        assert answer.correct == row[both.metric]


def test_accuracies_and_standard_errors_are_equal(both: Both) -> None:
    for each in both.sets:
        task, theirs = both.ours.scores["tasks"][each.name], both.theirs["results"][both.name(each)]
        assert (task["accuracy"], task["stderr"]) == pytest.approx(
            (theirs[f"{both.metric},none"], theirs[f"{both.metric}_stderr,none"])
        )
        assert task["questions"] == theirs["sample_len"]


def test_averages_of_groups_are_equal(both: Both) -> None:
    """The harness's own groups of the cloze form average `acc` alone, so there its functions are given `acc_norm`."""
    assert both.ours.scores["groups"].keys() == {"mmlu", "mmlu_stem", "mmlu_social_sciences"}
    for name, group in both.ours.scores["groups"].items():
        rows = [
            both.theirs["results"][both.name(each)]
            for each in both.sets
            if name in (each.group, *each.averages)
        ]
        sizes = [row["sample_len"] for row in rows]
        mean = aggregate_subtask_metrics([row[f"{both.metric},none"] for row in rows], sizes)
        stderr = pooled_sample_stderr([row[f"{both.metric}_stderr,none"] for row in rows], sizes)
        assert (group["accuracy"], group["stderr"]) == pytest.approx((mean, stderr))
        if both.scoring == "letters":
            theirs = both.theirs["groups"][name]
            assert (group["accuracy"], group["stderr"]) == pytest.approx(
                (theirs["acc,none"], theirs["acc_stderr,none"])
            )


def test_the_results_file_is_that_of_the_harness(both: Both) -> None:
    ours = json.loads(json.dumps(harness_results(both.ours.scores, both.sets, "a/model", 0.0)))
    for each in both.sets:
        theirs = both.theirs["configs"][both.name(each)]
        config = ours["configs"][each.name] | {
            "task": both.name(each),
            "task_alias": theirs.get("task_alias"),
        }
        assert config.pop("metadata")["version"] == theirs["metadata"]["version"]
        assert config.pop("fewshot_config", {}).items() <= theirs["fewshot_config"].items()
        assert config == {key: theirs.get(key) for key in config}
    if both.scoring == "letters":
        assert_equal_results(ours, both.theirs)
    else:
        for each in both.sets:
            row, theirs = ours["results"][each.name], both.theirs["results"][both.name(each)]
            assert rounded(row) == rounded(
                {key: theirs[key] for key in row}
                | {"name": each.name, "alias": each.name.removeprefix("mmlu_")}
            )
        assert "|acc_norm|↑  |" in make_table(ours)


def assert_equal_results(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The harness forgets these two of a group of groups, as it comes to it before them."""
    for part in ("n-shot", "higher_is_better"):
        assert theirs[part] == {name: value for name, value in ours[part].items() if name != "mmlu"}
        theirs = theirs | {part: ours[part]}
    for part in ("results", "groups"):
        assert {name: rounded(row) for name, row in ours[part].items()} == {
            name: rounded(row) for name, row in theirs[part].items()
        }
        assert make_table(ours, part) == make_table(theirs, part)
    subtasks = [
        {group: sorted(names) for group, names in side["group_subtasks"].items()} for side in (ours, theirs)
    ]
    assert subtasks[0] == subtasks[1]
    assert (ours["versions"], ours["n-samples"]) == (theirs["versions"], theirs["n-samples"])
    assert ours["config"]["limit"] == theirs["config"]["limit"]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 9) if isinstance(value, float) else value for key, value in row.items()}


@pytest.mark.parametrize("scoring", FORMS)
def test_a_question_longer_than_the_context_is_cut_as_the_harness_does(scoring: str, tmp_path: Path) -> None:
    rows = [f"{'Which star? ' * 200},Sirius,Vega and others,Rigel,Deneb,1", "Which?,a,b,c,d,0"]
    both = ask_both(TINY, written(rows, tmp_path), ["astronomy"], scoring, 0)
    assert both.ours.scores["cut_prompts"] == 1
    test_log_probabilities_and_answers_are_equal(both)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_an_empty_choice_is_never_the_answer_as_in_the_harness(tmp_path: Path) -> None:
    both = ask_both(
        TINY,
        written(["Which?,a,b,c,d,0", "Which star is nearest?,,b,z,q,0"], tmp_path),
        ["astronomy"],
        "cloze",
        0,
    )
    answer, row = both.ours.answers[1], both.samples()[1]
    assert answer.logprobs == pytest.approx([logprob for logprob, _ in row["filtered_resps"]], abs=1e-3)
    assert answer.logprobs.index(max(answer.logprobs)) == 0
    assert (answer.correct, row["acc_norm"]) == (False, 0.0)


def test_tokens_that_reach_across_the_seam_are_parted_as_the_harness_does(
    small_model_folder: Path, tmp_path: Path
) -> None:
    """A token ": S" stands for the end of the context and the beginning of the choice."""
    vocabulary = {token: number for number, token in enumerate(["?", ": S", *map(chr, range(10, 127))])}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r": S|[\s\S]"), "isolated")
    model = shutil.copytree(small_model_folder, tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="?", bos_token="?", eos_token="?"
    ).save_pretrained(model)
    both = ask_both(model, written(["Which?,Sirius,Spica,Vega,Sun,0"], tmp_path), ["astronomy"], "cloze", 0)
    test_log_probabilities_and_answers_are_equal(both)


def written(rows: list[str], folder: Path) -> Path:
    """Questions, which are also the examples, as MMLU's files."""
    for split in ("dev", "test"):
        (folder / split).mkdir()
        text = "\n".join(["question,choice0,choice1,choice2,choice3,answer", *rows])
        (folder / split / f"astronomy_{split}.csv").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["wmdp_bio", "wmdp_chem", "wmdp_cyber"])
def test_the_prompts_of_wmdp_are_equal_to_the_byte(name: str) -> None:
    """Over harmless questions: what counts is what stands around them."""
    questions = SMALL_MMLU / "test/astronomy_test.csv"
    theirs = task(TASKS / "wmdp" / f"{name}.yaml", {"test": questions})
    theirs.build_all_requests()
    (ours,) = load_task(name, Task.model_validate(known_tasks()[name] | {"source": str(questions)}))
    asked = [
        (each.prompt.context, continuation)
        for each in ask([ours])
        for continuation in each.prompt.continuations
    ]
    assert asked == [instance.args for instance in theirs.instances]
    scores = score([ours], [answer_row(task=name)] * 15, 1.0)
    results = harness_results(scores, [ours], "a/model", 0.0)
    assert results["versions"] == {name: theirs.VERSION, "wmdp": "1"}


@pytest.mark.skipif(not SMOLLM2, reason="needs SmolLM2-135M-Instruct: give its folder in LOWMEM_RMU_SMOLLM2")
@pytest.mark.skipif(not MMLU.exists(), reason=f"MMLU is not at {MMLU}")
@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_a_real_model_on_real_questions(num_fewshot: int) -> None:
    both = ask_both(
        Path(SMOLLM2), MMLU, ["astronomy", "marketing", "philosophy"], "letters", num_fewshot, limit=5
    )
    test_prompts_are_equal_to_the_byte(both)
    test_log_probabilities_and_answers_are_equal(both)
    assert_equal_results(harness_results(both.ours.scores, both.sets, SMOLLM2, 0.0), both.theirs)

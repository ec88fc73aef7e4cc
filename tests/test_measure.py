"""`python -m lowmem_rmu evaluate`: models, adapters and runs on any tasks, into a folder that is gone on with."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from inline_snapshot import snapshot
from typer.testing import CliRunner

from lowmem_rmu.__main__ import app
from lowmem_rmu.cli.progress import Lines
from lowmem_rmu.errors import UserError
from lowmem_rmu.measure import check_base, choose_tasks, find_subject
from lowmem_rmu.runs.files import read_lines, write_json
from tests.texts import plain

TINY = Path(__file__).parent.parent / "lowmem_rmu/tiny"
SUBJECTS = TINY / "data/questions/subjects"
COMPOUNDS = TINY / "data/questions/compounds.jsonl"
ASKED = ("--tasks", f"{SUBJECTS},{COMPOUNDS}", "--limit", "24", "--device", "cpu")


def evaluate(model: Path | str, to: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", str(model), *ASKED, "--to", str(to), *more])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that unlearns compounds."""
    runs_dir = tmp_path_factory.mktemp("runs")
    options = [
        "--stages",
        "unlearn",
        "--device",
        "cpu",
        "--set",
        "rmu.steps=8",
        "--runs-dir",
        str(runs_dir),
        "--name",
        "short",
    ]
    assert CliRunner().invoke(app, ["run", "tiny", *options]).exit_code == 0
    return runs_dir / "short"


def read(to: Path, name: str) -> Any:
    return json.loads((to / name).read_text())


def test_a_model_is_asked_and_the_folder_holds_all_of_it(tmp_path: Path) -> None:
    result = evaluate(TINY / "model", tmp_path / "a")
    assert result.exit_code == 0, result.output
    scores = read(tmp_path / "a", "base.json")
    assert scores["tasks"]["compounds"]["accuracy"] == 1.0
    assert scores["tasks"]["compounds"]["sampled_from"] == 264
    assert scores["groups"]["subjects"]["questions"] == 24
    assert len(read_lines(tmp_path / "a/answers_base.jsonl")) == 48
    assert not (tmp_path / "a/unlearned.json").exists()
    assert "100.0" in result.stdout


def test_a_run_and_its_adapter_alone_are_asked_as_base_and_as_unlearned_with_the_same_answers(
    run_folder: Path, tmp_path: Path
) -> None:
    assert evaluate(run_folder, tmp_path / "run").exit_code == 0
    result = evaluate(run_folder / "adapter", tmp_path / "adapter", "--json", "--batch-tokens", "2048")
    assert result.exit_code == 0
    for side in ("base", "unlearned"):
        answers = [read_lines(tmp_path / name / f"answers_{side}.jsonl") for name in ("run", "adapter")]
        assert [row["answer"] for row in answers[0]] == [row["answer"] for row in answers[1]]
    summary = json.loads(result.stdout)
    assert summary == read(tmp_path / "adapter", "summary.json")
    assert {row["unlearned"] is None for row in summary["rows"]} == {False}
    assert read(tmp_path / "adapter", "base.json")["known_before"] == 48, (
        "the same base model was asked by the other evaluation"
    )


def test_the_folder_of_a_finished_evaluation_is_read_and_nothing_asked(tmp_path: Path) -> None:
    assert evaluate(TINY / "model", tmp_path / "a").exit_code == 0
    before = (tmp_path / "a/answers_base.jsonl").read_text()
    shutil.rmtree(tmp_path / ".base_answers")
    assert evaluate(TINY / "model", tmp_path / "a").exit_code == 0
    assert read(tmp_path / "a", "base.json")["known_before"] == 48
    assert (tmp_path / "a/answers_base.jsonl").read_text() == before


def test_a_stopped_evaluation_says_how_to_go_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--batch-tokens", "512")
    assert evaluate(TINY / "model", tmp_path / "one/whole", *small).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(Lines, "asks_to_stop", lambda self: True)
        stopped = evaluate(TINY / "model", tmp_path / "two/stopped", *small)
    assert stopped.exit_code == 130
    assert plain(stopped.stderr.splitlines()[-1], folder=tmp_path / "two/stopped") == snapshot(
        "Stopped. Nothing is lost; go on with: the same command with --to <folder>"
    )
    assert evaluate(TINY / "model", tmp_path / "two/stopped", *small).exit_code == 0
    assert (tmp_path / "one/whole/answers_base.jsonl").read_text() == (
        tmp_path / "two/stopped/answers_base.jsonl"
    ).read_text()


def test_results_of_another_model_or_of_other_questions_are_not_mixed(
    tmp_path: Path, run_folder: Path
) -> None:
    assert evaluate(TINY / "model", tmp_path / "a").exit_code == 0
    other = evaluate(run_folder, tmp_path / "a")
    assert other.exit_code == 2
    assert plain("\n".join(other.stderr.splitlines()[-2:]), folder=tmp_path / "a") == snapshot(
        "The folder <folder> holds results of another model: tiny/model.\nGive a new folder with --to."
    )
    others = evaluate(TINY / "model", tmp_path / "a", "--limit", "12")
    assert others.exit_code == 2
    assert plain("\n".join(others.stderr.splitlines()[-2:]), folder=tmp_path / "a") == snapshot(
        "The folder <folder> holds results of other questions: limit differ.\nGive a new folder with --to."
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/letter.txt").write_text("Dear")
    refused = evaluate(TINY / "model", tmp_path / "b")
    assert plain("\n".join(refused.stderr.splitlines()[-2:]), folder=tmp_path / "b") == snapshot(
        "The folder <folder> holds other files.\nGive a new folder with --to."
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("wmdp", {"wmdp_bio": None, "wmdp_chem": None, "wmdp_cyber": None}),
        ("wmdp_bio,mmlu", {"wmdp_bio": None, "mmlu": None}),
        ("mmlu_virology, mmlu_anatomy", {"mmlu": ["virology", "anatomy"]}),
        ("./own/quiz.jsonl", {"quiz": None}),
    ],
)
def test_names_of_tasks_groups_and_subjects(names: str, found: dict[str, Any]) -> None:
    tasks = choose_tasks(names, None, [], None, "auto").tasks
    assert {name: task.subjects for name, task in tasks.items()} == found


def test_an_average_names_its_subjects() -> None:
    assert len(choose_tasks("mmlu_stem", 5, [], None, 512).tasks["mmlu"].subjects or []) == 19


def test_changes_reach_their_task() -> None:
    task = choose_tasks("mmlu", 5, ["mmlu.source=./mmlu", "mmlu.scoring=cloze"], 100, "auto").tasks["mmlu"]
    assert (task.source, task.scoring, task.num_fewshot) == (str(Path.cwd() / "mmlu"), "cloze", 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mmul",), snapshot('There is no task "mmul". Did you mean "mmlu"?')),
        ((" , ",), snapshot("--tasks names no task. There is: mmlu, wmdp_bio, wmdp_chem, wmdp_cyber.")),
        (
            ("wmdp_bio", 5),
            snapshot(
                "The tasks cannot be asked so:\n"
                "  tasks.wmdp_bio: num_fewshot 5 takes an examples_split; this task has none, so ask it with "
                "0"
            ),
        ),
        (
            ("mmlu", None, ["mmlu.scorng=cloze"]),
            snapshot("The tasks cannot be asked so:\n  tasks.mmlu.scorng: Extra inputs are not permitted"),
        ),
        (
            ("mmlu", None, ["mmlu"]),
            snapshot('--set "mmlu" is not of the form key.path=value, for example --set rmu.steps=50.'),
        ),
    ],
)
def test_tasks_that_cannot_be_asked(arguments: tuple[Any, ...], said: str) -> None:
    names, num_fewshot, changes = (*arguments, None, None)[:3]
    with pytest.raises(UserError) as caught:
        choose_tasks(names, num_fewshot, changes or [], None, "auto")
    assert plain(caught.value) == said


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    result = evaluate("./nowhere", tmp_path / "a")
    assert (result.exit_code, plain(result.stderr, folder=tmp_path / "a")) == (
        2,
        snapshot(
            "Run folder: <folder>\n"
            "The model folder ./nowhere does not exist.\n"
            "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id.\n"
        ),
    )
    assert not (tmp_path / "a").exists()


def test_a_run_says_how_it_is_quantised_and_options_override_it(run_folder: Path) -> None:
    assert find_subject(str(run_folder)).spec.settings.quantisation == "nf4"
    subject = find_subject(str(run_folder), quantisation="none", dtype="float32")
    assert (subject.spec.settings.quantisation, subject.spec.settings.dtype, subject.adapter) == (
        "none",
        "float32",
        run_folder / "adapter",
    )
    assert find_subject("owner/model").spec.name == "owner/model"


ENDPOINT = ("--endpoint", "http://localhost:1/v1")


@pytest.mark.parametrize(
    "options", [(), ENDPOINT, ("--model", "gpt"), ("./model", *ENDPOINT, "--model", "gpt")], ids=len
)
def test_one_model_is_named_and_no_two(options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["evaluate", *options])
    assert (result.exit_code, plain(result.stderr)) == (
        2,
        snapshot("Which model? Give either a model or a run, or --endpoint URL with --model NAME.\n"),
    )


class AlwaysB(BaseHTTPRequestHandler):
    """A server whose model gives the same letter to everything, and no log-probabilities."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps({"choices": [{"message": {"content": "B"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_is_asked_and_its_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), AlwaysB)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = [
        *ASKED[:4],
        "--endpoint",
        f"http://127.0.0.1:{server.server_port}/v1",
        "--model",
        "owner/b",
        "--to",
        str(tmp_path / "b"),
    ]
    result = CliRunner().invoke(app, ["evaluate", *options])
    server.shutdown()
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "b", "base.json")["tasks"]["compounds"]["answers"] == [0, 24, 0, 0]
    assert (
        read(tmp_path / "b", "config.json")["model"]
        == f"owner/b at http://127.0.0.1:{server.server_port}/v1/chat/completions"
    )
    assert CliRunner().invoke(app, ["evaluate", *options]).exit_code == 0, (
        "the server is gone, but its answers are there"
    )
    assert "sk-secret" not in "".join(file.read_text() for file in (tmp_path / "b").iterdir())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            "./a/quiz.jsonl,./b/quiz.jsonl",
            snapshot(
                "--tasks names two tasks that would both be called quiz: ./a/quiz.jsonl, ./b/quiz.jsonl.\n"
                "Rename one of them."
            ),
        ),
        (
            "./a/quiz.csv,./a/quiz.jsonl",
            snapshot(
                "--tasks names two tasks that would both be called quiz: ./a/quiz.csv, ./a/quiz.jsonl.\n"
                "Rename one of them."
            ),
        ),
        (
            "mmlu,./mmlu",
            snapshot(
                "--tasks names two tasks that would both be called mmlu: mmlu, ./mmlu.\nRename one of them."
            ),
        ),
        (
            "./mmlu,mmlu",
            snapshot(
                "--tasks names two tasks that would both be called mmlu: mmlu, ./mmlu.\nRename one of them."
            ),
        ),
    ],
)
def test_two_tasks_of_one_name_do_not_replace_each_other(names: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_tasks(names, None, [], None, "auto")
    assert plain(caught.value) == said


def test_an_evaluation_records_what_it_read_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    folder.mkdir()
    line = json.dumps({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1})
    for name in ("owls_test.jsonl", "owls_dev.jsonl", "README.md"):
        (folder / name).write_text(line)
    arguments = [
        "evaluate",
        str(TINY / "model"),
        "--tasks",
        str(folder),
        "--to",
        str(tmp_path / "to"),
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stderr.splitlines() if "evaluation.tasks.quiz" in line]
    assert plain(line) == snapshot(
        "Read for evaluation.tasks.quiz: 1 file (owls_test.jsonl). Left out: README.md (about the data), "
        "owls_dev.jsonl (of the split dev)."
    )
    [record] = read(tmp_path / "to", "config.json")["data"]["evaluation.tasks.quiz"]
    assert record["left_out"] == {"README.md": "about the data", "owls_dev.jsonl": "of the split dev"}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            None,
            snapshot(
                "The adapter <adapter> does not name the model that it belongs to.\n"
                "Write it into its adapter_config.json, as base_model_name_or_path: a folder or a Hub id."
            ),
        ),
        (
            "./nowhere",
            snapshot(
                "The model folder ./nowhere does not exist.\n"
                "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id.\n"
                "The adapter <adapter> names ./nowhere as its base model."
            ),
        ),
    ],
)
def test_an_adapter_whose_base_is_not_to_be_had(
    run_folder: Path, tmp_path: Path, base: str | None, said: str
) -> None:
    adapter = Path(shutil.copytree(run_folder / "adapter", tmp_path / "alone"))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": base})
    with pytest.raises(UserError) as caught:
        check_base(find_subject(str(adapter)))
    assert plain(caught.value, adapter=adapter) == said


def test_an_adapter_may_name_its_base_from_its_own_folder_or_from_here(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(run_folder / "adapter", tmp_path / "there/alone"))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": "models/llama"})
    assert find_subject(str(adapter)).spec.name == "models/llama", "a Hub id"
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_subject(str(adapter)).spec.name == str(tmp_path / "models/llama")
    monkeypatch.chdir(tmp_path / "there")
    (adapter / "models/llama").mkdir(parents=True)
    assert find_subject(str(adapter)).spec.name == str(adapter / "models/llama")


def test_damage_of_a_run_is_told_and_not_taken_for_a_model(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "config.json").write_text('{"settings"')
    with pytest.raises(UserError) as caught:
        find_subject(str(run))
    assert plain(caught.value, run=run) == snapshot(
        "<run>/config.json is damaged: it does not hold a JSON object.\n"
        "Put the file back from a copy, or delete the folder <run>."
    )

"""The command line from end to end on the shipped tiny model, and what it says to mistakes."""

import errno
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from click.testing import Result
from inline_snapshot import snapshot
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils.import_utils import KERNELS_MIN_VERSION
from typer.testing import CliRunner

from lowmem_rmu.cli import run as command_line
from lowmem_rmu.cli.errors import resume_command
from lowmem_rmu.cli.progress import Interrupts, Lines
from lowmem_rmu.cli.tables import accuracy_table, text_table
from lowmem_rmu.config.loading import load_preset, preset_names
from lowmem_rmu.data.questions import Question, QuestionSet, load_questions, stratified, unasked_subjects
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Row, compare_tasks, compare_texts
from lowmem_rmu.evaluation.multiple_choice import evaluate
from lowmem_rmu.evaluation.summary import read_summary
from lowmem_rmu.model.adapters import load_adapter
from lowmem_rmu.model.loading import load_model, load_tokenizer
from lowmem_rmu.runs import status
from lowmem_rmu.runs.files import read_lines, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket, tickets
from lowmem_rmu.runs.records import Answer
from lowmem_rmu.runs.status import StatusWriter, Stopped
from lowmem_rmu.unlearning.checkpoint import trainable
from lowmem_rmu.unlearning.trainer import Trainer
from tests.records import answer_row
from tests.texts import plain, without_numbers

TINY_MODEL = Path(__file__).parent.parent / "lowmem_rmu/tiny/model"
SHORT = (
    "--set",
    "rmu.steps=6",
    "--set",
    "rmu.checkpoint_every=2",
    "--set",
    "evaluation.limit=18",
    "--device",
    "cpu",
)
SETTINGS = [part for part in SHORT if "=" in part]
METRICS = {
    "step",
    "topic",
    "loss",
    "forget_loss",
    "retain_loss",
    "forget_cosine",
    "retain_cosine",
    "grad_norm",
    "tokens",
    "sinks",
    "seconds",
    "peak_memory_bytes",
}


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command_line.run)
    return CliRunner().invoke(app, list(arguments))


def run_tiny(runs_dir: Path, name: str, *more: str) -> Result:
    return call("tiny", *SHORT, "--runs-dir", str(runs_dir), "--name", name, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    result = run_tiny(runs_dir, "first")
    assert result.exit_code == 0, result.output
    return runs_dir / "first"


def losses(folder: Path) -> list[tuple[float, ...]]:
    return [
        (row["forget_loss"], row["retain_loss"], row["grad_norm"])
        for row in read_lines(folder / "metrics.jsonl")
    ]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same_adapter(first: Path, second: Path) -> None:
    one, other = adapter_weights(first), adapter_weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_the_folder_that_the_contract_promises(finished: Path) -> None:
    for name in (
        "config.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "adapter/adapter_model.safetensors",
        "checkpoint",
    ):
        assert (finished / name).exists(), name
    for side in ("base", "unlearned"):
        scores = json.loads((finished / f"evaluation/{side}.json").read_text())
        assert {"tasks", "groups", "seconds", "questions_per_second"} <= scores.keys()
        assert {"accuracy", "stderr", "questions", "correct"} <= scores["tasks"]["compounds"].keys()
        harness = json.loads((finished / f"evaluation/harness_{side}.json").read_text())
        assert harness["results"]["compounds"]["acc,none"] == scores["tasks"]["compounds"]["accuracy"]
        answers = read_lines(finished / f"evaluation/answers_{side}.jsonl")
        assert len(answers) == 5 * 18
        assert all(len(answer["logprobs"]) == 4 for answer in answers)
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["stage"], status["error"]) == ("done", "report", None)
    rows = read_lines(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["topic"] for row in rows[:2]] == ["compounds", "locks"]
    assert rows[0].keys() >= METRICS
    assert rows[0]["retain_loss"] == 0.0
    recorded = json.loads((finished / "matrices.json").read_text())
    assert {
        f"base_model.model.{name.removesuffix('weight')}lora_A.weight" for name in recorded
    } < adapter_weights(finished).keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in recorded.values())


MODES = {
    "whole matrices": ["rmu.trainable=weights", "rmu.learning_rate=1e-3", "rmu.max_grad_norm=null"],
    "eight bits": ["rmu.optimizer=adamw8bit", "rmu.cache_in=disk"],
    "contrastive": [
        "topics.compounds.steering=contrastive",
        "topics.compounds.steering_coefficient=2",
        "topics.compounds.about=odd compounds",
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_training_ends_the_same_in_one_process_or_in_two(
    finished: Path, tmp_path: Path, mode: str
) -> None:
    """In the second one only the layers up to the target are trained, and the adapter that was saved is measured."""
    settings = [part for setting in MODES[mode] for part in ("--set", setting)]
    assert run_tiny(tmp_path, "one", *settings).exit_code == 0
    assert run_tiny(tmp_path, "two", *settings, "--stages", "unlearn").exit_code == 0
    assert run_tiny(tmp_path, "two", *settings, "--stages", "evaluate-unlearned", "--resume").exit_code == 0
    assert_same_adapter(tmp_path / "one", tmp_path / "two")
    answers = [read_lines(tmp_path / name / "evaluation/answers_unlearned.jsonl") for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert losses(tmp_path / "one") != losses(finished)
    assert not (tmp_path / "one/cache").exists()


def test_the_config_holds_what_decides_the_run_and_no_token(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["rmu"]["steps"] == 6
    assert config["versions"].keys() >= {"python", "torch", "transformers", "peft", "bitsandbytes"}
    assert "hf_" not in (finished / "config.json").read_text()


def test_the_whole_model_is_4_bit_but_for_embeddings_and_norms(finished: Path) -> None:
    weights = json.loads((finished / "weights.json").read_text())
    assert weights["in_4bit"] / weights["weights"] > 0.85


def test_the_same_seed_gives_the_same_run_to_the_last_digit(finished: Path, tmp_path: Path) -> None:
    assert run_tiny(tmp_path, "again").exit_code == 0
    assert losses(tmp_path / "again") == losses(finished)
    assert_same_adapter(tmp_path / "again", finished)


def test_plain_peft_reloads_the_adapter_and_answers_every_question_as_the_run_did(finished: Path) -> None:
    preset = load_preset("tiny", ["evaluation.limit=18"])
    model = PeftModel.from_pretrained(load_model(preset.model, torch.device("cpu")), finished / "adapter")
    evaluated = evaluate(
        model, load_tokenizer(preset.model), load_questions(preset.evaluation), preset.evaluation.batch_tokens
    )
    recorded = read_lines(finished / "evaluation/answers_unlearned.jsonl")
    assert [answer.answer for answer in evaluated.answers] == [answer["answer"] for answer in recorded]
    differences = torch.tensor([answer.logprobs for answer in evaluated.answers]) - torch.tensor(
        [answer["logprobs"] for answer in recorded]
    )
    assert differences.abs().max() < 1e-5


def test_unlearning_alone_loads_the_layers_up_to_the_target_only_and_gives_the_same_adapter(
    finished: Path, tmp_path: Path
) -> None:
    assert run_tiny(tmp_path, "alone", "--stages", "unlearn").exit_code == 0
    loaded = json.loads((tmp_path / "alone/weights.json").read_text())["weights"]
    assert loaded < 0.6 * json.loads((finished / "weights.json").read_text())["weights"]
    assert_same_adapter(tmp_path / "alone", finished)
    preset = load_preset("tiny")
    load_adapter(load_model(preset.model, torch.device("cpu")), tmp_path / "alone/adapter")


def test_measuring_after_training_alone_still_measures_the_adapter(finished: Path, tmp_path: Path) -> None:
    assert run_tiny(tmp_path, "later", "--stages", "unlearn").exit_code == 0
    assert run_tiny(tmp_path, "later", "--resume").exit_code == 0
    for side in ("base", "unlearned"):
        assert read_lines(tmp_path / f"later/evaluation/answers_{side}.jsonl") == read_lines(
            finished / f"evaluation/answers_{side}.jsonl"
        )


def test_measuring_without_an_adapter_says_which_stage_comes_first(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "early", "--stages", "evaluate-unlearned")
    assert result.exit_code == 2
    assert plain("\n".join(result.stderr.splitlines()[-2:]), runs=tmp_path) == snapshot(
        "<runs>/early/adapter holds no adapter.\nRun the unlearn stage first."
    )


def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_it_had_not_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Lines, "asks_to_stop", lambda self: self.stage == "unlearn")
        result = run_tiny(tmp_path, "stopped")
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    problem, command, arguments = last.partition("python -m lowmem_rmu.run ")
    assert plain(problem + command) == snapshot(
        "Stopped. Nothing is lost; go on with: python -m lowmem_rmu.run"
    )
    assert "--resume" in shlex.split(arguments)
    assert RunFolder(tmp_path / "stopped").read_status().state == "stopped"
    assert len(read_lines(tmp_path / "stopped/metrics.jsonl")) == 1
    assert run_tiny(tmp_path, "stopped", "--resume").exit_code == 0
    assert losses(tmp_path / "stopped") == losses(finished)
    assert_same_adapter(tmp_path / "stopped", finished)


def scores(folder: Path, side: str) -> dict[str, Any]:
    found = json.loads((folder / f"evaluation/{side}.json").read_text())
    return {
        key: value
        for key, value in found.items()
        if key not in ("seconds", "questions_per_second", "known_before")
    }


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    small = ["--set", "evaluation.batch_tokens=1024"]
    assert run_tiny(tmp_path, "whole", *small).exit_code == 0
    shutil.rmtree(tmp_path / ".base_answers")
    with monkeypatch.context() as patched:
        patched.setattr(Lines, "asks_to_stop", lambda self: self.stage == f"evaluate-{side}")
        assert run_tiny(tmp_path, "stopped", *small).exit_code == 130
    answers = tmp_path / f"stopped/evaluation/answers_{side}.jsonl"
    there = answers.read_text()
    assert 0 < len(read_lines(answers)) < 90
    answers.write_text(there[:-20])  # the last line is torn, as by a kill
    assert run_tiny(tmp_path, "stopped", *small, "--resume").exit_code == 0
    assert answers.read_text() == (tmp_path / f"whole/evaluation/answers_{side}.jsonl").read_text()
    assert scores(tmp_path / "stopped", side) == scores(tmp_path / "whole", side)
    # What base has answered is also kept beside the runs.
    known = there.count("\n") - (1 if side == "unlearned" else 0)
    assert json.loads((tmp_path / f"stopped/evaluation/{side}.json").read_text())["known_before"] == known


def test_a_second_run_of_the_same_base_model_asks_it_nothing_again(finished: Path) -> None:
    assert run_tiny(finished.parent, "second", "--set", "rmu.steps=7").exit_code == 0
    second = finished.parent / "second"
    assert json.loads((second / "evaluation/base.json").read_text())["known_before"] == 90
    assert json.loads((second / "evaluation/unlearned.json").read_text())["known_before"] == 0
    assert (second / "evaluation/answers_base.jsonl").read_text() == (
        finished / "evaluation/answers_base.jsonl"
    ).read_text()
    assert scores(second, "base") == scores(finished, "base")


def test_another_precision_of_the_base_model_is_asked_anew(finished: Path) -> None:
    assert (
        run_tiny(
            finished.parent, "third", "--set", "model.quantisation=none", "--stages", "evaluate-base"
        ).exit_code
        == 0
    )
    assert json.loads((finished.parent / "third/evaluation/base.json").read_text())["known_before"] == 0


def test_two_processes_give_the_numbers_of_one(finished: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    arguments = [
        "-m",
        "lowmem_rmu.run",
        "tiny",
        *SHORT,
        "--runs-dir",
        str(tmp_path),
        "--name",
        "two",
        "--set",
        "evaluation.batch_tokens=1024",
    ]
    launched = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("Report:") == 1, "only the first process speaks"
    assert run_tiny(tmp_path / "apart", "one", "--set", "evaluation.batch_tokens=1024").exit_code == 0
    assert_same_adapter(tmp_path / "apart/one", tmp_path / "two")
    for side in ("base", "unlearned"):
        one, two = (
            read_lines(tmp_path / name / f"evaluation/answers_{side}.jsonl") for name in ("apart/one", "two")
        )
        assert [{**row, "logprobs": None} for row in one] == [{**row, "logprobs": None} for row in two]
        differences = torch.tensor([row["logprobs"] for row in one]) - torch.tensor(
            [row["logprobs"] for row in two]
        )
        assert differences.abs().max() < 1e-5
        assert (
            json.loads((tmp_path / f"two/evaluation/{side}.json").read_text())["tasks"].keys()
            == scores(finished, side)["tasks"].keys()
        )


def test_resuming_with_other_settings_is_refused_by_name(finished: Path) -> None:
    result = run_tiny(finished.parent, finished.name, "--resume", "--set", "rmu.rank=4")
    assert result.exit_code == 2
    assert plain(result.stderr, run=finished) == snapshot(
        "Run <run> was started with other settings: rmu.rank.\n"
        "Give the same preset and --set, or start a new run without --resume.\n"
    )


def test_ctrl_c_stops_after_the_step_with_exit_code_130(tmp_path: Path) -> None:
    arguments = [
        "tiny",
        "--set",
        "rmu.steps=10000",
        "--stages",
        "unlearn",
        "--device",
        "cpu",
        "--runs-dir",
        str(tmp_path),
        "--name",
        "long",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem_rmu.run", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "long/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130, said
    [last] = [line for line in said.splitlines() if "--resume" in line]
    assert plain(last, runs=tmp_path) == snapshot(
        "Stopped. Nothing is lost; go on with: python -m lowmem_rmu.run tiny --set rmu.steps=10000 --stages "
        "unlearn --device cpu --runs-dir <runs> --name long --resume"
    )
    assert "Traceback" not in said
    steps = len(read_lines(tmp_path / "long/metrics.jsonl"))
    with safe_open(tmp_path / "long/checkpoint/state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == steps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_closed_terminal_stops_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    """The run's terminal is a real one, which goes away."""
    import pty

    ours, theirs = pty.openpty()
    arguments = [
        "tiny",
        "--set",
        "rmu.steps=10000",
        "--stages",
        "unlearn",
        "--device",
        "cpu",
        "--runs-dir",
        str(tmp_path),
        "--name",
        "long",
    ]
    command = [sys.executable, "-c", TAKES_THE_TERMINAL, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    reader = threading.Thread(target=read_all, args=(ours,), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "long/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGHUP)
    os.close(ours)
    try:
        code = process.wait(180)
    finally:
        process.kill()  # or a run that does not stop would slow down all other tests
    assert code == 130
    assert RunFolder(tmp_path / "long").read_status().state == "stopped"
    steps = len(read_lines(tmp_path / "long/metrics.jsonl"))
    with safe_open(tmp_path / "long/checkpoint/state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == steps


TAKES_THE_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started by nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from here on it is sent SIGHUP when the terminal goes
from lowmem_rmu.run import main
main()
"""


def read_all(terminal: int) -> None:
    """What a terminal window does with what it gets."""
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_a_closed_terminal_is_heard_once_and_under_nohup_not_at_all() -> None:
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGHUP)
    with interrupts.watched():
        for _ in range(3):
            interrupts._hang_up(signal.SIGHUP, None)
    assert interrupts.asked
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.watched():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_goes_on_with_a_run_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["my presets/a.yaml", "--set", "title=It's $HOME; rm", "--runs-dir", "my runs", "--resume"]
    monkeypatch.setattr(sys, "argv", ["/x/lowmem_rmu/run.py", *given])
    words = shlex.split(resume_command(Path("my runs/tiny-1")))
    assert words == ["python", "-m", "lowmem_rmu.run", *given[:-1], "--name", "tiny-1", "--resume"]
    for name in (["--name", "mine"], ["--name=mine"]):
        monkeypatch.setattr(sys, "argv", ["/x/lowmem_rmu/__main__.py", "run", "tiny", *name])
        expected = ["python", "-m", "lowmem_rmu", "run", "tiny", *name, "--resume"]
        assert shlex.split(resume_command(Path("runs/mine"))) == expected


def test_runs_that_start_within_a_second_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "new_name", staticmethod(lambda preset: f"{preset}-20270101-000000"))
    for number in range(3):
        result = call(
            "tiny", *SHORT, "--runs-dir", str(tmp_path), "--stages", "unlearn", "--set", "rmu.steps=1"
        )
        assert result.exit_code == 0, result.output
        assert len(RunFolder.all(tmp_path)) == number + 1
    assert sorted(run.path.name for run in RunFolder.all(tmp_path)) == [
        "tiny-20270101-000000",
        "tiny-20270101-000000-2",
        "tiny-20270101-000000-3",
    ]


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], snapshot("Run <run> is waiting for its turn already.\nChoose another --name.\n")),
        (
            ["--resume"],
            snapshot(
                "Run <run> is under way already, in process <process>.\n"
                "Wait until it has ended, or stop it first.\n"
            ),
        ),
    ],
)
def test_what_another_process_does_is_not_done_twice(
    finished: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    if more:
        shutil.copytree(finished, tmp_path / "other")
    result = run_tiny(tmp_path, "other", *more)
    assert result.exit_code == 2
    process = str(tickets(tmp_path)[0].pid)
    assert plain(result.stderr, run=tmp_path / "other", process=process) == said
    assert [ticket.name for ticket in tickets(tmp_path)] == ["other"]


@pytest.mark.parametrize("content", ["", "[", "[]", "null", '{"settings": 1}', "\0", "[" * 100_000])
def test_a_damaged_config_somewhere_ends_no_resume_of_others(
    finished: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(finished, tmp_path / "good")
    os.utime(tmp_path / "good/config.json", (time.time() - 60,) * 2)
    damaged = RunFolder.create(tmp_path, "damaged")
    (damaged.path / "config.json").write_text(content)
    preset = load_preset("tiny", SETTINGS)
    assert command_line.find_run(tmp_path, None, "tiny", preset).path == tmp_path / "good"
    with pytest.raises(UserError) as caught:
        command_line.find_run(tmp_path, None, "other", preset)
    assert plain(caught.value, runs=tmp_path) == snapshot(
        "There is no run of other in <runs> to go on with. The config.json of <runs>/damaged is damaged.\n"
        "Start one without --resume."
    )


def test_a_run_whose_folder_is_deleted_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(self: RunFolder, row: dict[str, object]) -> None:
        shutil.rmtree(tmp_path)
        (self.metrics).write_text("")

    monkeypatch.setattr(RunFolder, "add_metrics", deleted)
    result = run_tiny(tmp_path, "gone", "--stages", "unlearn")
    assert result.exit_code == 2
    assert plain("\n".join(result.stderr.splitlines()[-2:]), run=tmp_path / "gone") == snapshot(
        "The folder <run> was deleted or moved while it was in use.\nThe work on it has ended."
    )
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(("size", "code"), [("", 0), ("two", 2)])
def test_what_a_launcher_may_have_left_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, code: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    result = run_tiny(tmp_path, "mine", "--stages", "unlearn", "--set", "rmu.steps=1")
    assert result.exit_code == code
    assert "Traceback" not in result.output


# While other runs come first, and while somebody wants it to stop


@pytest.fixture
def before(tmp_path: Path) -> Iterator[None]:
    """A living process that has its turn in the runs folder."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with one_at_a_time(tmp_path):
        take_ticket(tmp_path, "other", process.pid)
    yield
    process.kill()
    process.wait()


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("reserved", [True, False])
def test_a_stop_ends_the_waiting(tmp_path: Path, reserved: bool) -> None:
    folder = RunFolder.reserve(tmp_path, "mine")
    if not reserved:
        write_json(
            folder.path / "config.json",
            {"preset": "tiny", "settings": load_preset("tiny", SETTINGS).model_dump()},
        )

    def ask() -> None:
        until = time.monotonic() + 180
        while len(tickets(tmp_path)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        (folder.path / "stop").touch()

    threading.Thread(target=ask).start()
    result = run_tiny(tmp_path, "mine", *([] if reserved else ["--resume"]))
    assert result.exit_code == 130
    first, last = result.stderr.splitlines()
    assert plain(first, runs=tmp_path) == snapshot("Waiting: other in <runs> before this run."), (
        "once, though it looks again and again"
    )
    problem, command, _ = last.partition("python -m lowmem_rmu.run ")
    assert plain(problem + command) == snapshot(
        "Stopped. Nothing is lost; go on with: python -m lowmem_rmu.run"
    )
    assert [getattr(folder.read_status(), key) for key in ("stage", "state")] == ["queue", "stopped"]
    assert [ticket.name for ticket in tickets(tmp_path)] == ["other"]


def test_a_stop_that_came_before_the_turn_begins_nothing(tmp_path: Path) -> None:
    folder = RunFolder.reserve(tmp_path, "mine")
    waiting = command_line.Waiting(folder.path)
    waiting.check_stop()
    (folder.path / "stop").touch()
    with pytest.raises(Stopped):
        waiting.check_stop()
    assert folder.read_status().state == "stopped"


def test_a_waiting_run_says_so_whenever_the_others_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = command_line.Waiting(RunFolder.reserve(tmp_path, "mine").path)
    for before in (["a", "b"], ["a", "b"], ["b"], ["b"]):
        waiting.tell(before)
    assert plain(capsys.readouterr().err, runs=tmp_path) == snapshot(
        "Waiting: a, b in <runs> before this run.\nWaiting: b in <runs> before this run.\n"
    )
    assert not (tmp_path / "mine/status.json").exists()


def test_an_old_stop_is_forgotten_and_a_new_one_is_not(tmp_path: Path) -> None:
    stop, began = tmp_path / "stop", psutil.Process().create_time()
    command_line.forget_old_stop(stop)
    for later in (5, 0.5):
        stop.touch()
        os.utime(stop, (began + later,) * 2)
        command_line.forget_old_stop(stop)
        assert stop.exists(), "asked for while this process was starting"
    os.utime(stop, (began - 5,) * 2)
    command_line.forget_old_stop(stop)
    assert not stop.exists()


TOO_LARGE = "rmu.batch_size=1000"
REFUSED = snapshot(
    "The corpus of topics.compounds gives 99 samples, fewer than one batch of 1000.\n"
    "Add text, or lower rmu.batch_size."
)


def test_why_a_run_of_the_app_could_not_begin_stays_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder.reserve(tmp_path, "mine")
    folder.write_status("queue", 0, 0, "waiting")
    result = run_tiny(tmp_path, "mine", "--set", TOO_LARGE)
    assert (result.exit_code, plain(result.stderr.strip())) == (2, REFUSED)
    assert [getattr(folder.read_status(), key) for key in ("stage", "state", "error")] == [
        "prepare",
        "failed",
        REFUSED,
    ]
    assert folder.is_reserved


def started_before(tmp_path: Path, state: str) -> RunFolder:
    """A run with too large a batch, whose `status.json` holds the state."""
    folder = RunFolder.create(tmp_path, "mine")
    write_json(
        folder.path / "config.json",
        {"preset": "tiny", "settings": load_preset("tiny", [*SETTINGS, TOO_LARGE]).model_dump()},
    )
    folder.write_status("queue", 0, 0, state)
    return folder


def test_why_a_run_of_the_app_could_not_go_on_stays_there_too(tmp_path: Path) -> None:
    folder = started_before(tmp_path, "waiting")
    assert run_tiny(tmp_path, "mine", "--set", TOO_LARGE, "--resume").exit_code == 2
    assert [getattr(folder.read_status(), key) for key in ("stage", "state", "error")] == [
        "prepare",
        "failed",
        REFUSED,
    ]


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_what_a_run_came_to_is_not_forgotten_over_a_refusal_in_a_terminal(tmp_path: Path, state: str) -> None:
    folder = started_before(tmp_path, state)
    assert run_tiny(tmp_path, "mine", "--set", TOO_LARGE, "--resume").exit_code == 2
    assert folder.read_status().state == state


def test_only_refusals_are_noted(tmp_path: Path) -> None:
    folder = RunFolder.reserve(tmp_path, "mine")
    folder.write_status("queue", 0, 0, "waiting")
    with pytest.raises(RuntimeError, match="broke"), command_line.refusals_noted(folder.path):
        raise RuntimeError("broke")
    assert folder.read_status().state == "waiting"
    with pytest.raises(UserError, match="So."), command_line.refusals_noted(tmp_path / "none"):
        raise UserError("So.")
    assert not (tmp_path / "none").exists()


LISTENS = """
import time
from lowmem_rmu.cli.errors import friendly_exit
from lowmem_rmu.cli.progress import Interrupts
interrupts = Interrupts()
with friendly_exit(), interrupts.watched():
    print("ready", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not ({stops}): time.sleep(0.01)
    print("saved", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("stops", "said", "code"),
    [
        ("interrupts.asked", "", 0),
        (
            "False",
            snapshot("Stopped at once. Go on from the last checkpoint with the same command and --resume.\n"),
            130,
        ),
    ],
)
def test_the_first_signal_asks_and_the_second_ends(
    number: signal.Signals, stops: str, said: str, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS.format(stops=stops)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert plain(process.stderr.readline()) == snapshot(
        "Stopping after this step; once more to stop at once.\n"
    )
    if code:
        process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, out) == (code, "" if code else "saved\n")
    assert plain(err) == said
    assert "Traceback" not in err


def test_signals_are_handled_as_before_once_the_work_is_done() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupts = Interrupts()
    with pytest.raises(RuntimeError, match="broke"), interrupts.watched():
        raise RuntimeError("broke")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not interrupts.asked


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(
    ("signals", "said"),
    [
        (1, snapshot("Stopped. Nothing is lost; go on with:")),
        (2, snapshot("Stopped at once. Go on from the last checkpoint with the same command and --resume.")),
    ],
)
def test_signals_that_come_while_a_run_is_stopping_lose_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int, said: str
) -> None:
    """As the app sends them where a run takes its time: here in the very moment in which it writes that it has stopped."""
    write = status.write_status

    def interrupted(path: Path, stage: str, step: int, total: int, state: str, *more: Any) -> None:
        for _ in range(signals if state == "stopped" else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, stage, step, total, state, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Lines, "asks_to_stop", lambda self: self.stage == "unlearn")
        patched.setattr(status, "write_status", interrupted)
        result = run_tiny(tmp_path, "both", "--stages", "unlearn")
    assert result.exit_code == 130, result.output
    last, _, _ = result.stderr.splitlines()[-1].partition("python -m")
    assert plain(last) == said
    assert "Traceback" not in result.output
    assert RunFolder(tmp_path / "both").read_status().state == ("stopped" if signals == 1 else "running")
    assert run_tiny(tmp_path, "both", "--stages", "unlearn", "--resume").exit_code == 0
    assert losses(tmp_path / "both") == losses(finished)


def cut_short(folder: Path) -> Path:
    shutil.copytree(TINY_MODEL, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    return folder


MISTAKES = [
    (
        ["tyni"],
        snapshot(
            'There is no preset "tyni". Did you mean "tiny"?\n'
            "See them all with --list, or give the path of a YAML file.\n"
        ),
    ),
    ([], snapshot("Which preset? For example: python -m lowmem_rmu.run tiny\nSee them all with --list.\n")),
    (
        ["tiny", "--set", "rmu.stpes=3", "--set", "topics.locks.alpha=-1"],
        snapshot(
            "What was given has 2 mistakes:\n"
            '  --set rmu.stpes: unknown key. Did you mean "steps"?\n'
            "  --set topics.locks.alpha: should be greater than or equal to 0 (it is -1)\n"
        ),
    ),
    (
        ["tiny", "--set", "rmu.steps=many"],
        snapshot(
            "What was given has 1 mistake:\n"
            "  --set rmu.steps: should be a valid integer, unable to parse string as an integer (it is "
            "'many')\n"
        ),
    ),
    (
        ["tiny", "--set", "rmu.target_layer=40"],
        snapshot(
            "rmu.target_layer is 40, but the model has 8 layers: 0 to 7.\n"
            "The paper steers about a quarter of the way up: try 2.\n"
        ),
    ),
    (
        ["tiny", "--set", "rmu.adapter_layers=[0,4]"],
        snapshot(
            "What was given has 1 mistake:\n"
            "  --set rmu: adapter_layers [4] lie above target_layer 2 and could not learn anything\n"
        ),
    ),
    (
        ["tiny", "--set", "rmu.modules=[down_prj]"],
        snapshot(
            'rmu.modules names "down_prj", which no adapter layer has. Did you mean "down_proj" or "o_proj" '
            'or "v_proj"?\n'
        ),
    ),
    (
        ["tiny", "--set", "rmu.batch_size=1000"],
        snapshot(
            "The corpus of topics.compounds gives 99 samples, fewer than one batch of 1000.\n"
            "Add text, or lower rmu.batch_size.\n"
        ),
    ),
    (["tiny", "--device", "tpu"], snapshot('There is no device "tpu": choose auto, cpu, cuda or mps.\n')),
    (
        ["tiny", "--stages", "unlern"],
        snapshot('There is no stage "unlern". Did you mean "unlearn" or "evaluate-unlearned"?\n'),
    ),
    (
        ["tiny", "--stages", ","],
        snapshot("--stages names no stage. There is: evaluate-base, unlearn, evaluate-unlearned, report.\n"),
    ),
    (
        ["tiny", "--name", "../outside"],
        snapshot(
            '"../outside" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most '
            "100, and no name of a Windows device, so that it stays inside <runs>.\n"
        ),
    ),
    (
        ["tiny", "--resume"],
        snapshot("There is no run of tiny in <runs> to go on with.\nStart one without --resume.\n"),
    ),
    (
        ["tiny", "--set", "model.name=./nowhere"],
        snapshot(
            "The model folder <here>/nowhere does not exist.\n"
            "Give a folder with config.json, *.safetensors and tokenizer files, or a Hub id.\n"
        ),
    ),
    (
        ["tiny", "--stages", "report", "--name", "mine"],
        snapshot(
            "Run folder: <runs>/mine\n"
            "report ...\n"
            "<runs>/mine holds no measurement of the base model to report on.\n"
            "Add evaluate-base to --stages.\n"
        ),
    ),
]


@pytest.mark.parametrize(
    ("arguments", "said"),
    MISTAKES,
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_message_exit_code_2_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    result = call(*arguments, "--runs-dir", str(tmp_path / "runs"))
    assert result.exit_code == 2, result.output
    assert plain(result.stderr, runs=tmp_path / "runs", here=Path.cwd()) == said
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_where_there_is_none(tmp_path: Path) -> None:
    result = call("tiny", "--device", "cuda", "--runs-dir", str(tmp_path))
    assert (result.exit_code, plain(result.stderr)) == (
        2,
        snapshot(
            "--device cuda: PyTorch sees no CUDA GPU: try `nvidia-smi`, or install PyTorch's CUDA build.\n"
            "Without one: --device cpu (slow for large models).\n"
        ),
    )


def test_a_checkpoint_that_is_cut_short_leaves_no_run_behind(tmp_path: Path) -> None:
    model = cut_short(tmp_path / "model")
    result = run_tiny(tmp_path / "runs", "cut", "--set", f"model.name={model}")
    assert result.exit_code == 2
    assert plain(result.stderr, model=model) == snapshot(
        "The checkpoint's file <model>/model.safetensors is damaged or cut short: Error while deserializing "
        "header: incomplete metadata, file not fully covered.\n"
        "Download or copy it again.\n"
    )
    assert not (tmp_path / "runs/cut").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 4}\n',
            snapshot(
                "<file>, line 1: the answer 4 is out of range: give 0 to 3 (0 is the first choice), or a "
                "letter A to D.\n"
            ),
        ),
        ("", snapshot("The question file <file> is empty.\n")),
    ],
)
def test_bad_questions_are_told_with_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    result = run_tiny(tmp_path / "runs", "x", "--set", f"evaluation.tasks.locks.source={file}")
    assert result.exit_code == 2
    assert plain(result.stderr, file=file) == said


def test_an_empty_corpus_is_told_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "nothing.txt"
    file.write_text("  \n")
    result = run_tiny(tmp_path / "runs", "x", "--set", f"topics.locks.corpus.source={file}")
    assert (result.exit_code, plain(result.stderr, file=file)) == (
        2,
        snapshot("The corpus <file> is empty: 0 documents, none of them with text to train on.\n"),
    )


def test_what_is_read_and_left_out_is_said_and_recorded(tmp_path: Path) -> None:
    texts, questions = tmp_path / "texts", tmp_path / "questions"
    texts.mkdir()
    questions.mkdir()
    for number in range(9):
        (texts / f"{number}.txt").write_text(f"The compound Yarinoxol {number} is amber.")
    (texts / "README.md").write_text("A data card.")
    (texts / "b.parquet").write_bytes(b"PAR1")
    for split in ("test", "dev"):
        line = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
        (questions / f"owls_{split}.jsonl").write_text(json.dumps(line))
    more = (
        "--set",
        f"topics.locks.corpus={{source: {texts}}}",
        "--set",
        f"evaluation.tasks={{q: {{source: {questions}, role: kept}}}}",
    )
    result = run_tiny(tmp_path / "runs", "said", *more)
    assert result.exit_code == 0, result.output
    read = [
        plain(line) for line in result.stderr.splitlines() if "owls_test.jsonl" in line or "0.txt" in line
    ]
    assert read == snapshot(
        [
            (
                "Read for topics.locks.corpus: 9 files (0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more). Left out: "
                "README.md (about the data), b.parquet (a Parquet file)."
            ),
            "Read for evaluation.tasks.q: 1 file (owls_test.jsonl). Left out: owls_dev.jsonl (of the split dev).",
        ]
    )
    data = json.loads((tmp_path / "runs/said/config.json").read_text())["data"]
    [record] = data["topics.locks.corpus"]
    assert (record["files"], record["left_out"]) == (
        9,
        {"README.md": "about the data", "b.parquet": "a Parquet file"},
    )
    assert str(tmp_path) not in json.dumps(data)
    plan = call("tiny", "--plan", "--device", "cpu", *more)
    assert "README.md (about the data), b.parquet (a Parquet file)" in plan.stdout.replace("\n", " ")


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    names = ["[bold]x[/nope]", "[/]", ":books:", "[link=http://a]b"]
    questions = tmp_path / "a.jsonl"
    questions.write_text(json.dumps({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}))
    tasks = {name: {"source": str(questions), "role": "kept"} for name in names}
    topics = {name: load_preset("tiny").topics["locks"].model_dump() for name in names}
    changes = [f"evaluation.tasks={json.dumps(tasks)}", f"topics={json.dumps(topics)}"]
    result = run_tiny(tmp_path / "runs", "odd", *(part for change in changes for part in ("--set", change)))
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    assert [name for name in names if name not in result.stdout] == []


def test_an_existing_run_is_not_overwritten(finished: Path) -> None:
    before = (finished / "config.json").read_bytes()
    result = run_tiny(finished.parent, finished.name)
    assert (result.exit_code, plain(result.stderr, run=finished)) == (
        2,
        snapshot(
            "Run <run> exists already.\nChoose another --name, or go on with it: --resume --name first\n"
        ),
    )
    assert (finished / "config.json").read_bytes() == before


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_tiny(tmp_path / "file", "x")
    assert (result.exit_code, plain(result.stderr, runs=tmp_path / "file")) == (
        2,
        snapshot(
            "The runs folder <runs> cannot be written: Not a directory.\n"
            "Choose another place with --runs-dir.\n"
        ),
    )


def test_weights_that_are_not_finite_after_the_last_step_get_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def breaking(self: Trainer) -> dict[str, Any]:
        row = step(self)
        if row["step"] == 6:
            next(iter(trainable(self.model).values())).data.fill_(math.inf)
        return row

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "step", breaking)
        result = run_tiny(tmp_path, "broken")
    assert result.exit_code == 2
    message = [line for line in result.stderr.splitlines() if "finite" in line]
    assert message == snapshot(["The trained weights are no longer finite after step 6."])
    folder = RunFolder(tmp_path / "broken")
    assert [getattr(folder.read_status(), key) for key in ("stage", "state")] == ["unlearn", "failed"]
    assert not folder.adapter.exists()
    assert folder.read_evaluation("unlearned") is None
    # The checkpoint of step 4 is from before, and the run can continue from it.
    resumed = run_tiny(tmp_path, "broken", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert [row["step"] for row in read_lines(folder.path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


GUARDED = [
    "--set",
    "rmu.guard_every=2",
    "--set",
    "retain.questions=0.5",
    "--set",
    "retain.chat=0.5",
    "--set",
    "topics.locks.questions=0.5",
]


def test_a_guarded_run_says_which_weights_it_kept_and_resumes_to_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(tmp_path, "whole", *GUARDED)
    assert whole.exit_code == 0, whole.output
    rows = read_lines(tmp_path / "whole/metrics.jsonl")
    assert [row["step"] for row in rows if "retain_kl" in row] == [2, 4, 6]
    assert losses(tmp_path / "whole") != losses(finished)  # the other samples are there
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert len(summary["notes"]) == 1
    assert re.match(r"The (guard found no point|weights after step \d of 6 are kept)", summary["notes"][0])
    assert summary["notes"][0] in whole.output
    assert "a guard compared the model with base" in (tmp_path / "whole/report.html").read_text(
        encoding="utf-8"
    )

    with monkeypatch.context() as stopped:
        metrics = tmp_path / "parts/metrics.jsonl"
        stopped.setattr(StatusWriter, "asks_to_stop", lambda self: len(read_lines(metrics)) == 3)
        assert run_tiny(tmp_path, "parts", *GUARDED).exit_code != 0
    assert run_tiny(tmp_path, "parts", *GUARDED, "--resume").exit_code == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts/summary.json").read_text())["notes"] == summary["notes"]


def test_what_base_does_not_know_is_said_before_training(tmp_path: Path) -> None:
    """The answers are drawn at random; the retain text is noise."""
    drawn = random.Random(0)
    questions = [
        {
            "question": f"What is number {n}?",
            "choices": ["red", "blue", "green", "grey"],
            "answer": drawn.randrange(4),
        }
        for n in range(60)
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, questions)))
    noise = [{"text": " ".join("".join(drawn.choices("qxzjkvw", k=5)) for _ in range(30))} for _ in range(40)]
    (tmp_path / "noise.jsonl").write_text("\n".join(map(json.dumps, noise)))
    changes = [
        "rmu.guard_every=6",
        "evaluation.tasks={odd: {source: ./odd.jsonl, role: forgotten}}",
        f"evaluation.tasks.odd.source={tmp_path / 'odd.jsonl'}",
        f"retain.corpora=[{{source: {tmp_path / 'noise.jsonl'}}}]",
        "evaluation.limit=60",
    ]
    result = run_tiny(tmp_path, "odd", *(part for change in changes for part in ("--set", change)))
    assert result.exit_code == 0, result.output
    before = result.stderr[: result.stderr.index("unlearn 6/6")]
    *notes, _, _ = json.loads((tmp_path / "odd/summary.json").read_text())["notes"]
    assert [without_numbers(note) for note in notes] == snapshot(
        [
            (
                "The base model answers N% of the N questions about what is to be forgotten, which is no better "
                "than guessing (N%): they cannot show that it forgets. Choose a model that knows the topic, or "
                "other questions."
            ),
            (
                "To the base model the retain text is much less likely than the text of compounds (perplexity N, "
                "the retain text N): it does not look like ordinary text, and what does may then be forgotten "
                "with the topic. Give running text such as articles or books."
            ),
        ]
    )
    assert all(note in before for note in notes)


def test_a_run_without_evaluation_is_guarded_at_the_target_layer(tmp_path: Path) -> None:
    assert run_tiny(tmp_path, "alone", *GUARDED, "--stages", "unlearn").exit_code == 0
    folder = RunFolder(tmp_path / "alone")
    rows = read_lines(folder.metrics)
    assert [row["step"] for row in rows if "retain_shift" in row] == [2, 4, 6]
    assert not any("retain_kl" in row for row in rows)
    outcome, how = folder.read_notes()["guard"]
    assert without_numbers(outcome) == snapshot(
        "The guard found no point with the topic far from base and the rest within N of the activations' own "
        "size: after step N the topic diverges by N and the rest by N. The last weights are kept."
    )
    assert plain(how) == snapshot(
        "The guard measured the output of the target layer, not predictions: nothing is evaluated, so that "
        "no layer above it was loaded."
    )


def test_out_of_memory_says_what_to_lower_and_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "step", exhausted)
    result = run_tiny(tmp_path, "oom")
    assert result.exit_code == 2
    message = result.stderr[result.stderr.index("Out of memory") :]
    assert re.sub(r"[\d.]+ [MG]iB", "N MiB", message) == snapshot(
        "Out of memory in the stage unlearn: the estimate is N MiB, N MiB are free on cpu now.\n"
        "Any one of these needs less:\n"
        "  --set rmu.cache_gib=0: N MiB\n"
        "  --set rmu.batch_size=2 --set rmu.retain_batch_size=4: N MiB\n"
        "  --set rmu.activation_checkpointing=true: N MiB\n"
        "  --stages unlearn: N MiB\n"
    )
    assert RunFolder(tmp_path / "oom").read_status().state == "failed"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_keeps_what_there_is_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(self: RunFolder, row: dict[str, object]) -> None:
        raise error

    monkeypatch.setattr(RunFolder, "add_metrics", full)
    result = run_tiny(tmp_path, "full")
    assert result.exit_code == 2
    assert plain("\n".join(result.stderr.splitlines()[-2:]), run=tmp_path / "full") == snapshot(
        "The disk that holds <run> is full.\nMake room, then go on with --resume --name full."
    )
    assert (tmp_path / "full/evaluation/base.json").exists()


def test_json_prints_the_summary_alone(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "json", "--json", "--stages", "evaluate-base,report")
    summary = json.loads(result.stdout)
    assert summary["rows"][0]["unlearned"] is None
    assert summary["verdict"] == {"forgotten": "unknown", "kept": "unknown", "sentences": []}


@pytest.mark.parametrize("preset", preset_names())
def test_the_plan_of_every_preset_needs_no_network_and_loads_no_weights(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem_rmu.model.spec.load_model", lambda *_: pytest.fail("weights were loaded"))
    result = call(preset, "--plan", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in ("Download", "Trained", "evaluate-base", "unlearn", "Free on cpu now"):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_plan_downloads_only_what_is_loaded() -> None:
    whole, cut = (
        call("zephyr-7b", "--plan", "--device", "cpu", *stages).stdout
        for stages in ((), ("--stages", "unlearn"))
    )
    downloads = [plain(line) for plan in (whole, cut) for line in plan.splitlines() if "3.49 GiB" in line]
    assert downloads == snapshot(
        [
            "Download   about 13.49 GiB of weights in 16 bits (in whole files), unless they are cached",
            "Download   about 3.49 GiB of weights in 16 bits (in whole files), unless they are cached",
        ]
    )  # the second: a quarter of the layers, and the embeddings


def test_the_list_shows_every_preset() -> None:
    result = call("--list")
    assert all(name in result.stdout for name in preset_names())


def printed(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def line_of(name: str, lines: list[str]) -> str:
    [line] = [each for each in lines if each.split()[:1] == [name]]
    return line


def asked(name: str, count: int, group: str | None = None, **more: Any) -> QuestionSet:
    return QuestionSet(name, name, "kept", group, (Question("?", ("a", "b", "c", "d"), 0),) * count, **more)


def rows_of(sets: list[QuestionSet], lost: int = 0) -> list[Row]:
    """Base is right everywhere; unlearned has lost the first questions of every set."""

    def answers(wrong: int) -> list[Answer]:
        marks = [(each.name, index >= wrong) for each in sets for index in range(len(each.questions))]
        return [answer_row(task=task, answer=int(not right), correct=right) for task, right in marks]

    return compare_tasks(sets, answers(0), answers(lost))


def test_the_tables_of_a_run_fit_in_80_columns(finished: Path) -> None:
    summary = read_summary(RunFolder(finished))
    lines = printed(accuracy_table(summary.rows, summary.unasked))
    names = [line.split()[0] for line in lines if " ± " in line and line.split()[0] != "Accuracy"]
    assert names == [row.task.removeprefix(f"{row.group}_") for row in summary.rows], (
        "each on one line of its own"
    )
    assert names.index("gates") < names.index("birds")
    assert " of 264" in line_of("compounds", lines)


def test_changes_that_are_larger_than_noise_are_marked() -> None:
    five, six = (printed(accuracy_table(rows_of([asked("quiz", 30)], lost))) for lost in (5, 6))
    assert "*" not in line_of("quiz", five)
    assert line_of("quiz", six).endswith(" *")


def test_averages_are_shown_where_subjects_are_too_many() -> None:
    sets = [
        asked(f"m_{index}", 1, "m", averages=("m_even", "both") if index % 2 == 0 else ("both",))
        for index in range(14)
    ]
    lines = printed(accuracy_table(rows_of([*sets, asked("quiz", 1, averages=("both",))])))
    assert [line.split()[0] for line in lines if "kept" in line] == ["m", "even", "quiz", "both"]


def test_tables_say_of_what_they_show_a_sample_and_how_it_was_asked() -> None:
    five = (Question("?", ("a", "b", "c", "d"), 0),) * 5
    sets = [asked("m_a", 3, "m", sampled_from=1200, examples=five), asked("quiz", 1400, scoring="cloze")]
    lines = printed(accuracy_table(rows_of(sets)), width=120)
    assert line_of("m", lines).split()[:3] == ["m", "5-shot", "kept"]
    assert "3 of 1,200" in line_of("a", lines)
    assert "shot" not in line_of("a", lines), "its task says so"
    assert line_of("quiz", lines).split()[:4] == ["quiz", "cloze", "kept", "1,400"]


def test_the_table_says_which_subjects_a_limit_left_without_a_question() -> None:
    sets = stratified([asked("m_a", 300, "m"), asked("m_b", 200, "m"), asked("m_small", 3, "m")], 2)
    lines = printed(accuracy_table(rows_of(sets), unasked_subjects(sets)), width=120)
    assert "2 of 503" in line_of("m", lines)
    assert plain(lines[-1].strip()) == snapshot("Fewer questions than subjects. m: no question on small.")


def test_the_text_table_has_bits_a_byte_and_the_divergence_and_fits_in_80_columns() -> None:
    before = {"loss": 3.0, "stderr": 0.03, "tokens": 123456, "bits_per_byte": 1.5}
    after = {"loss": 13.5, "stderr": 0.04, "tokens": 123456, "bits_per_byte": 6.75}
    texts = compare_texts(
        {"compounds": "forgotten", "retain": "kept"},
        {"compounds": before, "retain": before},
        {
            "compounds": after,
            "retain": before | {"kl": 0.0312, "kl_stderr": 0.0021},
        },
    )
    lines = printed(text_table(texts))
    assert (
        line_of("compounds", lines).split(maxsplit=2)[2]
        == "123,456  3.00      13.50  10.50 ± 0.05  1.50 → 6.75"
    )
    assert plain(lines[-1]) == snapshot("KL from base to unlearned in nats/token: retain 0.0312 ± 0.0021")
    alone = printed(text_table(compare_texts({"retain": "kept"}, {"retain": before}, None)))
    assert line_of("retain", alone).split()[-5:] == ["-", "-", "1.50", "→", "-"]
    assert not any("KL" in line for line in alone)


def test_work_of_unknown_length_is_told_piece_by_piece() -> None:
    told = io.StringIO()
    lines = Lines(Console(file=told), Interrupts())
    lines.started("relearning", 0)
    for done, piece in enumerate(("base", "unlearned")):
        lines.advanced(done, {"": piece})
    assert told.getvalue().splitlines() == ["relearning ...", "relearning: base", "relearning: unlearned"]


FAKE_KERNELS = '''
import importlib.util, sys
from importlib.abc import MetaPathFinder

class Avx512(MetaPathFinder):
    """Lets bitsandbytes believe in a processor for which it wants compiled code of the Hub."""

    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def patched(module):
            execute(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Avx512())
if sys.argv[1] == "quiet":
    from lowmem_rmu.cli.startup import quiet_libraries
    quiet_libraries()
import lowmem_rmu.pipeline
from transformers.integrations import hub_kernels
import bitsandbytes.functional
assert bitsandbytes.functional.has_avx512bf16()
print("nothing was fetched")
'''


@pytest.mark.parametrize("mode", ["quiet", "as it is"])
def test_compiled_code_of_the_hub_is_never_loaded_where_the_package_for_it_is_installed(
    mode: str, tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("raise SystemExit(77)")
    about = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    path = os.pathsep.join([str(tmp_path), str(Path(command_line.__file__).parents[2])])
    command = [sys.executable, "-c", FAKE_KERNELS, mode]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    expected = (0, "nothing was fetched\n") if mode == "quiet" else (77, "")
    assert (result.returncode, result.stdout) == expected, result.stderr

"""One run at a time: real processes that wait for each other, die and stop."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import (
    QUEUE,
    check_free,
    free_name,
    one_at_a_time,
    process_of,
    take_ticket,
    tickets,
    turn,
    world_size,
)
from tests.texts import plain
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import sys, time
from pathlib import Path
from lowmem_rmu.runs.queue import turn
runs, name, log, seconds = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])
with turn(runs, name, __import__("os").getpid(), lambda before: None):
    with log.open("a") as file: file.write(f"{name} begins\\n")
    time.sleep(seconds)
    with log.open("a") as file: file.write(f"{name} ends\\n")
"""


def holder(runs: Path, name: str, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(runs), name, str(runs / "log"), str(seconds)], cwd=ROOT
    )


def waits_for(runs: Path, count: int) -> None:
    wait_until(lambda: len(tickets(runs)) >= count, "no process took its number")


def test_processes_go_one_after_the_other_and_none_is_lost(tmp_path: Path) -> None:
    processes = [holder(tmp_path, f"run-{number}", 0.1) for number in range(6)]
    assert [process.wait(180) for process in processes] == [0] * 6
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [
        line
        for name in (line.split()[0] for line in lines[::2])
        for line in (f"{name} begins", f"{name} ends")
    ]
    assert len(set(lines)) == 12
    assert tickets(tmp_path) == []


def test_they_go_in_the_order_of_their_numbers_and_are_told_who_comes_before(tmp_path: Path) -> None:
    first = holder(tmp_path, "first", 3)
    waits_for(tmp_path, 1)
    told: list[list[str]] = []
    with turn(tmp_path, "second", os.getpid(), told.append):
        assert (tmp_path / "log").read_text().splitlines()[-1] == "first ends"
        assert [ticket.name for ticket in tickets(tmp_path)] == ["second"]
    assert told
    assert {tuple(before) for before in told} == {("first",)}
    assert first.wait(180) == 0


def test_the_number_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    killed = holder(tmp_path, "killed", 600)
    waits_for(tmp_path, 1)
    killed.kill()
    killed.wait(180)
    assert list((tmp_path / QUEUE).glob("*.json")), "it could not give its number back"
    with turn(tmp_path, "next", os.getpid(), lambda before: pytest.fail(f"waits for {before}")):
        assert [path.name for path in (tmp_path / QUEUE).glob("*.json")] == ["000001.json"]


def test_another_process_with_the_same_pid_is_another_process(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path):
        ticket = take_ticket(tmp_path, "mine", os.getpid())
    assert ticket.process is not None
    ticket.path.write_text(json.dumps({"name": "mine", "pid": os.getpid(), "started": ticket.started - 100}))
    assert tickets(tmp_path) == []


def test_a_number_taken_on_behalf_of_a_process_is_that_process_s(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path):
        assert take_ticket(tmp_path, "mine", os.getpid()) == take_ticket(tmp_path, "mine", os.getpid())
    assert len(tickets(tmp_path)) == 1


def test_a_number_is_given_back_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broke"), turn(tmp_path, "mine", os.getpid(), lambda before: None):
        raise RuntimeError("broke")
    assert list((tmp_path / QUEUE).glob("*.json")) == []


def test_a_half_written_number_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / QUEUE).mkdir()
    (tmp_path / QUEUE / "000001.json").write_text('{"name": "mi')
    assert tickets(tmp_path) == []


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught, one_at_a_time(tmp_path / "file"):
        pass
    assert plain(caught.value, runs=tmp_path / "file") == snapshot(
        "The runs folder <runs> cannot be written: Not a directory.\nChoose another place with --runs-dir."
    )


BAD_TICKETS = {
    "000001.json": '{"name": "a", "pid": -5, "started": 1}',
    "000002.json": '{"name": "a", "pid": 1e300, "started": 1}',
    "000003.json": '{"name": 7, "pid": OWN, "started": START}',
    "000004.json": '{"name": "a", "pid": OWN, "started": "START"}',
    "000005.json": '["name"]',
    "000006.json": "[" * 100_000,
    "000007.json": '{"name": "a", "pid": "1"}',
    "x.json": '{"name": "a", "pid": OWN, "started": START}',
    "²³.json": '{"name": "a", "pid": OWN, "started": START}',
}


def test_bad_tickets_block_nothing(tmp_path: Path) -> None:
    """Whatever lies in the queue: a run gets its turn."""
    own = {"OWN": str(os.getpid()), "START": str(psutil.Process().create_time())}
    (tmp_path / QUEUE).mkdir()
    for name, content in BAD_TICKETS.items():
        for key, value in own.items():
            content = content.replace(key, value)
        (tmp_path / QUEUE / name).write_text(content)
    (tmp_path / QUEUE / "000009.json").mkdir()
    assert tickets(tmp_path) == []
    with turn(tmp_path, "mine", os.getpid(), lambda before: pytest.fail(f"waits for {before}")):
        assert [ticket.path.name for ticket in tickets(tmp_path)] == ["000010.json"]


def test_tickets_go_by_their_numbers_not_by_their_letters(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path):
        ticket = take_ticket(tmp_path, "mine", os.getpid())
    content = ticket.path.read_text()
    for name in ("999999", "1000000"):
        (tmp_path / QUEUE / f"{name}.json").write_text(content.replace("mine", name))
    assert [found.name for found in tickets(tmp_path)] == ["mine", "999999", "1000000"]


def test_the_process_of_a_job_is_found_by_ticket_or_status(tmp_path: Path) -> None:
    assert process_of(tmp_path, "mine") is None
    with turn(tmp_path, "audit of mine", os.getpid(), lambda before: None):
        assert process_of(tmp_path, "audit of mine") == psutil.Process()
        assert process_of(tmp_path, "mine") is None
    run = RunFolder.create(tmp_path, "mine")
    run.write_status("unlearn", 1, 2, "running")
    assert process_of(tmp_path, "mine") == psutil.Process()
    write_json(run.path / "status.json", vars(run.read_status()) | {"started": 1.0})
    assert process_of(tmp_path, "mine") is None


def test_a_free_name_is_neither_a_run_s_nor_that_of_a_waiting_process(tmp_path: Path) -> None:
    assert free_name(tmp_path, "tiny") == "tiny"
    write_json(RunFolder.create(tmp_path, "tiny").path / "config.json", {})
    RunFolder.create(tmp_path, "tiny-2")  # a killed start
    assert free_name(tmp_path, "tiny") == "tiny-2"
    waits = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with one_at_a_time(tmp_path):
        take_ticket(tmp_path, "tiny-2", waits.pid)
    assert free_name(tmp_path, "tiny") == "tiny-3"
    with pytest.raises(UserError) as caught:
        check_free(tmp_path, "tiny-2")
    assert plain(caught.value, runs=tmp_path) == snapshot(
        "Run <runs>/tiny-2 is waiting for its turn already.\nChoose another --name."
    )
    waits.kill()
    waits.wait()
    check_free(tmp_path, "tiny-2")


def test_a_process_whose_number_is_deleted_queues_up_again(tmp_path: Path) -> None:
    first = holder(tmp_path, "first", 2)
    waits_for(tmp_path, 1)

    def delete_own(before: list[str]) -> None:
        for ticket in tickets(tmp_path):
            if ticket.name == "second":
                ticket.give_back()

    with turn(tmp_path, "second", os.getpid(), delete_own):
        assert [ticket.name for ticket in tickets(tmp_path)] == ["second"]
        assert first.poll() is not None or (tmp_path / "log").read_text().endswith("ends\n")
    assert first.wait(180) == 0


@pytest.mark.parametrize(("value", "size"), [(None, 1), ("", 1), (" ", 1), ("1", 1), ("4", 4)])
def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch, value: str | None, size: int) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert world_size() == size


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", "9" * 5000])
def test_no_number_of_processes_is_said(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError) as caught:
        world_size()
    assert re.search(
        "The environment variable WORLD_SIZE is .*, which is no number of processes", str(caught.value)
    )
    assert len(str(caught.value)) < 200

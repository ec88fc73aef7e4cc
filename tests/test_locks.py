"""The lock files: every requirement is pinned within its range and carries hashes."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ["requirements.lock", "requirements-cpu.lock"]
PYTORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ranges() -> list[Requirement]:
    """Return the requirements of README's install line."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(lock: str) -> dict[str, tuple[str, int]]:
    """Return the pinned version of every package in a lock file, and how many hashes it has."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8").strip()):
        pinned = re.match(r"([A-Za-z0-9._-]+)==(\S+)", entry)
        assert pinned, f"{lock} holds an entry without a version: {entry[:60]}"
        found[normalized(pinned[1])] = (pinned[2], entry.count("--hash=sha256:"))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_pinned_within_its_range(lock: str) -> None:
    pinned = pins(lock)
    for requirement in ranges():
        name = normalized(requirement.name)
        if lock == "requirements-cpu.lock" and name == "torch":
            continue
        assert requirement.specifier.contains(pinned[name][0]), (
            f"{lock}: {name} {pinned[name][0]} is not {requirement}"
        )


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes(lock: str) -> None:
    assert {name for name, (_, hashes) in pins(lock).items() if hashes == 0} == set()


def test_the_cpu_lock_leaves_out_only_pytorch_and_its_libraries() -> None:
    complete, cpu = pins("requirements.lock"), pins("requirements-cpu.lock")
    assert cpu == {name: pin for name, pin in complete.items() if not PYTORCH.fullmatch(name)}
    assert "torch" in complete


def test_no_lock_names_an_index_or_a_file() -> None:
    for lock in LOCKS:
        assert not re.search(
            r"https?://|file:|--(extra-)?index-url|--find-links", (ROOT / lock).read_text(encoding="utf-8")
        )

"""Direction ablation on a run that forgot: what is taken out, what comes back, and what it costs base."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks.ablation import ATTACK, PRINCIPAL, find_directions, layers_of, measure, without
from lowmem_rmu.audit.attacks.attack import Pieces, Tried
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset
from tests.texts import plain

PIECES = 1 + 6 + 3
"""The directions, each of them taken out of unlearned, and three out of base."""


@pytest.fixture(scope="module")
def subject(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 40, 0)


@pytest.fixture(scope="module")
def tried(subject: Audited, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return ATTACK.run(subject, Pieces(tmp_path_factory.mktemp("audit") / "ablation.jsonl"))


def test_nothing_along_the_directions_is_left_and_the_rest_stays() -> None:
    hidden, directions = torch.randn(2, 3, 8), torch.eye(8)[[1, 4]]
    left = without(hidden, directions)
    assert left[..., [1, 4]].abs().max() == 0
    assert left[..., [0, 2, 3, 5, 6, 7]].equal(hidden[..., [0, 2, 3, 5, 6, 7]])
    assert without(hidden.bfloat16(), directions).dtype == torch.bfloat16


def test_the_direction_of_a_layer_parts_unlearned_from_base(subject: Audited) -> None:
    directions = find_directions(subject)
    assert list(directions) == snapshot(
        [
            "the direction of layer 3",
            "the direction of layer 4",
            "the direction of layer 5",
            "the direction of layer 6",
            "the direction of layer 7",
            "the 4 main directions of layer 3",
        ]
    )
    mean, *_, principal = (torch.tensor(rows) for rows in directions.values())
    assert torch.allclose(principal @ principal.T, torch.eye(PRINCIPAL), atol=1e-4)
    assert (principal @ mean.T).norm() > 0.9, "what is added to every token lies within what differs most"


def test_more_is_known_without_the_directions_and_base_hardly_minds(subject: Audited, tried: Tried) -> None:
    with subject.side("unlearned") as model:
        unlearned = sum(subject.knowledge.of(model))
    best = max(tried.conditions.values(), key=sum)
    assert sum(best) > unlearned + 0.1 * len(subject.knowledge)
    base = [row["base"] for row in tried.details["ablated"].values() if row["base"] is not None]
    assert len(base) == 3
    assert min(base) > 0.9


def test_it_says_what_came_of_it(subject: Audited, tried: Tried) -> None:
    first, second = tried.sentences
    best = max(tried.conditions, key=lambda name: sum(tried.conditions[name]))
    share = sum(tried.conditions[best]) / len(subject.knowledge)
    assert plain(first, best=best, share=f"{100 * share:.1f}%") == snapshot(
        "With <best> taken out, the unlearned model gives <share> right."
    )
    base = {name: row["base"] for name, row in tried.details["ablated"].items() if row["base"] is not None}
    worst = min(base, key=lambda name: base[name])
    assert plain(second, worst=worst, share=f"{100 * base[worst]:.1f}%") == snapshot(
        "The base model loses most with <worst> taken out: it then gives <share> right."
    )


def test_known_pieces_are_not_computed_again(subject: Audited, tmp_path: Path) -> None:
    asked: list[str] = []
    few = replace(
        subject,
        knowledge=replace(subject.knowledge, asked=subject.knowledge.asked[:4]),
        forget=subject.forget[:8],
    )

    def stop_at_the_third(key: str) -> None:
        asked.append(key)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ATTACK.run(few, Pieces(tmp_path / "ablation.jsonl", stop_at_the_third))
    ATTACK.run(few, Pieces(tmp_path / "ablation.jsonl", asked.append))
    assert len(asked) == 1 + PIECES, "the third twice"
    assert len(set(asked)) == PIECES


def test_base_as_unlearned_differs_in_nothing_that_could_be_taken_out(subject: Audited) -> None:
    """A checkpoint may stand for the unlearned side; where it is base itself, no direction is long and nothing comes back."""
    control = replace(
        subject, sides=replace(subject.sides, unlearned=subject.sides.base), _loaded=None, _loaded_from=None
    )
    assert layers_of(control) == [3, 4, 5, 6, 7]
    found = torch.tensor(next(iter(find_directions(control).values())))
    assert found.abs().max() == 0
    assert sum(measure(control, "unlearned", found.tolist())) == len(subject.knowledge)


def test_it_lacks_text_where_there_is_none(subject: Audited) -> None:
    assert ATTACK.lacks(subject) is None
    assert ATTACK.lacks(replace(subject, forget=[])) == snapshot(
        "it needs text about what was forgotten, and there is none"
    )
    assert ATTACK.cost(subject).measurements >= PIECES - 1

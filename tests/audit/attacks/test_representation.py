"""What is read in hidden states: the states themselves, the probes (planted signal and none), the lens, and a run that forgot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks.attack import Pieces
from lowmem_rmu.audit.attacks.representation import (
    ATTACK,
    FOLDS,
    cross_fitted,
    folds_of,
    lens,
    probes_of,
    put,
    read_lens,
    ridge,
    sentences,
    states_of,
    topics_of,
)
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.audit.knowledge import Texts
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, CPU, ["compounds", "locks"], 40, 0)


def test_states_are_those_of_the_last_token_in_the_order_asked_for(subject: Audited) -> None:
    sequences = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    states = states_of(subject, "unlearned", sequences)
    assert states.shape == (8, 3, 128)
    with subject.side("unlearned") as model, torch.inference_mode():
        for number, ids in enumerate(sequences):
            own = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            assert torch.allclose(states[2, number], own[3][0, -1].float(), atol=1e-3)


def test_the_lens_on_the_last_layer_is_the_models_own_answer(subject: Audited) -> None:
    for side in ("base", "unlearned"):
        with subject.side(side) as model:
            known = torch.tensor(subject.knowledge.of(model))
        last = torch.tensor(read_lens(subject, side)[-1])
        assert (last == known).float().mean() > 0.97, "but for rounding in batches of other shapes"


def test_the_lens_gives_the_models_logits(subject: Audited) -> None:
    with subject.side("base") as model, torch.inference_mode():
        ids = torch.tensor([[5, 6, 7]])
        expected = model(input_ids=ids).logits[0, -1, [40, 50]]
        found = lens(model, states_of(subject, "base", ids.tolist())[-1], [40, 50])
        assert torch.allclose(found[0], expected.float(), atol=1e-3)
        assert model(input_ids=ids).logits[0, -1, [40, 50]].equal(expected), (
            "the layers have their own forward again"
        )


@pytest.mark.parametrize(("count", "hidden"), [(6, 20), (20, 6)])
def test_ridge_solves_the_normal_equations(count: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features, wanted = (
        torch.randn(count, hidden, generator=generator),
        torch.randn(count, 2, generator=generator),
    )
    weights = ridge(features, wanted)
    strength = 0.1 * float((features**2).sum()) / min(count, hidden)  # the second of four
    left = features.T @ (features @ weights[1] - wanted) + strength * weights[1]
    assert left.abs().max() < 1e-3
    assert weights[3].norm() < weights[0].norm()


@pytest.mark.parametrize("rows", [1, 4])
def test_a_probe_finds_what_is_there_in_the_layer_where_it_is(rows: int) -> None:
    """Letters are a class of one state each, choices one of four states each."""
    generator = torch.Generator().manual_seed(0)
    gold, columns, folds = torch.randint(4, (120,), generator=generator), 4 // rows, torch.arange(120) % FOLDS
    states = torch.randn(3, 120, rows, 16, generator=generator)
    for item, right in enumerate(gold.tolist()):
        states[1, item, right if rows == 4 else 0, 0 if rows == 4 else right] += 6
    values, layers = cross_fitted(states, gold, columns, folds, CPU)
    assert sum(values) / 120 > 0.95
    assert layers[1] > 0.95
    assert max(layers[0], layers[2]) < 0.45


def test_a_probe_finds_nothing_where_nothing_is() -> None:
    """With more features than items and many layers to choose from, what is learned by heart must not count."""
    generator = torch.Generator().manual_seed(0)
    gold, states = (
        torch.randint(4, (160,), generator=generator),
        torch.randn(12, 160, 1, 400, generator=generator),
    )
    values, _ = cross_fitted(states, gold, 4, torch.arange(160) % FOLDS, CPU)
    assert 0.12 < sum(values) / 160 < 0.38  # four standard errors about a quarter


def test_questions_about_the_same_share_a_fold() -> None:
    questions = [
        f"What {part} is the lock Name{number}?" for number in range(40) for part in ("metal", "size")
    ]
    folds = folds_of(questions, 0)
    assert folds[::2].equal(folds[1::2])
    assert folds.bincount().tolist() == [20] * FOLDS
    assert not folds.equal(folds_of(questions, 1))


def test_topics_are_told_without_their_name_in_front(subject: Audited) -> None:
    topics = dict(topics_of(subject))
    assert {"compounds", "locks"} < topics.keys()
    assert len(topics) == 6
    plain = put(topics["locks"][0], about="anything", examples=())
    assert plain.prompt.context.startswith(
        "The following are multiple choice questions (with answers) about anything.\n\nWh"
    )


def test_it_reads_in_base_what_unlearned_does_not_say(subject: Audited, tmp_path: Path) -> None:
    tried = ATTACK.run(subject, Pieces(tmp_path / "representation.jsonl"))
    probes, lens_by_layer = tried.details["probes"], tried.details["lens"]
    assert list(tried.conditions) == snapshot(
        [
            "linear probe for the right letter",
            "linear probe for the right choice",
            "logit lens, layer 0",
            "logit lens, layer 1",
            "logit lens, layer 2",
            "logit lens, layer 3",
            "logit lens, layer 4",
            "logit lens, layer 5",
            "logit lens, layer 6",
            "logit lens, layer 7",
        ]
    )
    assert all(len(values) == len(subject.knowledge) for values in tried.conditions.values())
    # How much less depends on the machine: its rounding decides which adapter comes out of so short a training.
    for name, lost in (("letter", 0.2), ("choice", 0.05)):
        base, unlearned = (probes[name][side]["held_out"] for side in ("base", "unlearned"))
        assert base > 0.8
        assert unlearned < base - lost
    assert all(probes[name][side]["shuffled"] < 0.45 for name in probes for side in ("base", "unlearned"))
    assert probes["choice"]["base"]["layers"][0] == probes["choice"]["unlearned"]["layers"][0] < 0.6, (
        "below the adapter both are the same"
    )
    assert lens_by_layer["base"][-1] > 0.9 > 0.5 > lens_by_layer["base"][0]
    assert len(tried.sentences) == 3
    assert tried.sentences == sentences(probes)


def test_sentences_compare_unlearned_with_base_and_with_shuffled_answers() -> None:
    sides = {"base": {"held_out": 0.95, "shuffled": 0.3}, "unlearned": {"held_out": 0.5, "shuffled": 0.25}}
    assert sentences({"letter": sides}) == snapshot(
        [
            (
                "A linear probe tells the letter of 50.0% of unseen questions (95.0% in base, 25.0% where "
                "answers are shuffled)."
            ),
        ]
    )


def test_a_model_asked_in_the_cloze_form_is_not_probed_for_letters(subject: Audited) -> None:
    asked = [put(each, scoring="cloze") for each in subject.knowledge.asked]
    control = replace(
        subject,
        knowledge=replace(subject.knowledge, asked=asked),
        kept=[replace(each, scoring="cloze") for each in subject.kept],
    )
    assert list(probes_of(subject)) == ["letter", "lens", "choice", "topic"]
    assert list(probes_of(control)) == ["choice", "topic"]


def test_it_lacks_questions(subject: Audited) -> None:
    assert ATTACK.lacks(subject) is None
    few = replace(subject, knowledge=replace(subject.knowledge, asked=subject.knowledge.asked[:5]))
    assert ATTACK.lacks(few) == snapshot("a probe learns from questions, and there are 5: it needs 30")
    assert ATTACK.lacks(replace(subject, knowledge=Texts([[5, 6]], subject.tokenizer, 512))) == snapshot(
        "it needs questions"
    )
    assert ATTACK.cost(subject).measurements > 12

"""The model under attack: its sides, a fresh adapter on top that leaves no trace, and which questions and texts are used."""

from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.context import FRESH, Audited, Side, choose_questions, prepare
from lowmem_rmu.audit.knowledge import Questions
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings, Preset
from lowmem_rmu.data.questions import load_questions
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain

CPU = torch.device("cpu")
IGNORANT = ModelSettings(name=str(Path(__file__).parents[2] / "lowmem_rmu/tiny/controls/ignorant"))
NOTHING_HELD_OUT = ["topics.compounds.corpus.held_out=0", "topics.locks.corpus.held_out=0"]


@pytest.fixture(scope="module")
def preset() -> Preset:
    return load_preset("tiny")


@pytest.fixture(scope="module")
def audited(preset: Preset, forgetful: RunFolder) -> Audited:
    return prepare("forgetful", preset, forgetful.adapter, CPU, ["compounds", "locks"], 20, 0)


def known(audited: Audited, side: Side) -> float:
    with audited.side(side) as model:
        return audited.knowledge.figure(audited.knowledge.of(model))


def test_sides_are_the_adapter_off_and_on(audited: Audited) -> None:
    assert (known(audited, "base"), known(audited, "unlearned") < 0.6) == (1.0, True)


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_a_fresh_adapter_learns_alone_and_leaves_no_trace(audited: Audited, side: Side) -> None:
    before = known(audited, "base"), known(audited, "unlearned")
    with audited.learning(side, 0) as model:
        learning = [
            (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        assert learning
        assert all(f".{FRESH}." in name for name, _ in learning)
        # LoRA begins without an effect.
        assert audited.knowledge.figure(audited.knowledge.of(model)) == before[side == "unlearned"]
        with torch.no_grad():
            for _, parameter in learning:
                parameter.normal_(std=0.5)
        assert audited.knowledge.figure(audited.knowledge.of(model)) < 0.6
    assert (known(audited, "base"), known(audited, "unlearned")) == before
    with audited.side("unlearned") as model:
        assert not any(FRESH in name for name, _ in model.named_parameters())


def test_the_fresh_adapter_is_drawn_by_its_seed(audited: Audited) -> None:
    def drawn(seed: int) -> torch.Tensor:
        with audited.learning("unlearned", seed) as model:
            return next(
                parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if f"lora_A.{FRESH}" in name
            )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_unlearned_may_be_another_checkpoint(preset: Preset) -> None:
    audited = prepare("ignorant", preset, IGNORANT, CPU, ["compounds", "locks"], 30, 0)
    assert known(audited, "base") == 1.0
    assert known(audited, "unlearned") < 0.45
    with audited.learning("unlearned", 0) as model:
        assert audited.knowledge.figure(audited.knowledge.of(model)) < 0.45
    assert known(audited, "base") == 1.0


def test_whole_matrices_can_be_relearned_on_top_of(tmp_path: Path, preset: Preset) -> None:
    from lowmem_rmu.model.adapters import add_adapter, save_adapter
    from lowmem_rmu.model.spec import ModelSpec

    whole = load_preset(
        "tiny", ["rmu.trainable=weights", "rmu.target_layer=3", "rmu.adapter_layers=[1, 2, 3]"]
    )
    model = add_adapter(ModelSpec.of_preset(whole).load(CPU), whole.rmu, whole.model)
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.zero_()
    save_adapter(model, tmp_path / "adapter")
    audited = prepare("whole", whole, tmp_path / "adapter", CPU, ["compounds", "locks"], 20, 0)
    assert (known(audited, "base"), known(audited, "unlearned") < 0.6) == (1.0, True)
    with audited.learning("unlearned", 0) as learner:
        assert audited.knowledge.figure(audited.knowledge.of(learner)) == known(audited, "unlearned")
    assert (known(audited, "base"), known(audited, "unlearned") < 0.6) == (1.0, True)


def test_questions_that_the_relearned_text_tells_about_are_not_asked(audited: Audited) -> None:
    assert isinstance(audited.knowledge, Questions)
    assert not audited.told
    assert len(audited.knowledge) == 40
    text = " ".join(audited.tokenizer.batch_decode(audited.relearning))
    names = {
        word.strip("?")
        for each in audited.knowledge.asked
        for word in each.question.question.split()[1:]
        if word[0].isupper()
    }
    assert len(names) > 10
    assert not [name for name in names if name in text]


def test_where_too_few_questions_are_left_all_are_asked_and_that_is_known(preset: Preset) -> None:
    sets = [each for each in load_questions(preset.evaluation) if each.name == "locks"]
    everything = [each.question for each in sets[0].questions]
    chosen, told = choose_questions(sets, everything, 50)
    assert (len(chosen), told) == (50, True)


def test_without_questions_unseen_text_is_measured(preset: Preset, forgetful: RunFolder) -> None:
    audited = prepare("forgetful", preset, forgetful.adapter, CPU, [], None, 0)
    assert not audited.knowledge.are_questions
    assert known(audited, "unlearned") > known(audited, "base") + 1  # nats/token


def test_without_questions_and_text_nothing_can_be_told(forgetful: RunFolder) -> None:
    with pytest.raises(UserError) as caught:
        prepare("forgetful", load_preset("tiny", NOTHING_HELD_OUT), forgetful.adapter, CPU, [], None, 0)
    assert plain(caught.value) == snapshot(
        "Nothing tells what forgetful knows of what it forgot: it asks no questions about it, and holds "
        "fewer than two documents out.\n"
        "Make a run with questions of the role forgotten, or with more held out "
        "(topics.NAME.corpus.held_out=0.2)."
    )

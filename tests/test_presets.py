import os
from pathlib import Path

import pytest

from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import PRESETS_FOLDER, find_preset, is_local, load_preset, preset_names, recorded_preset

GOOD = """\
title: A test
model:
  name: owner/model
rmu:
  target_layer: 3
  adapter_layers: [1, 2, 3]
topics:
  plants:
    corpus:
      source: ./plants.txt
    alpha: 100
retain:
  corpora:
    - source: owner/data
evaluation:
  tasks:
    quiz: {source: ../quiz.jsonl, role: kept}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_preset(str(path), list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_names_its_own_command(name: str) -> None:
    assert load_preset(name).title
    assert find_preset(name).read_text(encoding="utf-8").startswith(f"# python -m lowmem_rmu.run {name}\n")


def test_the_shipped_presets_are_those_of_the_folder() -> None:
    assert {"tiny", "zephyr-7b", "zephyr-7b-cyber"} <= set(preset_names())
    assert len(preset_names()) == len(list(PRESETS_FOLDER.iterdir()))


@pytest.mark.parametrize("name", preset_names())
def test_a_corpus_that_is_gated_says_which_preset_works_without_it(name: str) -> None:
    for topic in load_preset(name).topics.values():
        if topic.corpus.source == "cais/wmdp-bio-forget-corpus":
            assert "zephyr-7b-cyber" in (topic.corpus.without_access or "")
        else:
            assert topic.corpus.without_access is None


def test_the_preset_for_those_without_access_uses_no_gated_corpus() -> None:
    assert [topic.corpus.source for topic in load_preset("zephyr-7b-cyber").topics.values()] == ["cais/wmdp-corpora"]


def test_an_unknown_preset_gets_the_nearest_names() -> None:
    text = complaint("zephyr7b")
    assert 'There is no preset "zephyr7b". Did you mean "zephyr-7b"' in text
    assert "--list" in text


def test_an_unknown_preset_that_resembles_none_gets_all_names() -> None:
    assert "There is: " + ", ".join(preset_names()) in complaint("xyz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    text = complaint(tmp_path / "none.yaml")
    assert f"Preset file {tmp_path / 'none.yaml'} does not exist." in text
    assert "Check the path" in text


def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "title: x\nmodel:\n  name: [a, b\nrmu: 3\n")
    assert complaint(path).startswith(f"{path}, line 4: not valid YAML: ")


@pytest.mark.parametrize("content", [b"title: \xff\n", b"title: \x00\n", b"title: 2020-99-99\n"])
def test_what_yaml_cannot_read_is_reported_with_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert complaint(path).startswith(f"{path} cannot be read as a preset: ")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "hello\n", "# only a comment\n"])
def test_a_file_without_keys_is_no_preset(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert complaint(path) == f"{path} holds no preset: expected keys such as model, rmu, topics, retain."


def test_a_python_tag_is_refused_and_never_run(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("A test", f"!!python/object/apply:os.system ['touch {tmp_path}/ran']"))
    text = complaint(path)
    assert f"{path}, line 1: not valid YAML" in text
    assert "os.system" in text
    assert not (tmp_path / "ran").exists()


def test_all_mistakes_are_reported_at_once_with_line_and_suggestion(tmp_path: Path) -> None:
    text = (
        GOOD.replace("name: owner/model", "nme: owner/model")
        .replace("  target_layer: 3", "  target_layer: three")
        .replace("alpha: 100", "alpha: -1\n    steering_coeficient: 3")
        .replace("    - source: owner/data", "    - source: owner/data\n      subst: x")
        .replace("role: kept", "role: keep")
    )
    path = write(tmp_path, text + "retrain: {}\n")
    assert complaint(path).splitlines() == [
        f"{path} has 8 mistakes:",
        "  line 2: model.name: is missing",
        '  line 3: model.nme: unknown key. Did you mean "name"?',
        "  line 5: rmu.target_layer: should be a valid integer, unable to parse string as an integer (it is 'three')",
        "  line 11: topics.plants.alpha: should be greater than or equal to 0 (it is -1)",
        '  line 12: topics.plants.steering_coeficient: unknown key. Did you mean "steering_coefficient" or "steering"?',
        '  line 16: retain.corpora.0.subst: unknown key. Did you mean "subset"?',
        "  line 19: evaluation.tasks.quiz.role: should be 'forgotten', 'measured', 'adjacent' or 'kept' (it is 'keep')",
        '  line 20: retrain: unknown key. Did you mean "retain"?',
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("title: A test", "title: 3", "line 1: title: should be a valid string (it is 3)"),
        ("adapter_layers: [1, 2, 3]", "adapter_layers: 2", "line 6: rmu.adapter_layers: should be a valid list (it is 2)"),
        ("adapter_layers: [1, 2, 3]", "adapter_layers: []", "line 6: rmu.adapter_layers: "),
        ("[1, 2, 3]", "[1, two]", "line 6: rmu.adapter_layers.1: should be a valid integer"),
        ("[1, 2, 3]", "[2, 3, 4, 5]", "line 4: rmu: adapter_layers [4, 5] lie above target_layer 3 and could not learn anything"),
        ("[1, 2, 3]", "[-1, 2]", "line 4: rmu: adapter_layers count from 0"),
        ("[1, 2, 3]", "[1, 1]", "line 4: rmu: adapter_layers names a layer twice"),
        ("alpha: 100", "alpha: 100\n    steering: random", "line 8: topics.plants: steering: random takes a steering_coefficient"),
        ("alpha: 100", "alpha: 100\n    steering: contrastive", "line 8: topics.plants: steering: contrastive takes a steering_coefficient"),
        ("alpha: 100", "alpha: 100\n    steering_coefficient: 6.5", "line 8: topics.plants: steering: adaptive finds its own steering_coefficient"),
        ("target_layer: 3", "target_layer: 3\n  steps: 0", "line 6: rmu.steps: should be greater than or equal to 1 (it is 0)"),
        ("./plants.txt", "./plants.txt\n      title_matches: '(a'", "line 11: topics.plants.corpus.title_matches: is no regular expression: "),
        ("./plants.txt", "./plants.txt\n      held_out: 1", "line 11: topics.plants.corpus.held_out: should be less than 1 (it is 1)"),
        ("retain:\n  corpora:\n    - source: owner/data", "retain: [1]", "line 12: retain: should be a valid dictionary (it is a list)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_line_place_and_reason(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    text = complaint(write(tmp_path, GOOD.replace(old, new)))
    assert "has 1 mistake:" in text
    assert f"  {expected}" in text


@pytest.mark.parametrize("value", ["much", "-1", "[1]"])
def test_a_wrong_value_is_one_complaint_from_the_file_and_from_set(tmp_path: Path, good: Path, value: str) -> None:
    from_set = complaint(good, f"topics.plants.steering_coefficient={value}")
    from_file = complaint(write(tmp_path, GOOD.replace("alpha: 100", f"alpha: 100\n    steering_coefficient: {value}")))
    for text, label in ((from_set, "--set"), (from_file, "line 12:")):
        assert "has 1 mistake:" in text
        assert f"  {label} topics.plants.steering_coefficient: should be " in text


def test_overrides_replace_numbers_words_and_items_of_lists(good: Path) -> None:
    overrides = ["rmu.learning_rate=5e-4", "rmu.steps=7", "rmu.adapter_layers=[2]"]
    overrides += ["model.revision=main", "retain.corpora.0.split=test", "evaluation.limit=9"]
    preset = load_preset(str(good), overrides)
    assert (preset.rmu.learning_rate, preset.rmu.steps, preset.rmu.adapter_layers) == (5e-4, 7, [2])
    assert (preset.model.revision, preset.retain.corpora[0].split, preset.evaluation.limit) == ("main", "test", 9)


def test_an_override_may_hold_an_equals_sign(good: Path) -> None:
    assert load_preset(str(good), ["title=a=b"]).title == "a=b"


def test_mistakes_in_overrides_are_labelled_as_such(good: Path) -> None:
    text = complaint(good, "rmu.stps=3", "rmu.rank=0", "topics.plants.corpus.x.y=1")
    assert "has 3 mistakes:" in text
    assert '  --set rmu.stps: unknown key. Did you mean "steps"?' in text
    assert "  --set rmu.rank: should be greater than or equal to 1 (it is 0)" in text
    assert "  --set topics.plants.corpus.x: unknown key." in text
    assert "line " not in text


def test_a_mistake_of_the_file_keeps_its_line_beside_an_override(tmp_path: Path) -> None:
    text = complaint(write(tmp_path, GOOD.replace("alpha: 100", "alpha: -1")), "rmu.rank=0")
    assert "  line 11: topics.plants.alpha:" in text
    assert "  --set rmu.rank:" in text


@pytest.mark.parametrize("override", ["rmu.steps", "=3", "rmu..steps=3", ".steps=3"])
def test_a_malformed_override_is_shown_with_the_right_form(good: Path, override: str) -> None:
    assert complaint(good, override) == f'--set "{override}" is not of the form key.path=value, for example --set rmu.steps=50.'


@pytest.mark.parametrize("path", ["retain.corpora.5.source", "retain.corpora.first.source", "title.of.it"])
def test_an_override_of_a_place_that_is_not_there_names_it(good: Path, path: str) -> None:
    assert complaint(good, f"{path}=./a") == f'--set "{path}=./a": the preset has no place "{path}".'


@pytest.mark.parametrize("value", ["[1", "2020-99-99", "!!python/object/apply:os.system [ls]"])
def test_an_override_whose_value_is_no_yaml_is_refused(good: Path, value: str) -> None:
    assert complaint(good, f"title={value}") == f'--set "title={value}": the value is not valid YAML.'


def test_paths_of_a_preset_start_at_its_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    preset = load_preset(str(good))
    assert preset.topics["plants"].corpus.source == str(good.parent / "plants.txt")
    assert preset.evaluation.tasks["quiz"].source == str(good.parent.parent / "quiz.jsonl")


@pytest.mark.parametrize(
    "override",
    ["retain.corpora.0.source=./here.txt", "retain.corpora=[{source: ./here.txt}]", "retain={corpora: [{source: ./here.txt}]}"],
)
def test_paths_of_an_override_start_at_the_current_folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    preset = load_preset(str(good), [override, "model.name=../model"])
    assert preset.retain.corpora[0].source == str(elsewhere / "here.txt")
    assert preset.model.name == str(tmp_path / "model")
    assert preset.topics["plants"].corpus.source == str(good.parent / "plants.txt")


def test_a_tilde_is_the_home_folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_preset(str(good), ["model.name=~/model"]).model.name == str(tmp_path / "home/model")


def test_hub_ids_stay_as_they_are(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good.parent / "owner").mkdir()
    monkeypatch.chdir(good.parent)
    preset = load_preset(str(good), ["topics.plants.corpus.source=owner/other"])
    assert (preset.model.name, preset.retain.corpora[0].source) == ("owner/model", "owner/data")
    assert preset.topics["plants"].corpus.source == "owner/other"


@pytest.mark.parametrize(
    ("source", "local"),
    [(path, True) for path in ("./a", "../a", os.path.abspath("a"), "~/a", ".")] + [(name, False) for name in ("owner/name", "name", ".a/b")],
)
def test_a_local_source_starts_like_a_path(source: str, local: bool) -> None:
    assert is_local(source) is local


def test_settings_of_another_version_are_named_with_their_run(good: Path) -> None:
    settings = load_preset(str(good)).model_dump()
    assert recorded_preset(settings, Path("runs/a")) == load_preset(str(good))
    settings["rmu"]["momentum"] = 0.9
    del settings["title"]
    with pytest.raises(UserError) as caught:
        recorded_preset(settings, Path("runs/a"))
    assert str(caught.value) == (
        "runs/a was written by another version of lowmem-rmu: this one does not know its settings of rmu.momentum, title.\n"
        "Read it with the version that its config.json names, or make the run anew."
    )

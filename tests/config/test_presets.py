import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import PRESETS_FOLDER, find_preset, load_preset, preset_names
from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import Preset, Section
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.recorded import preset_of_run, recorded_preset
from tests.texts import plain

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
    assert [topic.corpus.source for topic in load_preset("zephyr-7b-cyber").topics.values()] == [
        "cais/wmdp-corpora"
    ]


WITHOUT_LAYERS = GOOD.replace("  target_layer: 3\n  adapter_layers: [1, 2, 3]\n", "  rank: 8\n")


@pytest.mark.parametrize(
    ("config", "target", "adapted"),
    [
        ({"num_hidden_layers": 28}, 7, [5, 6, 7]),
        ({"n_layer": 12}, 3, [1, 2, 3]),
        ({"text_config": {"num_hidden_layers": 4}}, 1, [0, 1]),
        ({"num_hidden_layers": 1}, 0, [0]),
    ],
)
def test_layers_come_from_the_depth_of_a_local_model(
    tmp_path: Path, config: dict[str, Any], target: int, adapted: list[int]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    rmu = load_preset(str(write(tmp_path, WITHOUT_LAYERS)), [f"model.name={tmp_path / 'model'}"]).rmu
    assert (rmu.target_layer, rmu.adapter_layers, rmu.rank) == (target, adapted, 8)


def test_layers_come_from_the_depth_that_a_preset_gives(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        WITHOUT_LAYERS.replace(
            "owner/model", "owner/model\n  config: {model_type: llama, num_hidden_layers: 16}"
        ),
    )
    assert load_preset(str(path)).rmu.adapter_layers == [2, 3, 4]
    # A local model's own depth counts, whatever the preset says about the model that it replaces.
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 28}))
    assert load_preset(str(path), [f"model.name={tmp_path}"]).rmu.adapter_layers == [5, 6, 7]
    # One of the two says what the user wants: the other is not guessed.
    assert "rmu.adapter_layers" in complaint(path, "rmu.target_layer=3")


@pytest.mark.parametrize("config", ["{", "[]", '{"num_hidden_layers": "many"}', "{}"])
def test_layers_of_an_unknown_depth_are_asked_for(tmp_path: Path, config: str) -> None:
    assert "rmu.target_layer" in complaint(write(tmp_path, WITHOUT_LAYERS))
    (tmp_path / "config.json").write_text(config)
    assert "rmu.target_layer" in complaint(write(tmp_path, WITHOUT_LAYERS), f"model.name={tmp_path}")


def test_an_unknown_preset_gets_the_nearest_names() -> None:
    assert plain(complaint("zephyr7b")) == snapshot(
        'There is no preset "zephyr7b". Did you mean "zephyr-7b" or "zephyr-7b-cyber"?\n'
        "See them all with --list, or give the path of a YAML file."
    )


def test_an_unknown_preset_that_resembles_none_gets_all_names() -> None:
    assert ", ".join(preset_names()) in complaint("xyz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert plain(complaint(path), path=path) == snapshot(
        "Preset file <path> does not exist.\nCheck the path, or see the shipped presets with --list."
    )


def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "title: x\nmodel:\n  name: [a, b\nrmu: 3\n")
    assert plain(complaint(path), path=path) == snapshot(
        "<path>, line 4: not valid YAML: expected ',' or ']', but got ':'."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"title: \xff\n",
            snapshot(
                "<path> cannot be read as a preset: 'utf-8' codec can't decode byte 0xff in position 7: "
                "invalid start byte."
            ),
        ),
        (
            b"title: \x00\n",
            snapshot(
                "<path> cannot be read as a preset: not valid YAML: unacceptable character #x0000: special "
                "characters are not allowed\n"
                '  in "<unicode string>", position 7.'
            ),
        ),
        (
            b"title: 2020-99-99\n",
            snapshot("<path> cannot be read as a preset: not valid YAML: month must be in 1..12."),
        ),
    ],
)
def test_what_yaml_cannot_read_is_reported_with_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert plain(complaint(path), path=path) == said


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "hello\n", "# only a comment\n"])
def test_a_file_without_keys_is_no_preset(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert plain(complaint(path), path=path) == snapshot(
        "<path> holds no preset: expected keys such as model, rmu, topics, retain."
    )


def test_a_python_tag_is_refused_and_never_run(tmp_path: Path) -> None:
    path = write(
        tmp_path, GOOD.replace("A test", f"!!python/object/apply:os.system ['touch {tmp_path}/ran']")
    )
    text = complaint(path)
    assert f"{path}, line 1:" in text
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
    assert plain(complaint(path), path=path) == snapshot(
        "<path> has 8 mistakes:\n"
        "  line 2: model.name: is missing\n"
        '  line 3: model.nme: unknown key. Did you mean "name"?\n'
        "  line 5: rmu.target_layer: should be a valid integer, unable to parse string as an integer (it is "
        "'three')\n"
        "  line 11: topics.plants.alpha: should be greater than or equal to 0 (it is -1)\n"
        '  line 12: topics.plants.steering_coeficient: unknown key. Did you mean "steering_coefficient" or '
        '"steering"?\n'
        '  line 16: retain.corpora.0.subst: unknown key. Did you mean "subset"?\n'
        "  line 19: evaluation.tasks.quiz.role: should be 'forgotten', 'measured', 'adjacent' or 'kept' (it "
        "is 'keep')\n"
        '  line 20: retrain: unknown key. Did you mean "retain"?'
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("title: A test", "title: 3", snapshot("line 1: title: should be a valid string (it is 3)")),
        (
            "adapter_layers: [1, 2, 3]",
            "adapter_layers: 2",
            snapshot("line 6: rmu.adapter_layers: should be a valid list (it is 2)"),
        ),
        (
            "adapter_layers: [1, 2, 3]",
            "adapter_layers: []",
            snapshot(
                "line 6: rmu.adapter_layers: List should have at least 1 item after validation, not 0 (it is "
                "a list)"
            ),
        ),
        (
            "[1, 2, 3]",
            "[1, two]",
            snapshot(
                "line 6: rmu.adapter_layers.1: should be a valid integer, unable to parse string as an "
                "integer (it is 'two')"
            ),
        ),
        (
            "[1, 2, 3]",
            "[2, 3, 4, 5]",
            snapshot(
                "line 4: rmu: adapter_layers [4, 5] lie above target_layer 3 and could not learn anything"
            ),
        ),
        ("[1, 2, 3]", "[-1, 2]", snapshot("line 4: rmu: adapter_layers count from 0")),
        ("[1, 2, 3]", "[1, 1]", snapshot("line 4: rmu: adapter_layers names a layer twice")),
        (
            "alpha: 100",
            "alpha: 100\n    steering: random",
            snapshot("line 8: topics.plants: steering: random takes a steering_coefficient"),
        ),
        (
            "alpha: 100",
            "alpha: 100\n    steering: contrastive",
            snapshot("line 8: topics.plants: steering: contrastive takes a steering_coefficient"),
        ),
        (
            "alpha: 100",
            "alpha: 100\n    steering_coefficient: 6.5",
            snapshot(
                "line 8: topics.plants: steering: adaptive finds its own steering_coefficient: leave it out, "
                "or set steering: random"
            ),
        ),
        (
            "target_layer: 3",
            "target_layer: 3\n  steps: 0",
            snapshot("line 6: rmu.steps: should be greater than or equal to 1 (it is 0)"),
        ),
        (
            "./plants.txt",
            "./plants.txt\n      title_matches: '(a'",
            snapshot(
                "line 11: topics.plants.corpus.title_matches: is no regular expression: missing ), "
                "unterminated subpattern at position 0"
            ),
        ),
        (
            "./plants.txt",
            "./plants.txt\n      held_out: 1",
            snapshot("line 11: topics.plants.corpus.held_out: should be less than 1 (it is 1)"),
        ),
        (
            "./plants.txt",
            "./plants.txt\n      share: 0.3",
            snapshot(
                "line 8: topics.plants: corpus.share counts in the retain set only: leave it out of a topic"
            ),
        ),
        (
            "- source: owner/data",
            "- {source: owner/data, share: 0.3}",
            snapshot(
                "line 12: retain: every corpus has a share: leave it out of one at least, which gets the rest"
            ),
        ),
        (
            "- source: owner/data",
            "- {source: a/b, share: 0.6}\n    - {source: c/d, share: 0.4}\n    - source: e/f",
            snapshot(
                "line 12: retain: the shares of the corpora add up to 1: together they must stay below 1"
            ),
        ),
        (
            "retain:\n  corpora:\n    - source: owner/data",
            "retain: [1]",
            snapshot("line 12: retain: should be a valid dictionary (it is a list)"),
        ),
    ],
)
def test_a_wrong_value_is_reported_with_line_place_and_reason(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in GOOD
    heading, mistake = complaint(write(tmp_path, GOOD.replace(old, new))).splitlines()
    assert str(tmp_path) in heading
    assert "has 1 mistake:" in heading
    assert plain(mistake.strip()) == expected


@pytest.mark.parametrize("value", ["much", "-1", "[1]"])
def test_a_wrong_value_is_one_complaint_from_the_file_and_from_set(
    tmp_path: Path, good: Path, value: str
) -> None:
    from_set = complaint(good, f"topics.plants.steering_coefficient={value}")
    from_file = complaint(
        write(tmp_path, GOOD.replace("alpha: 100", f"alpha: 100\n    steering_coefficient: {value}"))
    )
    for text, label in ((from_set, "--set"), (from_file, "line 12:")):
        heading, mistake = text.splitlines()
        assert "has 1 mistake:" in heading
        assert mistake.startswith(f"  {label} topics.plants.steering_coefficient: should be ")


def test_overrides_replace_numbers_words_and_items_of_lists(good: Path) -> None:
    overrides = ["rmu.learning_rate=5e-4", "rmu.steps=7", "rmu.adapter_layers=[2]"]
    overrides += ["model.revision=main", "retain.corpora.0.split=test", "evaluation.limit=9"]
    preset = load_preset(str(good), overrides)
    assert (preset.rmu.learning_rate, preset.rmu.steps, preset.rmu.adapter_layers) == (5e-4, 7, [2])
    assert (preset.model.revision, preset.retain.corpora[0].split, preset.evaluation.limit) == (
        "main",
        "test",
        9,
    )


def test_an_override_may_hold_an_equals_sign(good: Path) -> None:
    assert load_preset(str(good), ["title=a=b"]).title == "a=b"


def test_mistakes_in_overrides_are_labelled_as_such(good: Path) -> None:
    text = complaint(good, "rmu.stps=3", "rmu.rank=0", "topics.plants.corpus.x.y=1")
    assert plain(text) == snapshot(
        "What was given has 3 mistakes:\n"
        "  --set rmu.rank: should be greater than or equal to 1 (it is 0)\n"
        '  --set rmu.stps: unknown key. Did you mean "steps"?\n'
        "  --set topics.plants.corpus.x: unknown key. There is: detokenize, held_out, long_documents, "
        "min_characters, share, source, split, subset, text_field, title_excludes, title_matches, "
        "without_access."
    )


def test_a_mistake_of_the_file_keeps_its_line_beside_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("alpha: 100", "alpha: -1"))
    assert plain(complaint(path, "rmu.rank=0"), path=path) == snapshot(
        "<path> has 2 mistakes:\n"
        "  --set rmu.rank: should be greater than or equal to 1 (it is 0)\n"
        "  line 11: topics.plants.alpha: should be greater than or equal to 0 (it is -1)"
    )


@pytest.mark.parametrize("override", ["rmu.steps", "=3", "rmu..steps=3", ".steps=3"])
def test_a_malformed_override_is_shown_with_the_right_form(good: Path, override: str) -> None:
    assert plain(complaint(good, override), override=f'"{override}"') == snapshot(
        "--set <override> is not of the form key.path=value, for example --set rmu.steps=50."
    )


@pytest.mark.parametrize("path", ["retain.corpora.5.source", "retain.corpora.first.source", "title.of.it"])
def test_an_override_of_a_place_that_is_not_there_names_it(good: Path, path: str) -> None:
    assert plain(complaint(good, f"{path}=./a"), path=path) == snapshot(
        '--set "<path>=./a": the preset has no place "<path>".'
    )


@pytest.mark.parametrize("value", ["[1", "2020-99-99", "!!python/object/apply:os.system [ls]"])
def test_an_override_whose_value_is_no_yaml_is_refused(good: Path, value: str) -> None:
    assert plain(complaint(good, f"title={value}"), value=value) == snapshot(
        '--set "title=<value>": the value is not valid YAML.'
    )


def test_paths_of_a_preset_start_at_its_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    preset = load_preset(str(good))
    assert preset.topics["plants"].corpus.source == str(good.parent / "plants.txt")
    assert preset.evaluation.tasks["quiz"].source == str(good.parent.parent / "quiz.jsonl")


@pytest.mark.parametrize(
    "override",
    [
        "retain.corpora.0.source=./here.txt",
        "retain.corpora=[{source: ./here.txt}]",
        "retain={corpora: [{source: ./here.txt}]}",
    ],
)
def test_paths_of_an_override_start_at_the_current_folder(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
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
    [(path, True) for path in ("./a", "../a", os.path.abspath("a"), "~/a", ".")]
    + [(name, False) for name in ("owner/name", "name", ".a/b")],
)
def test_a_local_source_starts_like_a_path(source: str, local: bool) -> None:
    assert is_local(source) is local


def test_a_run_keeps_to_the_commit_of_its_model(good: Path) -> None:
    settings = load_preset(str(good)).model_dump()
    for revision in ("a" * 40, None):
        preset = preset_of_run({"settings": settings, "model_revision": revision}, Path("runs/a"))
        assert preset.model.revision == revision
    assert preset_of_run({"settings": settings}, Path("runs/a")) == load_preset(str(good))
    local = load_preset(str(good), ["model.name=./model"]).model_dump()
    assert (
        preset_of_run({"settings": local, "model_revision": "a" * 40}, Path("runs/a")).model.revision is None
    )


def test_settings_of_another_version_are_named_with_their_run(good: Path) -> None:
    settings = load_preset(str(good)).model_dump()
    assert recorded_preset(settings, Path("runs/a")) == load_preset(str(good))
    settings["rmu"]["momentum"] = 0.9
    del settings["title"]
    with pytest.raises(UserError) as caught:
        recorded_preset(settings, Path("runs/a"))
    assert plain(caught.value) == snapshot(
        "runs/a was written by another version of lowmem-rmu: this one does not know its settings of "
        "rmu.momentum, title.\n"
        "Read it with the version that its config.json names, or make the run again."
    )


@pytest.mark.parametrize("suffix", [".YAML", ".yml", ".Yml"])
def test_the_ending_of_a_preset_may_be_written_in_capitals(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text(GOOD, encoding="utf-8")
    assert load_preset(str(path)).title == "A test"


def test_a_byte_order_mark_in_front_is_no_part_of_the_preset(tmp_path: Path) -> None:
    assert load_preset(str(write(tmp_path, "\ufeff" + GOOD))).title == "A test"


BOMB = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "x0: &x0 [a, b]\n" + BOMB,
            snapshot("<path>, line 5: larger than 10,000 values, counting what aliases repeat."),
        ),
        ("title: " + "[" * 100_000, snapshot("<path>, line 1: nested more than 50 levels deep.")),
        ("title: &a {b: *a}", snapshot("<path>, line 1: recursive: the alias *a stands within its anchor.")),
        ("seed: " + "9" * 5_000, snapshot("<path>, line 1: a number of more than 100 characters.")),
        ("seed: 0x" + "f" * 5_000, snapshot("<path>, line 1: a number of more than 100 characters.")),
        ("seed: 1" + ":1" * 5_000 + ".5", snapshot("<path>, line 1: a number of more than 100 characters.")),
        ("#" * 600_000, snapshot("<path> cannot be read as a preset: longer than 500,000 characters.")),
        (
            "title: a\nmodel: {}\ntitle: b",
            snapshot('<path>, line 3: not valid YAML: the key "title" is given twice.'),
        ),
        (
            "title: !!bool x",
            snapshot("<path> cannot be read as a preset: not valid YAML: a value does not fit its tag."),
        ),
    ],
    ids=["aliases", "depth", "recursion", "digits", "hexadecimal", "sexagesimal", "size", "twice", "tag"],
)
def test_yaml_beyond_the_limits_is_refused_before_it_is_built(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = write(tmp_path, text)
    said = complaint(path)
    assert plain(said, path=path) == problem
    assert len(said) < 400


def test_places_that_share_an_anchor_can_be_changed_one_by_one(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        GOOD.replace("  plants:", "  plants: &plants").replace("retain:\n", "  trees: *plants\nretain:\n"),
    )
    assert {
        name: topic.alpha for name, topic in load_preset(str(path), ["topics.plants.alpha=7"]).topics.items()
    } == {"plants": 7, "trees": 100}


def test_a_message_shortens_what_was_given(good: Path) -> None:
    long = "z" * 10_000
    for said in (
        complaint(good, f"rmu.steps={long}"),
        complaint(good, f"{long}=1"),
        complaint(good, f"rmu.{long}.x=1"),
        complaint(good, long),
        complaint(long),
        complaint(f"./{long}.yaml"),
        complaint(good, f"topics.plants.corpus.title_matches=({long}"),
        complaint(good, "rmu.steps=-0x" + "f" * 90),
        complaint(good, *[f"a{number}=1" for number in range(1_000)]),
    ):
        assert len(said) < 5_000
        assert "z" * 600 not in said
    first, *_, last = said.splitlines()
    assert plain(first) == snapshot("What was given has 1,000 mistakes:")
    assert plain(last) == snapshot("  and 970 more")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.txt", "./a\0b"])
def test_a_path_that_cannot_be_one_is_named_with_its_setting(good: Path, path: str) -> None:
    said = complaint(write(good.parent, GOOD.replace("./plants.txt", '"' + path.replace("\0", "\\0") + '"')))
    assert said.startswith("topics.plants.corpus.source: ")
    assert "cannot be read: " in said
    assert "\0" not in said


def test_a_mistake_names_where_its_value_was_given(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert str(path) not in complaint(path, "rmu.rank=0")
    wrong = write(tmp_path, GOOD.replace("alpha: 100", "alpha: -1"))
    assert str(wrong) in complaint(wrong, "rmu.rank=0")
    with pytest.raises(UserError) as caught:
        load_preset(str(path), ["rmu.rank=0"], {"rmu.rank": "Rank"})
    assert plain(caught.value, path=path) == snapshot(
        "<path> has 2 mistakes:\n"
        "  Rank, rmu.rank: should be greater than or equal to 1 (it is 0)\n"
        "  line 11: topics.plants.alpha: should be greater than or equal to 0 (it is -1)"
    )
    with pytest.raises(UserError) as caught:
        load_preset(str(path), ["rmu.rank=["], {"rmu.rank": "Rank"})
    assert plain(caught.value) == snapshot("Rank ('['): the value is not valid YAML.")


KEYS = {"topics": "plants", "tasks": "quiz", "corpora": "0"}
"""The entry that GOOD has of each dict and list of sections."""


def types_in(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of, without the keys of a dict."""
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        inner = inner[1:]
    if not inner:
        yield annotation
    for each in inner:
        yield from types_in(each)


def numeric_settings(section: type[Section], where: str = "") -> Iterator[tuple[str, bool]]:
    """The path of every setting that takes a number, and whether it takes a list of them."""
    for name, field in section.model_fields.items():
        path = f"{where}{name}"
        for kind in types_in(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from numeric_settings(kind, f"{path}.{KEYS[name]}." if name in KEYS else f"{path}.")
            elif kind in (int, float):
                yield path, get_origin(field.annotation) is list


NUMERIC = dict(numeric_settings(Preset))


def test_the_search_for_numbers_finds_those_of_every_section() -> None:
    assert {
        "rmu.learning_rate",
        "rmu.lora_alpha",
        "rmu.adapter_layers",
        "topics.plants.alpha",
        "topics.plants.corpus.held_out",
    } < NUMERIC.keys()
    assert {
        "retain.corpora.0.min_characters",
        "evaluation.batch_tokens",
        "evaluation.tasks.quiz.num_fewshot",
    } < NUMERIC.keys()
    assert NUMERIC["rmu.adapter_layers"]
    assert not NUMERIC["rmu.rank"]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+300", str(10**30), "-1"])
@pytest.mark.parametrize("path", NUMERIC)
def test_every_number_has_a_finite_range(good: Path, path: str, value: str) -> None:
    if path == "rmu.seed" and value == "-1":
        assert load_preset(str(good), [f"{path}={value}"]).rmu.seed == -1  # torch takes it
        return
    text = complaint(good, f"{path}=[{value}]" if NUMERIC[path] else f"{path}={value}")
    heading, mistake = text.splitlines()
    assert "has 1 mistake:" in heading
    assert f"--set {path.split('.')[0]}" in mistake


def test_a_learning_rate_that_can_only_diverge_is_refused(good: Path) -> None:
    assert plain(complaint(good, "rmu.learning_rate=1.0e+30")) == snapshot(
        "What was given has 1 mistake:\n"
        "  --set rmu.learning_rate: should be less than or equal to 1 (it is 1e+30)"
    )
    assert plain(complaint(good, "rmu.learning_rate=.inf")) == snapshot(
        "What was given has 1 mistake:\n  --set rmu.learning_rate: should be a finite number (it is inf)"
    )


CONTRASTIVE = ("topics.plants.steering=contrastive", "topics.plants.steering_coefficient=20")


def test_a_contrastive_topic_records_its_direction(good: Path) -> None:
    assert load_preset(str(good), [*CONTRASTIVE]).topics["plants"].contrastive_direction == "unit"
    raw = load_preset(str(good), [*CONTRASTIVE, "topics.plants.contrastive_direction=raw"])
    assert raw.topics["plants"].contrastive_direction == "raw"
    assert load_preset(str(good)).topics["plants"].contrastive_direction is None
    text = complaint(good, *CONTRASTIVE, "topics.plants.contrastive_direction=long")
    assert plain(text) == snapshot(
        "What was given has 1 mistake:\n"
        "  --set topics.plants.contrastive_direction: should be 'unit' or 'raw' (it is 'long')"
    )


def test_runs_of_versions_without_them_had_no_forms_no_guard_and_counted_sinks(good: Path) -> None:
    settings = load_preset(str(good)).model_dump()
    for section, keys in (
        ("rmu", ("sinks", "guard_every", "guard_limit")),
        ("retain", ("questions", "chat")),
    ):
        for key in keys:
            del settings[section][key]
    for each in settings["topics"].values():
        del each["questions"], each["corpus"]["detokenize"]
    for corpus in settings["retain"]["corpora"]:
        del corpus["detokenize"], corpus["share"]
    read = recorded_preset(settings, Path("runs/a"))
    assert (read.rmu.sinks, read.rmu.guard_every, read.retain.questions, read.retain.chat) == (
        "counted",
        0,
        0,
        0,
    )
    assert {topic.questions for topic in read.topics.values()} == {0}
    corpora = [*read.retain.corpora, *(topic.corpus for topic in read.topics.values())]
    assert {corpus.detokenize for corpus in corpora} == {False}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "masked"),
        (["rmu.padding=paper"], "counted"),
        (["rmu.padding=paper", "rmu.sinks=masked"], "masked"),
        (["rmu.sinks=counted"], "counted"),
        (["rmu.sinks=null"], "masked"),
    ],
)
def test_sinks_count_in_the_papers_mode_alone(good: Path, changes: list[str], expected: str) -> None:
    assert load_preset(str(good), changes).rmu.sinks == expected


@pytest.mark.parametrize("name", ["tiny", "zephyr-7b", "zephyr-7b-cyber", "yi-34b", "mixtral-8x7b"])
def test_the_papers_presets_train_on_prose_alone(name: str) -> None:
    preset = load_preset(name)
    assert (preset.retain.questions, preset.retain.chat, preset.rmu.guard_every) == (0, 0, 0)
    assert {topic.questions for topic in preset.topics.values()} == {0}
    assert preset.rmu.sinks == "counted"


def test_runs_without_a_recorded_direction_keep_the_one_that_they_were_made_with(good: Path) -> None:
    for overrides, expected in (([], None), ([*CONTRASTIVE], "raw")):
        settings = load_preset(str(good), overrides).model_dump()
        del settings["topics"]["plants"]["contrastive_direction"]
        assert recorded_preset(settings, Path("runs/a")).topics["plants"].contrastive_direction == expected
    settings = load_preset(str(good), [*CONTRASTIVE]).model_dump()
    assert recorded_preset(settings, Path("runs/a")).topics["plants"].contrastive_direction == "unit"

"""Limits on JSON and YAML that others wrote."""

import time

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.parsing import MAX_DEPTH, MAX_VALUES, ParseError, parse_json, parse_yaml
from tests.texts import plain


def problem_of(text: str) -> str:
    with pytest.raises(ParseError) as caught:
        parse_yaml(text)
    return caught.value.problem


def test_what_is_within_the_limits_is_read_as_pyyaml_reads_it() -> None:
    content, tree = parse_yaml("a: &x {b: 1, c: [0x1F, 1.5, 2020-01-01]}\nd: {<<: *x, b: 2}")
    assert content["d"] == content["a"] | {"b": 2}
    assert content["a"]["c"][:2] == [31, 1.5]
    assert tree is not None
    assert tree.start_mark.line == 0
    assert parse_yaml("# nothing\n") == (None, None)


def test_depth_counts_through_aliases() -> None:
    within = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    assert parse_yaml(f"[{within}]")[0]
    assert plain(problem_of(f"- &a {within}\n- [[[*a]]]")) == snapshot("nested more than 50 levels deep")


def test_values_count_as_often_as_they_are_repeated() -> None:
    assert len(parse_yaml(f"[{'1,' * (MAX_VALUES - 1)}]")[0]) == MAX_VALUES - 1
    assert plain(problem_of(f"[{'1,' * MAX_VALUES}]")) == snapshot(
        "larger than 10,000 values, counting what aliases repeat"
    )
    assert plain(problem_of(f"- &a [{'1,' * 99}]\n- [{'*a,' * 100}]")) == snapshot(
        "larger than 10,000 values, counting what aliases repeat"
    )


@pytest.mark.parametrize(
    "text",
    ["- " * 200_000, "{a: " * 100_000, "? " * 100_000, "a:\n" * 100_000, "[" * 400_000, "&a " * 100_000],
)
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ParseError):
        parse_yaml(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, snapshot("nested too deeply")),
        ("9" * 5_000, snapshot("a number of thousands of digits")),
        ('{"a": 1, "a": 2}', snapshot('an object with the key "a" twice')),
        ("{", snapshot("Expecting property name enclosed in double quotes")),
    ],
    ids=["depth", "digits", "twice", "invalid"],
)
def test_json_that_python_does_not_read_is_told_in_words(text: str, problem: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_json(text)
    assert caught.value.problem == problem

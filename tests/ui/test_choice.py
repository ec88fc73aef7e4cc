"""Lists of runs: a value that left its choices is no error, and a refresh changes nothing that was chosen."""

import ast
from pathlib import Path

import gradio as gr
import pytest

from lowmem_rmu.ui.choice import offered, run_dropdown

UI = Path(__file__).resolve().parent.parent.parent / "lowmem_rmu/ui"


@pytest.mark.parametrize("value", ["renamed meanwhile", "mine", None])
def test_a_value_that_left_its_choices_reaches_the_event(value: str | None) -> None:
    with gr.Blocks():
        assert run_dropdown(["mine"], label="Run").preprocess(value) == value


def test_every_dropdown_of_the_page_is_one_of_these() -> None:
    """Gradio's own raises on the server at every event, once its value is gone."""
    made = []
    for path in UI.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made += [path.name for call in calls if ast.unparse(call.func) == "gr.Dropdown"]
    assert made == ["choice.py"]


def test_only_without_a_choice_one_is_made() -> None:
    assert offered(["a", "b"], None) == gr.update(choices=["a", "b"], value="a")
    assert offered([], None) == gr.update(choices=[], value=None)
    for chosen in ("b", "gone"):
        assert offered(["a", "b"], chosen) == gr.update(choices=["a", "b"])

"""Lists of runs to choose from. Runs come, go and change their names while a page shows them."""

from collections.abc import Sequence
from typing import Any

import gradio as gr


def run_dropdown(choices: Sequence[Any] = (), **more: Any) -> gr.Dropdown:
    """Return a dropdown whose value may have left its choices.

    Gradio would refuse such a value at every event, before the event's function sees it. Here the function
    gets it and says what is wrong.
    """
    return gr.Dropdown(list(choices), allow_custom_value=True, **more)


def offered(names: Sequence[str], chosen: str | None) -> Any:
    """Update a dropdown's choices. A choice that was made stays, even of a run that is gone; without one the
    first run is chosen.

    The value is left out where there is one: by the time that the answer arrives, somebody may have chosen
    another.
    """
    return (
        gr.update(choices=list(names))
        if chosen
        else gr.update(choices=list(names), value=next(iter(names), None))
    )

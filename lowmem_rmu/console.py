"""What reaches a terminal: text that its encoding lacks is written in other signs, and text of others
commands nothing.

A model's answer, a server's message or a task's name may hold any character. On a stream that is not UTF-8 (a
redirection on Windows, a plain container) some cannot be written; in a terminal, control characters move the
cursor, change the title or hide what stands there.
"""

import codecs
import json
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any
from unicodedata import category

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

IN_ASCII = {"→": "->", "±": "+-", "−": "-", "–": "-", "…": "...", "·": "*", "’": "'", "─": "-", "━": "-"}
"""What the program itself writes beyond ASCII, and what stands for it where the stream's encoding lacks
it.
"""
HANDLER = "lowmem_rmu_stand_ins"
KEPT = "\n\t"
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Controls of the writing direction: they make a line read otherwise than it is."""


def prepare_streams() -> None:
    """Let the process print any text, whatever the encoding of its output. To be called first in every
    program.
    """
    codecs.register_error(HANDLER, _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    r"""Replace what cannot be encoded: by its stand-in, or by its escape as JSON has it (`\u4e2d`)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(letter) or json.dumps(letter)[1:-1] for letter in missing), error.end


def printable(text: str) -> str:
    """Leave out control characters, escape sequences' beginnings among them, but for line breaks and tabs."""
    return "".join(
        letter for letter in text if letter in KEPT or not (category(letter) == "Cc" or letter in DIRECTIONS)
    )


def print_json(content: Any) -> None:
    """Print JSON that stays the same content whatever the encoding of the output."""
    encoding = str(getattr(sys.stdout, "encoding", None) or "")
    print(printable(json.dumps(content, indent=2, ensure_ascii=not encoding.lower().startswith("utf"))))


class Console(RichConsole):
    """Rich's console for text of others: only Rich itself writes control characters, and names are no markup
    or emoji.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False} | options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

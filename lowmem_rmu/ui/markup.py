"""Pieces of HTML that the tabs share. Everything put into them is escaped, for it may be anybody's text: a
file's, a model's, a person's.
"""

from collections.abc import Iterable, Sequence

from markupsafe import Markup


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def paragraph(strong: str, rest: str = "") -> Markup:
    """Return a paragraph that begins in bold."""
    return Markup("<p><strong>{}</strong>{}</p>").format(strong, rest)


def complaint(text: str) -> Markup:
    """Render an error message with its line breaks."""
    return Markup("<pre class='rmu-error'>{}</pre>").format(text)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", tall: bool = False
) -> Markup:
    """Return a table that scrolls sideways by itself; the first cell of a row is its heading. A `tall` one
    scrolls downwards too.
    """
    title = Markup("<caption>{}</caption>").format(caption) if caption else Markup("")
    head = joined(Markup("<th scope='col'>{}</th>").format(each) for each in heads)
    body = joined(_row(row) for row in rows)
    content = Markup("{}<thead><tr>{}</tr></thead><tbody>{}</tbody>").format(title, head, body)
    kind = "rmu-scroll rmu-tall" if tall else "rmu-scroll"
    return Markup("<div class='{}' tabindex='0'><table class='rmu-table'>{}</table></div>").format(
        kind, content
    )


def _row(cells: Sequence[str]) -> Markup:
    first, *others = cells
    heading = Markup("<th scope='row'>{}</th>").format(first)
    return Markup("<tr>{}{}</tr>").format(
        heading, joined(Markup("<td>{}</td>").format(each) for each in others)
    )

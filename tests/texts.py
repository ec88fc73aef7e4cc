"""Prepare texts for comparison with inline snapshots.

Exact texts are inline snapshots: `assert plain(caught.value, path=path) == snapshot("<path> does not exist.\\n...")`.
After a change of words, renew them with `python -m pytest -n 0 --inline-snapshot=fix`, and read the difference.
"""

import re


def plain(text: object, **changing: object) -> str:
    """Return the text with every value that changes from run to run replaced by its name in angle brackets.

    `changing` gives the values by name, for example `path=tmp_path / "a.csv"`. Longer values are replaced first, so that
    a file is not taken for its folder. Spaces at the ends of lines are dropped.
    """
    result = str(text)
    for name, value in sorted(changing.items(), key=lambda item: -len(str(item[1]))):
        result = result.replace(str(value), f"<{name}>")
    return re.sub(r"[ \t]+$", "", result, flags=re.MULTILINE)


def without_numbers(text: object) -> str:
    """Return the text with every number replaced by N, for amounts that depend on the machine or on a measurement."""
    return plain(re.sub(r"\d[\d,.]*(?<=\d)", "N", str(text)))


BLOCK = re.compile(
    r"</?(?:p|div|ul|ol|li|table|caption|tr|t[hd]|h\d|dl|d[td]|summary|section|pre|blockquote|br)\b[^>]*>"
)


def text_with(html: str, key: str) -> str:
    """Return the one paragraph, cell or heading of a page that holds the key, without its tags."""
    texts = {" ".join(re.sub(r"<[^>]+>", "", block).split()) for block in BLOCK.split(html)}
    [found] = [text for text in texts if key in text]
    return found

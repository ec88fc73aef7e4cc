"""Presets read from YAML files, with errors that name file and line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowmem_rmu.config.depth import layers_by_depth
from lowmem_rmu.config.paths import resolve_paths
from lowmem_rmu.config.schema import Preset, Section
from lowmem_rmu.errors import UserError, nearest, shortened, shown
from lowmem_rmu.parsing import MAX_DEPTH, ParseError, parse_yaml

PRESETS_FOLDER = Path(__file__).resolve().parents[2] / "presets"
MISTAKES_SHOWN = 30
"""Mistakes of a preset that one message lists."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml"))


def find_preset(name_or_path: str) -> Path:
    """Return the YAML file of a shipped preset, or of a path."""
    if name_or_path in preset_names():
        return PRESETS_FOLDER / f"{name_or_path}.yaml"
    if Path(name_or_path).suffix.lower() in (".yaml", ".yml"):
        try:
            path = Path(name_or_path).expanduser()
            if path.is_file():
                return path
        except (OSError, RuntimeError):  # a name that is too long, or the home folder of nobody
            path = Path(name_or_path)
        raise UserError(
            f"Preset file {path} does not exist.",
            "Check the path, or see the shipped presets with --list.",
        )
    raise UserError(
        f'There is no preset "{shortened(name_or_path)}". {nearest(name_or_path, preset_names())}',
        "See them all with --list, or give the path of a YAML file.",
    )


def load_preset(
    name_or_path: str, overrides: list[str] | None = None, labels: Mapping[str, str] | None = None
) -> Preset:
    """Read and check a preset; `overrides` are `key.path=value` with YAML values.

    `labels` say what a form calls a setting, by its dotted path. Raises UserError with every mistake at once,
    each with the place of its value: a line of the file, the form's field, or the path that followed `--set`.
    """
    path = find_preset(name_or_path)
    try:
        content, tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except ParseError as error:
        where = f"{path}, line {error.line}:" if error.line else f"{path} cannot be read as a preset:"
        raise UserError(f"{where} {error.problem}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a preset: {error}.") from error
    if tree is None or not isinstance(content, dict):
        raise UserError(f"{path} holds no preset: expected keys such as model, rmu, topics, retain.")
    given = Given(labels)
    for change in overrides or []:
        given.paths.add(override(content, change, labels))
    content = layers_by_depth(resolve_paths(content, path.parent, given.paths))
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        raise UserError(_complaint(path, tree, content, error, given)) from error


@dataclass(frozen=True)
class Given:
    """The settings that were given in addition to the preset's file, and how a message names each."""

    labels: Mapping[str, str] | None
    """By dotted path, what a form calls a setting; None where settings come from the command line's
    `--set`.
    """
    paths: set[str] = field(default_factory=set)

    def name(self, where: str) -> str:
        """Return what a message calls the setting at a dotted path."""
        if self.labels is None:
            return f"--set {shortened(where)}"
        label = self.labels.get(where)
        return f"{label}, {shortened(where)}" if label else shortened(where)

    def covers(self, where: str) -> bool:
        """Return whether the value at a dotted path, or a part of it, was given."""
        return any(
            where == key or key.startswith(f"{where}.") or where.startswith(f"{key}.") for key in self.paths
        )


def override(content: dict[str, Any], change: str, labels: Mapping[str, str] | None = None) -> str:
    """Write one `key.path=value` into the raw preset and return its path; the key is checked later.

    `labels` say what a form calls a setting, by its dotted path.
    """
    path, separator, value = change.partition("=")
    keys = path.strip().split(".")
    label = (labels or {}).get(".".join(keys))
    option = "--set " if labels is None else ""  # a form has fields, and lines for other settings
    told = f"{label} ({shown(value)})" if label else f'{option}"{shortened(change)}"'
    if not separator or not all(keys):
        raise UserError(
            f"{told} is not of the form key.path=value, for example {option}rmu.steps=50.", place=path
        )
    if len(keys) > MAX_DEPTH:
        raise UserError(f"{told}: the path has more than {MAX_DEPTH} keys.")
    try:
        given, _ = parse_yaml(value)
    except ParseError as error:
        raise UserError(
            f"{told}: the value is {error.problem if error.is_valid else 'not valid YAML'}."
        ) from error
    node: Any = content
    try:
        for key in keys[:-1]:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        last: Any = int(keys[-1]) if isinstance(node, list) else keys[-1]
        node[last] = given
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f'{told}: the preset has no place "{shortened(path)}".') from error
    return ".".join(keys)


def _complaint(path: Path, tree: yaml.Node, content: Any, error: ValidationError, given: Given) -> str:
    """Return every mistake of a preset in one message, in the order of the file, each with the place of its
    value.
    """
    # A wrong value of a union is reported once a member, with the member's name in the path: the place is
    # what counts.
    found: dict[str, tuple[int, list[str]]] = {}
    of_file = 0
    for problem in error.errors():
        line, place = _locate(tree, content, problem["loc"])
        where = ".".join(place)
        is_given = given.covers(where)
        label = given.name(where) if is_given else f"line {line}: {shortened(where)}"
        of_file += not is_given
        messages = found.setdefault(label, (line, []))[1]
        if (message := _reason(problem)) not in messages:
            messages.append(message)
    lines = [
        f"  {label}: {', or '.join(messages)}"
        for label, (_, messages) in sorted(found.items(), key=lambda item: item[1][0])
    ]
    if len(lines) > MISTAKES_SHOWN:
        lines[MISTAKES_SHOWN:] = [f"  and {len(lines) - MISTAKES_SHOWN:,} more"]
    source = str(path) if of_file else "What was given"
    return f"{source} has {len(found):,} mistake{'s' if len(found) > 1 else ''}:\n" + "\n".join(lines)


def _locate(tree: yaml.Node, content: Any, location: tuple[int | str, ...]) -> tuple[int, list[str]]:
    """Return the 1-based line nearest to a pydantic location, and the location's own keys (union members left
    out).

    `content` is the preset after `--set`, which may hold more than the file's `tree`.
    """
    node: yaml.Node | None = tree
    line, place = tree.start_mark.line + 1, list[str]()
    for part in location:
        if not isinstance(content, dict) and not (isinstance(content, list) and isinstance(part, int)):
            break
        place.append(str(part))
        content = content.get(part) if isinstance(content, dict) else content[int(part)]
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            # The last one counts: in front stand those that a merge key (<<) brought along.
            key, node = next(
                ((key, value) for key, value in reversed(node.value) if key.value == str(part)), (None, None)
            )
            line = key.start_mark.line + 1 if key else line
        else:
            node = None
    return line, place


def _reason(problem: Any) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key. {nearest(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(problem["ctx"]["error"])
    given = problem["input"]
    value = (
        shown(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    )
    message = problem["msg"].replace("Input should be", "should be").partition(" or instance of")[0]
    return f"{message} (it is {value})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at a pydantic location takes."""
    section: Any = Preset
    for part in location:
        is_section = isinstance(section, type) and issubclass(section, Section)
        # Otherwise it is a dict or a list, and what counts is the type of its values.
        section = section.model_fields[str(part)].annotation if is_section else section.__args__[-1]
    return list(section.model_fields)

"""Parse JSON and YAML that others wrote, within limits: size, depth, aliases, digits, and no key twice."""

import json
from copy import copy
from typing import Any

import yaml

from lowmem_rmu.errors import shortened

MAX_CHARACTERS = 500_000
MAX_DEPTH = 50
MAX_VALUES = 10_000
"""Values of a YAML text, counting what its aliases repeat: a preset has some hundreds."""
MAX_DIGITS = 100
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class ParseError(ValueError):
    """A text that is not valid, or beyond a limit.

    `problem` completes "It is ..."; `line` is 1-based, None where it is not known.
    """

    def __init__(self, problem: str, line: int | None = None, is_valid: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.is_valid = is_valid
        """Whether it would be valid without the limits."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """Construct a number, but not one of thousands of digits: PyYAML would compute it for minutes."""
    if len(node.value) > MAX_DIGITS:
        raise _beyond(f"a number of more than {MAX_DIGITS} characters", node.start_mark)
    return loader.construct_yaml_int(node) if node.tag == _INT else loader.construct_yaml_float(node)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit on the digits of numbers."""

    yaml_constructors = yaml.SafeLoader.yaml_constructors | {_INT: _number, _FLOAT: _number}


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Parse one YAML document; give its content and its tree of nodes with line numbers.

    Of an empty text, both are None. What an alias repeats is copied, so that no two places of the content
    share an object. Raises ParseError.
    """
    if len(text) > MAX_CHARACTERS:
        raise ParseError(f"longer than {MAX_CHARACTERS:,} characters", is_valid=True)
    try:
        _check_limits(text)
        loader = _Loader(text)
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        tree = _copied(tree)
        return loader.construct_document(tree), tree
    except ParseError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise ParseError(f"not valid YAML: {error.problem}", line) from error
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow, an impossible date
        raise ParseError(f"not valid YAML: {error}") from error
    except Exception as error:  # PyYAML raises all kinds of errors for `!!bool x` or `!!int ""`
        raise ParseError("not valid YAML: a value does not fit its tag") from error


def parse_json(text: str) -> Any:
    """Parse one JSON value. Raises ParseError."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ParseError(error.msg, error.lineno) from error
    except RecursionError as error:
        raise ParseError("nested too deeply", is_valid=True) from error
    except ParseError:
        raise
    except ValueError as error:
        raise ParseError("a number of thousands of digits", is_valid=True) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ParseError(f'an object with the key "{shortened(twice)}" twice')
    return content


def _beyond(problem: str, mark: Any) -> ParseError:
    """Return a text that is valid, but beyond a limit at a mark of PyYAML's."""
    return ParseError(problem, mark.line + 1, is_valid=True)


def _check_limits(text: str) -> None:
    """Go through the parser's events, which come one by one, and stop at the first that is beyond a limit."""
    values = 0
    sizes: dict[str, int] = {}
    heights: dict[str, int] = {}
    # Of every open collection: its anchor, the values before it, and how many levels lie below it.
    open_collections: list[list[Any]] = []
    for event in yaml.parse(text, Loader=_Loader):
        height = 0
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _, _ in open_collections):
                alias = shortened(str(event.anchor))
                raise _beyond(f"recursive: the alias *{alias} stands within its anchor", event.start_mark)
            values += sizes.get(str(event.anchor), 1)
            height = heights.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            values += 1
        if values > MAX_VALUES:
            too_many = f"larger than {MAX_VALUES:,} values, counting what aliases repeat"
            raise _beyond(too_many, event.start_mark)
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append([event.anchor, values - 1, 0])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, below = open_collections.pop()
            height = below + 1
            if anchor:
                sizes[anchor] = values - before
                heights[anchor] = height
        elif isinstance(event, yaml.ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1
            heights[event.anchor] = 0
        if len(open_collections) + height > MAX_DEPTH:
            raise _beyond(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        if open_collections:
            open_collections[-1][2] = max(open_collections[-1][2], height)


def _copied(node: yaml.Node) -> yaml.Node:
    """Copy a tree so that no node has two places in it. Raises ParseError where a mapping has a key twice."""
    if isinstance(node, yaml.SequenceNode):
        items = [_copied(item) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f'not valid YAML: the key "{shortened(key.value)}" is given twice'
                raise ParseError(problem, key.start_mark.line + 1)
            seen.add(key.value)
        pairs = [(_copied(key), _copied(value)) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    return copy(node)

"""Parser for short, plain YAML without anchors, aliases, merge keys or objects."""

from __future__ import annotations

from typing import Any

from sleb_serve.convert.found import check_keys
from sleb_serve.errors import SlebError

_MAX_CHARACTERS = 64 << 10
"""Handwritten configurations are shorter, and PyYAML takes a second for this many characters."""
_MAX_DEPTH = 50
"""Maximum nesting; PyYAML's time is quadratic in it."""
_MERGE = "tag:yaml.org,2002:merge"


class NotYamlError(ValueError):
    """The text is not YAML of this kind."""


def parsed_yaml(text: str, where: str) -> object:
    """Parse the single value of a text; None if it is empty.

    Raises:
        NotYamlError: it is not YAML, too long or nested too deeply.
        SlebError: it is YAML with a refused part; the message names it.
    """
    import yaml

    if len(text) > _MAX_CHARACTERS:
        raise NotYamlError("too long")
    try:
        _check_events(yaml.parse(text, yaml.SafeLoader), where)
        loader, values = yaml.SafeLoader(text), []
        while loader.check_node():
            node = loader.get_node()
            _check_nodes(node, where)
            values.append(loader.construct_document(node))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise NotYamlError from error
    values = [value for value in values if value is not None]
    if len(values) > 1:
        raise SlebError(f"{where} holds {len(values)} YAML documents; give a file with one")
    return values[0] if values else None


def _check_events(events: Any, where: str) -> None:
    """Refuse deep nesting, and aliases, which can expand to a long or recursive list."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise NotYamlError("nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise SlebError(f"{where} uses a YAML alias (*); write out what it stands for")


def _check_nodes(root: Any, where: str) -> None:
    """Refuse duplicate keys and merge keys."""
    import yaml

    left = [root]
    while left:
        node = left.pop()
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if any(key.tag == _MERGE for key in keys):
                raise SlebError(f"{where} uses YAML's merge key <<; write out what it stands for")
            check_keys((key.value for key in keys), where)
            left += [value for _, value in node.value]

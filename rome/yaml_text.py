"""YAML that says what it seems to say: no key twice, and 1e-6 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class YamlError(ValueError):
    """Not YAML, or YAML that would lose or bend something; the message says the line."""


def _kind(value: Any) -> str:
    names = {bool: str(value).lower(), int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and keys and dates that are no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # What stands beside it overrides it.
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                written = getattr(key_node, "value", key)
                raise YamlError(
                    f"line {line}: a key must be text, and {written} is read as {_kind(key)}; "
                    "quote it"
                )
            if key in first:
                raise YamlError(f"line {line}: the key {key!r} is in line {first[key]} already")
            first[key] = line
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Not as YAML 1.1 has it, where 0100 is 64 and 1:30 is 90."""
    text = str(node.value)
    if ":" in text or re.match(r"[-+]?0[0-9_]", text):
        raise YamlError(
            f"line {node.start_mark.line + 1}: {text} is another number in YAML than it seems; "
            "write it without leading zeros or colons, or quote it"
        )
    kind = node.tag.rpartition(":")[2]
    make = loader.construct_yaml_int if kind == "int" else loader.construct_yaml_float
    return make(node)


class _TextLoader(_Loader):
    """Also refuses a value that is no text, such as NO, 1 or an empty one."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str):
            raise YamlError(
                f"line {node.start_mark.line + 1}: a value must be text, and {node.value or value} "
                f"is read as {_kind(value)}; quote it"
            )
        return value


for _kind_of in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind_of}", _number)
# YAML 1.1, which PyYAML reads, takes 1e-6 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# A date is text, as JSON has it.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in _Loader.yaml_implicit_resolvers.items()
}


_MOST_VALUES = 10_000_000
"""Of a document whose aliases are written out."""


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a node. Raises YamlError where aliases of aliases make them too many, or one is
    inside itself."""
    if id(node) in known:
        size = known[id(node)]
        if not size:
            raise YamlError(f"line {node.start_mark.line + 1}: an alias is inside its own anchor")
        return size
    known[id(node)] = 0
    values = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    known[id(node)] = size = 1 + sum(_size(part, known) for part in parts)
    if size > _MOST_VALUES:
        raise YamlError(
            f"line {node.start_mark.line + 1}: with its aliases written out, it has more than "
            f"{_MOST_VALUES:,} values"
        )
    return size


def load(text: str | bytes, only_text: bool = False) -> Any:
    """The value of a YAML document. Raises YamlError with the line of what is wrong.

    `only_text`: every single value must be text.
    """
    try:
        loader = (_TextLoader if only_text else _Loader)(text)  # Both are safe.
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except YamlError:
        raise
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise YamlError(
            f"not YAML: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None

"""YAML as people write it by hand, read strictly: what would be lost or misread silently is one message with its place.

Beside what PyYAML's safe loader refuses: a key that is given twice, a date or a number that is none, aliases that stand
for more than a file could hold, and text that is no Unicode. 1e-3 is a number, as it is everywhere but in YAML 1.1.
"""

import re
from typing import Any

import yaml

__all__ = ["StrictDumper", "YamlError", "load_yaml"]

MOST_VALUES = 1_000_000
"""Values of a file, aliases written out: enough for a bias for each token of a large vocabulary."""
LONGEST_SHOWN = 60
MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """The text cannot be used. The message names line and column, where they are known."""


def load_yaml(text: str) -> Any:
    """What the text says. Raises YamlError."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise YamlError(f"{place}{error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace("\n", " ")) from None
    except RecursionError:
        raise YamlError("nested too deep") from None
    except (ValueError, OverflowError) as error:
        # Of the scanner, which makes a character of any number: \U99999999.
        raise YamlError(f"not YAML: {error}") from None
    _check_values(data)
    return data


def _check_values(data: Any) -> None:
    # Aliases share what they stand for. Written out, which messages do, a few lines of them can be without end.
    count, left = 0, [data]
    while left:
        value = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise YamlError(f"its aliases stand for more than {MOST_VALUES:,} values; write out what is meant")
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise YamlError(f"{_shown(value)} holds half of a surrogate pair, which is no text")
        elif isinstance(value, dict):
            left.extend(value)
            left.extend(value.values())
        elif isinstance(value, list | tuple | set):
            left.extend(value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else shown[: LONGEST_SHOWN - 3] + "..."


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            # What a date, a number or a tagged value says is read with Python's own functions, and they raise these.
            what = f"{_shown(node.value)} is no {node.tag.rpartition(':')[2]}: {error}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            # `<<: *anchor` gives keys that the mapping's own may replace.
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != MERGE:
                key = (key_node.tag, key_node.value)
                if key in seen:
                    name = key_node.value if key_node.value.isprintable() else repr(key_node.value)
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {name} is given twice; keep one", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """Writes what `load_yaml` reads back equal: a text such as 1e5 is put in quotes."""


for _class in (_Loader, StrictDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
    )

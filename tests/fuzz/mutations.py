"""What the fuzzers feed: bytes near valid ones, and JSON and YAML built from the keys that are known."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

NASTY = (
    *(bytes([byte]) for byte in b"\x00\n\r\t \"'\\{}[],:&*!|>%@`#-?~=.0\x85\xff"),
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    "🤖é".encode(),
    rb"\ud83d",
    rb"\u0000",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0.0",
    b"9" * 30,
    b"9" * 5000,
    b"1_000",
    b"0x1F",
    b"1:30",
    b"2001-99-99",
    b"null",
    b"true",
    b"[" * 500,
    b'{"a":' * 500,
    b"&a [*a, *a]",
    b"*a",
    b"<<: ",
    b"!!python/object/apply:os.system [ls]",
    b"!!binary x",
    b"!!int ''",
    b"!!float x",
    b"!!bool x",
    b"!!timestamp x",
    b"!!set {a}",
    b"---\n",
    b"\r\n",
)
"""What parsers stumble over, put in anywhere."""

NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    64,
    2**31 - 1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    1.0,
    -0.0,
    1e-300,
    1e300,
)
TEXTS = st.one_of(
    st.sampled_from(
        (
            "",
            "a",
            "auto",
            "none",
            "trace",
            "a\x00b",
            "\ud800",
            "x" * 300,
            "\u2028",
            "🤖",
            "../..",
            "-",
            "*",
            "1e5",
            "0x1F",
            "=",
            "~",
        )
    ),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)


def mutated(bases: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of `bases` with a few places changed: cut, doubled, overwritten, or something nasty put in."""
    change = st.tuples(st.integers(0, 4), st.integers(0, 2**20), st.integers(1, 24), st.sampled_from(NASTY))
    return st.builds(_changed, st.sampled_from(bases), st.lists(change, min_size=1, max_size=5))


def variants(value: Any, count: int) -> Iterator[Any]:
    """`count` changed copies of bytes or a text, the same ones each time; none of anything else.

    Far cheaper than drawing as many inputs.
    """
    if not isinstance(value, bytes | str):
        return
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    generator = random.Random(data)
    for _ in range(count):
        changes = [
            (generator.randrange(5), generator.randrange(2**20), generator.randint(1, 24), generator.choice(NASTY))
            for _ in range(generator.randint(1, 4))
        ]
        made = _changed(data, changes)
        yield made if isinstance(value, bytes) else made.decode("utf-8", "replace")


def _changed(base: bytes, changes: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    data = bytearray(base)
    for kind, place, length, nasty in changes:
        at = place % (len(data) + 1)
        if kind == 0:
            del data[at : at + length]
        elif kind == 1:
            data[at:at] = data[at : at + length]
        elif kind == 2:
            data[at : at + len(nasty)] = nasty
        elif kind == 3:
            data[at:at] = nasty
        else:
            del data[at:]
    return bytes(data)


def as_json(value: Any) -> bytes:
    """`value` as one line of JSON; what JSON lacks (NaN, half a surrogate pair) is written as Python does."""
    return json.dumps(value).encode()


def as_yaml(value: Any) -> bytes:
    """`value` as YAML, or as JSON where YAML cannot be written."""
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeError):
        return as_json(value)


@st.composite
def nested(draw: st.DrawFn, keys: Sequence[str], base: dict[str, Any]) -> dict[str, Any]:
    """`base` with some of the dotted `keys` set to any value."""
    made: dict[str, Any] = json.loads(json.dumps(base))
    for key in draw(st.lists(st.sampled_from(keys), max_size=5)):
        *sections, leaf = key.split(".")
        section: Any = made
        for name in sections:
            inner = section.get(name)
            section[name] = inner = inner if isinstance(inner, dict) else {}
            section = inner
        section[leaf] = draw(VALUES)
    return made

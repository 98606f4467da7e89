"""Mutators of XML, JSON and YAML: bombs, nesting, tags, entities, encodings, wrong types."""

from __future__ import annotations

import copy
import itertools
import json
import re
from random import Random
from typing import Any

from .mutate import NUMBERS, TEXTS, Mutator

DEPTHS = (3, 99, 101, 1000, 20_000, 200_000)
_TAG = re.compile(rb"<(/?)([A-Za-z]+)([^<>]*)>")
_TEXT = re.compile(rb">([^<>]+)<")
_LEAF = re.compile(rb"<([a-z]+)>[^<>]*</\1>")
_ENCODINGS = (
    *("utf-8", "utf-16", "UTF-32", "latin-1", "ascii", "utf-7", "cp037", "shift_jis", "gb18030"),
    *("rot13", "hex", "base64", "zlib", "bz2", "uu", "idna", "punycode", "raw_unicode_escape"),
    *("unicode_escape", "undefined", "mbcs", "utf-8-sig", "none", "..", "x" * 200, "\xe9"),
)


def _some_text(rng: Random) -> bytes:
    return rng.choice(TEXTS + NUMBERS).encode("utf-8", "surrogatepass")


# XML


def entity_bomb(rng: Random, data: bytes) -> bytes:
    """Entities that grow, name files, or never end; and DTDs without any."""
    levels = rng.choice((2, 5, 9))
    steps = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, levels))
    laughs = f'<!ENTITY e0 "ha">{steps}'
    doctype = rng.choice(
        (
            f"[{laughs}]",
            '[<!ENTITY e1 SYSTEM "file:///etc/passwd">]',
            '[<!ENTITY % p SYSTEM "http://127.0.0.1:9/x.dtd"> %p; <!ENTITY e1 "x">]',
            'SYSTEM "http://127.0.0.1:9/x.dtd"',
            'PUBLIC "-//X//EN" "file:///dev/zero"',
            f'[<!ENTITY e1 "{"x" * 100_000}">]',
            '[<!ENTITY e1 "&e2;"><!ENTITY e2 "&e1;">]',
            "[<!ELEMENT annotation ANY><!ATTLIST annotation a CDATA 'b'>]",
            "[<!NOTATION n SYSTEM 'n'><!ENTITY e1 SYSTEM 'x' NDATA n>]",
        )
    )
    head, mark, rest = data.partition(b"<annotation>")
    reference = rng.choice((b"", b"&e1;", b"<name>&e1;</name>", b"&e8;&e8;"))
    name = rng.choice(("annotation", "x", "object"))
    return head + f"<!DOCTYPE {name} {doctype}>".encode() + mark + reference + rest


def nest_xml(rng: Random, data: bytes) -> bytes:
    """Elements within elements within elements."""
    depth = rng.choice(DEPTHS)
    name = rng.choice((b"a", b"object", b"annotation", b"part"))
    opening, closing = (b"<" + name + b">") * depth, (b"</" + name + b">") * depth
    if rng.random() < 0.3:
        closing = b""
    at = rng.choice([match.end() for match in _TAG.finditer(data)] or [0])
    return data[:at] + opening + closing + data[at:]


def encode_xml(rng: Random, data: bytes) -> bytes:
    """Declare an encoding, its own or not."""
    name = rng.choice(_ENCODINGS)
    version = rng.choice(("1.0", "1.0", "1.1", "2.0", ""))
    body = data.partition(b"?>")[2] if data.startswith(b"<?xml") else data
    declared = f'<?xml version="{version}" encoding="{name}"?>'.encode("latin-1")
    try:
        coded = body.decode("utf-8", "replace").encode(name) if rng.random() < 0.5 else body
    except Exception:  # not a text encoding, or none that exists
        coded = body
    return declared + coded


def edit_tag(rng: Random, data: bytes) -> bytes:
    """Rename, drop, double or decorate one tag."""
    found = list(_TAG.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    slash, name, rest = match.groups()
    new = rng.choice(
        (
            b"",
            match[0] * 2,
            b"<" + slash + rng.choice(found)[2] + b">",
            b"<" + slash + name.upper() + rest + b">",
            b"<" + slash + name + b" a='1' a='2'" + rest + b">",
            b"<" + name + b" " + b" ".join(b"a%d='x'" % n for n in range(2000)) + b">",
            b"<n:" + name + b" xmlns:n='urn:x'>",
            b"<" + slash + name + b":" + name + b">",
            b"<" + name + b"/>",
            b"<!--" + match[0] + b"-->",
            b"<![CDATA[" + match[0] + b"]]>",
            b"<?" + name + b" x?>",
            b"<" + _some_text(rng) + b">",
        )
    )
    return data[: match.start()] + new + data[match.end() :]


def edit_xml_text(rng: Random, data: bytes) -> bytes:
    """Replace the text of one element."""
    found = list(_TEXT.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    references = (b"&#0;", b"&#x110000;", b"&#10;", b"&#27;", b"&lt;", b"&nbsp;", b"&e1;", b"\xff")
    new = rng.choice((_some_text(rng), _some_text(rng), rng.choice(references)))
    return data[: match.start(1)] + new + data[match.end(1) :]


def move_leaf(rng: Random, data: bytes) -> bytes:
    """Drop, double or move an element."""
    found = list(_LEAF.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    rest = data[: match.start()] + data[match.end() :]
    at = rng.choice([place.end() for place in _TAG.finditer(rest)] or [0])
    moved = match[0] * rng.choice((0, 1, 2, 500))
    return rest[:at] + moved + rest[at:]


XML: tuple[Mutator, ...] = (entity_bomb, nest_xml, encode_xml, edit_tag, edit_xml_text, move_leaf)

# JSON

_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63, 2**64, 10**400),
    *(float("nan"), float("inf"), -float("inf"), "", "0", "1", "a", [], {}, [[]], [None], [1, 2]),
    *([[1, 2, 3, 4]], [[1, 2], [3]], {"a": 1}, {"": {}}, [[[0]]], [True], ["x"] * 3, [1e999]),
    *(["\ud800"], "\x1b[31m", "../../evil", "a" * 3000, [0] * 3000, {"__class__": "os"}),
)


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nodes of a parsed JSON below the root."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    else:
        return found
    for key, child in children[:200]:
        found += [(*path, key), *_nodes(child, (*path, key))]
    return found


def edit_tree(rng: Random, data: bytes) -> bytes:
    """Replace, drop, double, wrap or rename a node of the tree."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        paths = _nodes(tree)
        if not paths:
            return json.dumps(rng.choice(_STRANGE)).encode()  # the root is no container
        *parents, key = rng.choice(paths)
        node = tree
        for parent in parents:
            node = node[parent]
        _edit_node(rng, node, key)
    if rng.random() < 0.03:
        tree = rng.choice(([tree], {"a": tree}, rng.choice(_STRANGE)))
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def _edit_node(rng: Random, node: Any, key: Any) -> None:
    value, kind = node[key], rng.randrange(10)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = [value]
    elif kind == 2:
        node[key] = rng.choice(TEXTS)
    elif kind == 3 and isinstance(value, int | float):
        node[key] = value * rng.choice((-1, 0, 2, 0.5, 10**6, 10**18)) + rng.choice((0, 1, -1))
    elif kind == 4 and isinstance(node, dict):
        node[rng.choice((str(key).upper(), f"{key} ", *TEXTS))] = node.pop(key)
    elif kind == 5 and isinstance(node, list):
        node.extend([value] * rng.choice((1, 2, 300)))
    elif kind == 6 and isinstance(value, str):
        node[key] = rng.choice((f"{value}\n", value[:-1], value.upper(), f"../{value}", 7))
    else:
        node[key] = copy.deepcopy(rng.choice(_STRANGE))


def nest_json(rng: Random, data: bytes) -> bytes:
    """Brackets within brackets."""
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")))
    at = rng.choice([n for n, byte in enumerate(data[:50_000]) if byte in b":,["] or [0])
    inner = rng.choice((b"1", b"[]", b""))
    return data[: at + 1] + opening * depth + inner + closing * depth + data[at + 1 :]


def edit_json_text(rng: Random, data: bytes) -> bytes:
    """Change what no tree shows: double keys, comments, escapes, several values."""
    at = rng.choice([n for n, byte in enumerate(data[:50_000]) if byte in b':,[{"'] or [0])
    new = rng.choice(
        (
            *(b'"boxes": 1,', b'"task": "x",', b"// x\n", b"/* */", b"NaN,", b"-Infinity,", b","),
            *(b'"\\ud800"', b'"\\u0000"', b"'a'", b"undefined", b"1e99999,", b"\xff", b"[", b"}"),
            *(b"-" + b"9" * 5000 + b",", b'"wids_version": 1,', b"True", b"\x00", b"0x10,"),
        )
    )
    return data[:at] + new + data[at:] + rng.choice((b"", b"", b"{}", b"\n[]", data))


JSON: tuple[Mutator, ...] = (edit_tree, edit_tree, edit_tree, nest_json, edit_json_text)

# YAML

_YAML_VALUES = (
    '!!python/object/apply:os.system ["touch EVIL"]',
    "!!python/object/new:os.system [touch EVIL]",
    "!!python/object/apply:builtins.open [EVIL, w]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!map [1]",
    "!!seq {a: 1}",
    "!!int abc",
    "!!int ''",
    "!!float x",
    "!!bool perhaps",
    "!!null x",
    "!!binary '====='",
    "!!binary '\u00e9'",
    "!!timestamp 2001-99-99",
    "2001-99-99",
    "2001-01-01T99:99:99Z",
    "2001-12-14t21:59:43.10-99:00",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!unknown x",
    "!<tag:yaml.org,2002:python/name:os.system> x",
    "&a [*a, *a]",
    "&a {k: *a}",
    "*missing",
    "{? [a, b] : c}",
    "{? {a: b} : c}",
    "? [x]",
    "<<: 3",
    "{<<: [1, 2]}",
    "{<<: {epochs: 3}}",
    "190:20:30",
    "1:99:99.5",
    "0x",
    "0b",
    "-.inf",
    ".nan",
    "~",
    "no",
    "=",
    "<<",
    "'",
    '"\\x"',
    '"\\ud800"',
    "|9\n  x",
    ">-\n\n x",
    "@at",
    "%x",
    "[1, 2",
    "{a: ",
    "- - - 1",
    "1e-3",
    "0o7",
    "\t x",
    "\x85",
    "[" * 50 + "]" * 50,
)


def yaml_value(rng: Random, data: bytes) -> bytes:
    """Give a key a value that means something special."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key = lines[at].partition(b":")[0]
    value = rng.choice((rng.choice(_YAML_VALUES), rng.choice(NUMBERS), rng.choice(TEXTS)))
    lines[at] = key + b": " + value.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def yaml_bomb(rng: Random, data: bytes) -> bytes:
    """Aliases that grow, or merge keys that do."""
    levels, width = rng.choice(((3, 9), (9, 9), (26, 9), (8, 3)))
    names = [f"a{n}" for n in range(levels)]
    if rng.random() < 0.5:
        lines = ["a0: &a0 [x, x]"]
        for before, name in itertools.pairwise(names):
            lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * width)}]")
    else:
        lines = ["a0: &a0 {x: 1}"]
        for before, name in itertools.pairwise(names):
            lines.append(f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * width)}]}}")
    bomb = "\n".join(lines).encode()
    use = rng.choice((b"", b"\nname: *%s" % names[-1].encode(), b"\noptim: *a1", b"\n<<: *a0"))
    return rng.choice((bomb + use + b"\n" + data, data + b"\n" + bomb + use))


def nest_yaml(rng: Random, data: bytes) -> bytes:
    """Sequences within sequences, mappings within mappings."""
    depth = rng.choice((3, 99, 400, 2000, 20_000))
    nested = rng.choice(
        (
            b"[" * depth + b"]" * depth,
            b"{a: " * depth + b"}" * depth,
            b"- " * depth + b"x",
            b"? " * depth + b"x",
            b"[" * depth,
        )
    )
    return data + rng.choice((b"\nname: ", b"\noptim: ", b"\n")) + nested


def yaml_document(rng: Random, data: bytes) -> bytes:
    """Directives, several documents, tabs, line ends."""
    return rng.choice(
        (
            b"%YAML 9.9\n---\n" + data,
            b"%TAG ! tag:yaml.org,2002:python/\n---\n" + data,
            data + b"\n---\n" + data,
            data + b"\n...\n" + data,
            data.replace(b"  ", b"\t"),
            data.replace(b"\n", b"\r"),
            b"[" + data + b"]",
            data.replace(b": ", b":"),
            data.replace(b"  ", b" "),
            b"- " + data.replace(b"\n", b"\n- "),
        )
    )


YAML: tuple[Mutator, ...] = (
    yaml_value,
    yaml_value,
    yaml_value,
    yaml_bomb,
    nest_yaml,
    yaml_document,
)

"""Recipes: YAML files and `--section.key value` flags become a checked `TrainConfig`.

One path checks both sources: the flags are merged over the YAML file's tree, and one coercion turns
it into the dataclasses of config.py. Unknown keys, wrong types and values outside their range are
refused with one line that names the key and the cure.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mbv3dist.config import TrainConfig, check_config, show_value
from mbv3dist.messages import one_line, shown

# Far more than any recipe has: a small file must not become a large one when it is read.
_MAX_BYTES = 256 * 1024
_MAX_ALIASES = 1000
_MAX_KEYS = 1000  # of a mapping, merged ones included
_MAX_REASON = 300  # characters of what PyYAML says


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing keys that appear twice, and aliases that grow without end."""

    _num_aliases = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = node.start_mark.line + 1
                    raise yaml.YAMLError(f"key {shown(key.value)} appears twice (line {line})")
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._num_aliases += 1
            if self._num_aliases > _MAX_ALIASES:
                raise yaml.YAMLError(f"more than {_MAX_ALIASES} aliases (*name)")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.YAMLError(f"a mapping has more than {_MAX_KEYS} keys")


def _load_yaml(text: str) -> Any:
    """The value of a YAML text; whatever is wrong with it is a ValueError with the reason."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError("values are nested too deep") from None
    except Exception as error:  # PyYAML's constructors raise nearly anything: KeyError, IndexError
        reason = one_line(str(error), _MAX_REASON)
        if not isinstance(error, yaml.YAMLError):
            reason = f"a value is not what its tag says ({reason or type(error).__name__})"
        raise ValueError(reason) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies `--section.key value` overrides.

    Args:
        path: YAML file.
        overrides: command line words such as `["--optim.lr", "0.01", "--epochs=5"]`.

    Raises:
        ValueError: unknown key, wrong type or value out of range; the message names the key.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; a YAML file comes first, flags after it")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path}: not a valid recipe: larger than {_MAX_BYTES >> 10} KiB")
    try:
        tree = _load_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a valid recipe: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path}: a recipe is a mapping of keys, got {type(tree).__name__}")
    merged = _merge(tree, _parse_overrides(overrides))
    merged.setdefault("name", path.stem)
    config: TrainConfig = _build(TrainConfig, merged, where="", source=str(path))
    check_config(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values that YAML and JSON can hold."""
    return {
        key: config_to_dict(value)
        if dataclasses.is_dataclass(value)
        else (list(value) if isinstance(value, tuple) else value)
        for key in (f.name for f in dataclasses.fields(config))
        for value in [getattr(config, key)]
    }


def config_help() -> str:
    """All keys with type, default and meaning, for `mbv3dist train --help`."""
    lines: list[str] = []

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[entry.name]):
                walk(hints[entry.name], f"{prefix}{entry.name}.")
            else:
                lines.append(
                    f"  --{prefix}{entry.name} {_type_name(hints[entry.name])}\n"
                    f"        {entry.metadata['doc']} (default: {show_value(entry.default)})"
                )

    walk(TrainConfig, "")
    return "\n".join(lines)


def _parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{shown(word)}: expected a flag such as --optim.lr 0.01")
        key, separator, text = word[2:].partition("=")
        key = one_line(key)
        if len(key) > 100:
            raise ValueError(f"{shown(word)}: no key has so long a name")
        several = False
        if not separator:
            values = []
            while remaining and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
            if not values:
                raise ValueError(f"--{key}: a value is missing, for instance --{key} VALUE")
            text = values[0] if len(values) == 1 else " ".join(values)
            several = len(values) > 1
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"--{key}: {parent} is a value, not a section")
        try:
            value = [_load_yaml(v) for v in values] if several else _load_yaml(text)
        except ValueError:
            value = text
        node[leaf] = _Text(text, value, tuple(values) if several else (text,))
    return tree


@dataclass(frozen=True)
class _Text:
    """A value from the command line: a string field keeps its exact letters."""

    text: str
    value: Any
    words: tuple[str, ...]  # as the shell gave them

    def __repr__(self) -> str:
        return repr(self.text)


def _merge(base: Mapping[Any, Any], extra: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _build(cls: type, tree: Any, *, where: str, source: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: {where.rstrip('.')} is a section of keys, got {shown(tree)}")
    hints = typing.get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            given = shown(key).strip("'")
            near = difflib.get_close_matches(given, names, n=1, cutoff=0.0)
            raise ValueError(
                f"{source}: unknown key {where}{given}; did you mean {where}{near[0]}?"
            )
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(
                typing.cast(type, hints[key]), value, where=f"{where}{key}.", source=source
            )
        else:
            try:
                values[key] = _coerce(value, hints[key])
            except (TypeError, ValueError, OverflowError):
                given = shown(value.text if isinstance(value, _Text) else value)
                raise ValueError(
                    f"{source}: {where}{key} = {given}: expected {_type_name(hints[key])}"
                ) from None
    return cls(**values)


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(a) or "''" for a in args)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(a) for a in args)
    if origin is tuple:
        return f"[{_type_name(args[0])}, ...]"
    return "none" if hint is type(None) else str(hint.__name__)


def _coerce(value: Any, hint: Any) -> Any:
    """The value as the field's type, or TypeError/ValueError. `1e-3` is a string in YAML 1.1."""
    if isinstance(value, _Text) and hint == tuple[str, ...]:
        # Names keep their letters: `2007` is no number here. A YAML list may be given too.
        value = (
            value.value if isinstance(value.value, list) and len(value.words) == 1 else value.words
        )
    if isinstance(value, _Text):
        value = value.text if hint is str and not isinstance(value.value, list) else value.value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        value = "no" if value is False and "no" in args else value  # YAML reads `no` as False
        value = "" if value is None else value
        if value not in args:
            raise ValueError(value)
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value in (None, "none") else _coerce(value, args[0])
    if origin is tuple:
        items = [value] if isinstance(value, int | float) else value
        if isinstance(value, str) and args[0] is str:
            items = [value] if value else []
        if not isinstance(items, list | tuple):
            raise TypeError(value)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(value)
        return tuple(_coerce(item, args[0]) for item in items)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(value)
        return number
    if hint is str and value is None:
        return ""
    if hint is int and type(value) is int and value.bit_length() > 64:
        raise ValueError(value)
    if type(value) is hint:
        return value
    raise TypeError(value)

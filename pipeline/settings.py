"""What a config class is made of: fields that are YAML keys and flags at the same time, and reading them.

A field made by `setting` is at the same time a YAML key, a flag of the command line and a row
of its `--help`. The order of precedence is flag, YAML file, default.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.errors import ConfigError
from pipeline.files import at_home
from pipeline.redaction import without_secrets
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

Config = TypeVar("Config", bound="Settings")
_REQUIRED: Any = object()
COMPUTED_IN = ("float32", "bfloat16", "float16")
"""Types that a model's body may be computed in."""
SEEDS = 1 << 32
"""numpy's number of seeds, the fewest."""


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    flag: str = "",
    argument: bool = False,
    words: Mapping[str, Any] = types.MappingProxyType({}),
    former: bool = False,
) -> Any:
    """A field of a config class. `flag` names its option where that differs from the field's name.

    `words` are names that may be given for certain values. A folder that may also be the URL of an object
    store is a Store. A `former` setting is taken where an earlier version wrote it down, and `--help` has it no more.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "argument": argument, "words": words, "former": former}
    metadata["required"] = default is _REQUIRED
    return field(default=None if default is _REQUIRED else default, metadata=metadata)


def required(help: str, *, choices: tuple[str, ...] = (), flag: str = "", argument: bool = False) -> Any:
    """A setting without a default."""
    return setting(_REQUIRED, help, choices=choices, flag=flag, argument=argument)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all config classes."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            kind, several = value_type(hints[spec.name])
            value = getattr(self, spec.name)
            if several and not isinstance(value, tuple) and (value is not None or not spec.metadata["required"]):
                value = () if value is None else (value,)
            value = _expanded(value, kind)
            object.__setattr__(self, spec.name, value)
            if value is None and spec.metadata["required"]:
                raise ConfigError(f"{flag_of(spec)} is missing; give it as a flag or as `{spec.name}:` in the file.")
            choices = spec.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{spec.name} is {value!r}; choose one of: {', '.join(choices)}.")
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the values do not make sense, alone or together."""

    def at_least(self, name: str, minimum: float) -> None:
        """Raise ConfigError if a field is given and is less, or not finite."""
        value = getattr(self, name)
        if value is not None and not (value >= minimum and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}; it must be at least {minimum}.")

    def seed_fits(self, name: str = "seed") -> None:
        """Raise ConfigError unless a seed is one that torch, numpy and transformers all take."""
        value = getattr(self, name)
        if not 0 <= value < SEEDS:
            raise ConfigError(f"{name} is {value}; it must lie in [0, {SEEDS - 1}].")

    def positive(self, name: str, values: tuple[float, ...]) -> None:
        """Raise ConfigError, which names the field, if a value is not above 0 and finite."""
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value}; a {name.rstrip('s')} must be a finite number above 0.")


def load_config(config_class: type[Config], path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings in the YAML file at `path`, with `overrides` (field names to values) on top."""
    values = _read_yaml(path) if path is not None else {}
    specs = {spec.name: spec for spec in specs_of(config_class)}
    for key in values:
        if key not in specs:
            raise ConfigError(f"{path}: unknown key {key!r}; {_nearest(key, specs)}")
    values |= {key: value for key, value in (overrides or {}).items() if value is not None}
    hints = typing.get_type_hints(config_class)
    where = str(path) if path is not None else "command line"
    values = {key: _meaning(specs[key], value) for key, value in values.items()}
    return config_class(**{key: _convert(f"{where}: {key}", value, hints[key]) for key, value in values.items()})


def resolved(config: Settings) -> dict[str, Any]:
    """The settings as plain YAML and JSON values."""
    return {spec.name: _plain(getattr(config, spec.name)) for spec in dataclasses.fields(config)}


def specs_of(config_class: type[Settings]) -> list[dataclasses.Field[Any]]:
    """The settings of a class as a person should meet them: what is required comes first."""
    return sorted(dataclasses.fields(config_class), key=lambda spec: not spec.metadata["required"])


def flag_of(spec: dataclasses.Field[Any]) -> str:
    """The option or argument that sets a field."""
    if spec.metadata["argument"]:
        return spec.name.upper()
    return spec.metadata["flag"] or f"--{spec.name.replace('_', '-')}"


def value_type(annotation: Any) -> tuple[Any, bool]:
    """The scalar type of a field's annotation, and whether the field takes several."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None)), False
    return annotation, False


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Store):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _expanded(value: Any, kind: type) -> Any:
    """The value with ~ and ~user at the beginning of paths replaced, and with a Store for the path of one."""
    if isinstance(value, tuple):
        return tuple(_expanded(item, kind) for item in value)
    if not isinstance(value, Path):
        return value
    return store_of(value) if kind is Store else at_home(Path(value))


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of equal keys, made to refuse them. A merged key (<<) may be overridden."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; raises ConstructorError at a key that was there before."""
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if first := lines.get((key.tag, key.value)):
                problem = f"the key {key.value!r} is there twice, in lines {first} and {line}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem)
            lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    path = at_home(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of a YAML file with the command's settings.")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.constructor.ConstructorError as exc:
        raise ConfigError(f"{path}: {' '.join(str(exc).split())}.") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(exc).split())}") from exc
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: found a {type(document).__name__}; expected `key: value` lines.")
    return document


def _nearest(key: Any, specs: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key).replace("-", "_"), specs, n=1, cutoff=0.5)
    valid = ", ".join(name for name, spec in specs.items() if not spec.metadata["former"])
    return f"did you mean {close[0]!r}?" if close else f"valid keys are: {valid}."


def _meaning(spec: dataclasses.Field[Any], value: Any) -> Any:
    return spec.metadata["words"].get(value, value) if isinstance(value, str) else value


def _convert(where: str, value: Any, annotation: Any) -> Any:
    kind, several = value_type(annotation)
    if value is None and type(None) in typing.get_args(annotation):
        return None
    if several:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_scalar(where, item, kind) for item in items)
    return _scalar(where, value, kind)


def _scalar(where: str, value: Any, kind: type) -> Any:
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is Store and isinstance(value, str | Path | Store):
        return store_of(value)
    elif kind in (Path, Store):
        fits, kind = isinstance(value, str | Path), Path
        if "://" in str(value):
            shown = without_secrets(str(value))
            raise ConfigError(f"{where} is {shown}; this must be a path on this machine, not a URL.")
    elif kind in (int, float):
        value, fits = _number(value, kind)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ConfigError(f"{where} is {value!r}; expected a value of type {kind.__name__.lower()}.")
    return kind(value)


def _number(value: Any, kind: type) -> tuple[Any, bool]:
    """YAML reads 1e-4 as a string: take any spelling of a number, but no fraction for an integer."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return value, False
    return (number, True) if kind is float else (int(number) if number.is_integer() else value, number.is_integer())

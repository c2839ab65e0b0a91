"""Command-line options made from config classes, so that a setting is stated once."""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.settings import flag_of, load_config, specs_of, value_type
from pipeline.stores.store import Store


def config_command(config_class: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Decorate `command(config)` to take `--config FILE` and one flag a field of `config_class`."""

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        def run(config_path: Path | None, **flags: Any) -> None:
            given = {name: value for name, value in flags.items() if value is not None and value != ()}
            command(load_config(config_class, config_path, given))

        run.__doc__ = command.__doc__
        run.__name__ = command.__name__
        decorated: Callable[..., None] = run
        hints = typing.get_type_hints(config_class)
        for spec in reversed(specs_of(config_class)):
            decorated = _parameter(spec, hints[spec.name])(decorated)
        file = click.Path(path_type=Path)
        return click.option("--config", "config_path", type=file, help="YAML file of settings; flags override it.")(
            decorated
        )

    return decorate


def _parameter(spec: dataclasses.Field[Any], annotation: Any) -> Callable[..., Any]:
    kind, several = value_type(annotation)
    metadata = spec.metadata
    click_type = click.Choice(metadata["choices"]) if metadata["choices"] else _TYPES[kind]
    if metadata["words"]:
        click_type = click.STRING  # load_config converts and checks it
    if metadata["argument"]:
        return click.argument(spec.name, nargs=-1 if several else 1, type=click_type, required=False)
    names = [flag_of(spec)]
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    help_text = f"{metadata['help']}  [{_default(spec, several)}]"
    hidden = metadata["former"]
    return click.option(
        *names, spec.name, type=click_type, default=None, multiple=several, help=help_text, hidden=hidden
    )


_TYPES = {
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    bool: click.BOOL,
    Path: click.Path(),
    Store: click.STRING,
}


def _default(spec: dataclasses.Field[Any], several: bool) -> str:
    default: Any = spec.default
    if spec.metadata["required"]:
        return "required"
    if default is None:
        return "default: none"
    if several:
        return f"default: {', '.join(f'{item}' for item in default) or 'none'}"
    return f"default: {str(default).lower() if isinstance(default, bool) else default}"

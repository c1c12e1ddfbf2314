"""Command-line options for the fields of a configuration, made from the configuration itself.

Name, type and default of an option are the field's; its help is the field's line under `Attributes:` in the docstring.
"""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


def add_fields(parser: argparse.ArgumentParser, config: type["DataclassInstance"], title: str) -> None:
    """Adds an option for every field of a dataclass whose type has a plain written form.

    Fields that are configurations themselves are left to a call of their own. An option that is not given leaves its
    field as it is (see `override`).
    """
    group = parser.add_argument_group(title)
    hints, helps = get_type_hints(config), _attribute_docs(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        flag = "--" + field.name.replace("_", "-")
        shown = "" if field.default in (dataclasses.MISSING, None) else f" (default: {_written(field.default)})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (helps[field.name] + shown).replace("%", "%%")}
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parse, metavar = _parser(hint)
            group.add_argument(flag, type=parse, metavar=metavar, **options)


def override(config: "Config", args: argparse.Namespace) -> "Config":
    """Returns the configuration with those fields replaced that were given on the command line."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if hasattr(args, field.name)}
    return dataclasses.replace(config, **given)


def described(fields: Mapping[str, object]) -> str:
    """Returns the fields of a resolved configuration, one a line."""
    width = max(map(len, fields))
    return "\n".join(f"  {name:<{width}}  {_written(value)}" for name, value in fields.items())


def _written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parser(hint: Any) -> tuple[Callable[[str], Any], str]:
    """Returns how a value of a type is read, and what stands for it in the help."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arm for arm in get_args(hint) if arm is not types.NoneType)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return _choice(choices), "{" + ",".join(choices) + "}"
    if get_origin(hint) is tuple:
        return numbers(int), "N,N,…"
    return hint, {"int": "N", "float": "X"}.get(hint.__name__, "TEXT")


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[Any, ...]]:
    """Returns what reads a list of numbers, such as `28,28,1`."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            what, example = ("integers", "28,28,1") if kind is int else ("numbers", "0.01,0.1")
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what} such as {example}") from None

    return parse


def parse_values(text: str, hint: Any) -> tuple[Any, ...]:
    """Returns the values of a list, each read as a field of that type is.

    Raises:
        ValueError: one of them cannot be read so.
        argparse.ArgumentTypeError: likewise.
    """
    if hint is bool:
        words = {"true": True, "false": False}
        if unknown := [part for part in text.split(",") if part not in words]:
            raise ValueError(f"{unknown[0]!r} is neither true nor false")
        return tuple(words[part] for part in text.split(","))
    parse, _ = _parser(hint)
    return tuple(parse(part) for part in text.split(","))


def _attribute_docs(config: type) -> dict[str, str]:
    """Returns the text of every entry under `Attributes:` in a class's docstring."""
    section = (inspect.getdoc(config) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()).rstrip(".") for name, text in zip(entries[::2], entries[1::2], strict=True)}

"""The methods by name, from the files that teach them. A new method is one file beside these and one line here."""
import importlib
import inspect
import types
import typing
from typing import NamedTuple

FILES = (
    "full",
    "lora",
    "pissa",
    "sorsa",
    "sara",
    "cora",
    "lotr",
)
METHODS = {name: method for file in FILES for name, method in importlib.import_module(file).METHODS.items()}


class Argument(NamedTuple):
    """What the signature of a method's function says of one argument."""
    kind: type  # int, float, bool, str, list (of str), or dict (of numbers, which has no flag)
    choices: tuple  # of a Literal; else empty
    default: object


def method(name):
    """The adapter.Method called `name`, in any case; ValueError lists the names there are."""
    if spelled(name) not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[spelled(name)]


def spelled(name):
    """`name` as METHODS has it, in whatever case it is written; a name that is not there as it is."""
    return next((known for known in METHODS if known.lower() == name.lower()), name)


def arguments(function):
    """{name: Argument} of a method's function (attach, fit, regularize): those with a default and a kind.

    The kind is the annotation's, or without one the default's. `model`, which has no default, and `saved=None`, which
    has no kind, are left out.
    """
    found, hints = {}, typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, type(parameter.default))
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:  # float | None
            kinds = set(typing.get_args(hint)) - {types.NoneType}
            if len(kinds) != 1:
                raise ValueError(f"the argument {name} of {function.__module__}.{function.__name__} is {hint}: one "
                                 "kind, or one and None, is what a flag can have")
            hint, = kinds
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        kind = type(choices[0]) if choices else list if hint is tuple else typing.get_origin(hint) or hint
        if parameter.default is not parameter.empty and kind in (int, float, bool, str, list, dict):
            found[name] = Argument(kind, choices, parameter.default)
    return found

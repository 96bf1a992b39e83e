"""One wording for every configuration error: the field, the value found, what was expected."""

import math
import types
import typing
from typing import Any


def require(holds: bool, field: str, value: Any, expected: str) -> None:
    """Raises ValueError `field is value, expected ...` unless `holds`."""
    if not holds:
        raise ValueError(f"{field} is {value!r}, expected {expected}")


def require_at_least(section: str, config: Any, minimum: int, *names: str) -> None:
    """Raises ValueError for the first of the fields `names` of `config` that is below `minimum`."""
    for name in names:
        value = getattr(config, name)
        holds = value >= minimum and math.isfinite(value)
        require(holds, f"{section}.{name}", value, f"a number of at least {minimum}")


def require_types(section: str, config: Any) -> None:
    """Raises ValueError for the first field of the dataclass `config` that its type excludes.

    Config files are Python: without this, steps=100.0 and paths="a.txt" would be found late.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        require(_fits(value, hint), f"{section}.{name}", value, f"a value of type {_spell(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def require_one_of(field: str, value: str, *choices: str) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    require(value in choices, field, value, "one of " + ", ".join(choices))

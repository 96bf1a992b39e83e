"""Numbers with a unit and a source, as TOML files give them. Imports no JAX.

    memory_bytes_per_second = { value = 3.35, unit = "TB/s", source = "NVIDIA, H100 data sheet" }

What a field holds is in its name's end (`_seconds`, `_bytes_per_second`); a field with none of
these ends is a bare count or share and has no unit.
"""

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import require

_DECIMAL = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}


def _prefixed(unit: str, *prefixes: str) -> dict[str, Decimal]:
    return {f"{prefix}{unit}": Decimal(10) ** _DECIMAL[prefix] for prefix in prefixes}


_BYTES = _prefixed("B", "", "K", "M", "G", "T") | {
    f"{prefix}iB": Decimal(1024) ** power for power, prefix in enumerate("KMGT", start=1)
}
UNITS: dict[str, dict[str, Decimal]] = {  # by the end of a field's name, the longest ends first
    "_bytes_per_second": {f"{unit}/s": size for unit, size in _BYTES.items()}
    | {f"{unit}/s": size / 8 for unit, size in _prefixed("bit", "M", "G", "T").items()},
    "_flops_per_second": _prefixed("FLOP/s", "G", "T", "P"),
    "_dollars_per_hour": {"$/h": Decimal(1)},
    "_seconds": {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")},
    "_bytes": _BYTES,
    "_ghz": {"GHz": Decimal(1)},
}


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table, its fractions exact. ValueError if it is missing or no TOML."""
    require(path.is_file(), "file", str(path), "a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}, expected TOML") from None


def read_quantity(where: str, field: str, given: Any, kind: type) -> tuple[Any, str]:
    """(value in the field's own unit, source) of `{ value, unit, source }`.

    ValueError names the field for a missing source, an unknown unit, or no positive number.
    """
    name = f"{where}: {field}"
    units = next((units for end, units in UNITS.items() if field.endswith(end)), {})
    keys = ("value", "unit", "source") if units else ("value", "source")
    holds = isinstance(given, Mapping) and set(given) == set(keys)
    require(holds, name, _plain(given), f"{{ {', '.join(f'{key} = ...' for key in keys)} }}")
    value, source = given["value"], given["source"]
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    require(is_number and value > 0, f"{name}.value", _plain(value), "a positive number")
    holds = isinstance(source, str) and bool(source.strip())
    require(holds, f"{name}.source", _plain(source), "where the number is from")
    if units:
        unit = given["unit"]
        require(unit in units, f"{name}.unit", _plain(unit), f"one of {', '.join(units)}")
        value = Decimal(value) * units[unit]
    whole = value == int(value)
    require(kind is float or whole, f"{name}.value", _plain(given["value"]), "a whole number")
    return kind(value), source


def _plain(value: Any) -> Any:
    """`value` as an error shows it: Decimal's own repr says nothing to a reader."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return float(value) if isinstance(value, Decimal) else value

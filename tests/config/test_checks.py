"""The one wording of configuration errors, and the types of a section's fields."""

import math
from dataclasses import dataclass

import pytest

from dsv3_jax.config.checks import require, require_at_least, require_one_of, require_types


@dataclass(frozen=True, kw_only=True)
class Section:
    """Stands in for a section: theirs are refused by the annotation checks of the tests."""

    steps: int = 1
    rate: float = 0.5
    name: str = "a"
    shuffle: bool = True
    paths: tuple[str, ...] = ()
    weight: float | None = None


def test_wording(assert_refused):
    assert_refused(lambda: require(False, "a.b", "x", "y"), "a.b", "x", "y")
    assert_refused(lambda: require_one_of("a.b", "x", "y", "z"), "a.b", "x", "one of y, z")
    require(True, "a.b", "x", "y")
    require_one_of("a.b", "y", "y", "z")


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_at_least_names_the_first_wrong_field(assert_refused, rate):
    section = Section(rate=rate)
    rule = "a number of at least 0"
    assert_refused(
        lambda: require_at_least("train", section, 0, "steps", "rate"), "train.rate", rate, rule
    )
    require_at_least("train", section, 1, "steps")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("steps", 100.0, "int"),
        ("steps", "100", "int"),
        ("steps", True, "int"),
        ("steps", None, "int"),
        ("rate", "1e-3", "float"),
        ("rate", True, "float"),
        ("name", 3, "str"),
        ("shuffle", 1, "bool"),
        ("paths", "a.txt", "tuple[str, ...]"),
        ("paths", ["a.txt"], "tuple[str, ...]"),
        ("paths", (3,), "tuple[str, ...]"),
        ("weight", "1", "float | None"),
    ],
)
def test_types_are_checked(assert_refused, name, value, kind):
    section = Section(**{name: value})
    rule = f"a value of type {kind}"
    assert_refused(lambda: require_types("train", section), f"train.{name}", value, rule)


@pytest.mark.parametrize("fields", [{}, {"rate": 1}, {"weight": 2}, {"paths": ("a", "b")}])
def test_types_that_fit(fields):
    require_types("train", Section(**fields))

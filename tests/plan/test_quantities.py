"""Units are what they say, and a number without unit or source is refused by its name."""

from decimal import Decimal

import pytest

from dsv3_jax.plan.quantities import read_quantity, read_toml


@pytest.mark.parametrize(
    ("field", "value", "unit", "expected"),
    [
        ("memory_bytes", Decimal("80"), "GB", 80_000_000_000),
        ("memory_bytes", 1, "GiB", 1_073_741_824),
        ("l2_bytes", 50, "MiB", 52_428_800),
        ("network_bytes_per_second", 400, "Gbit/s", 50_000_000_000),
        ("network_bytes_per_second", Decimal("3.35"), "TB/s", 3_350_000_000_000),
        ("bf16_flops_per_second", Decimal("989.4"), "TFLOP/s", 989_400_000_000_000),
        ("fp8_flops_per_second", Decimal("4.5"), "PFLOP/s", 4_500_000_000_000_000),
    ],
)
def test_units(field, value, unit, expected):
    given = {"value": value, "unit": unit, "source": "data sheet"}
    assert read_quantity("gpu.toml", field, given, int) == (expected, "data sheet")


def test_seconds_are_fractions():
    given = {"value": Decimal("3.7"), "unit": "us", "source": "Table 5"}
    assert read_quantity("c", "network_latency_seconds", given, float) == (3.7e-6, "Table 5")
    assert read_quantity("c", "nodes", {"value": 4, "source": "x"}, int) == (4, "x")


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("memory_bytes", {"value": 1, "unit": "GB/s", "source": "x"}, r"unit is 'GB/s', expected"),
        (
            "memory_bytes",
            {"value": 1, "unit": "gb", "source": "x"},
            "one of B, KB, MB, GB, TB, KiB",
        ),
        ("memory_bytes", {"value": 1, "unit": "GB"}, "expected { value = ..., unit = ..., source"),
        (
            "memory_bytes",
            {"value": 1, "unit": "GB", "source": " "},
            "source is ' ', expected where",
        ),
        ("memory_bytes", 80, "memory_bytes is 80, expected { value"),
        (
            "memory_bytes",
            {"value": 0, "unit": "GB", "source": "x"},
            "0, expected a positive number",
        ),
        ("memory_bytes", {"value": True, "unit": "GB", "source": "x"}, "expected a positive"),
        ("nodes", {"value": 1, "unit": "GB", "source": "x"}, "expected { value = ..., source"),
        ("nodes", {"value": Decimal("1.5"), "source": "x"}, "1.5, expected a whole number"),
    ],
)
def test_what_is_wrong_is_named(field, given, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")) as error:
        read_quantity("mine.toml", field, given, int)
    assert str(error.value).startswith(f"mine.toml: {field}")


def test_no_toml(tmp_path):
    with pytest.raises(ValueError, match="expected a TOML file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ValueError, match=r"bad\.toml: .* expected TOML"):
        read_toml(tmp_path / "bad.toml")

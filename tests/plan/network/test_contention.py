"""PCIe shared by tokens and fetched keys and values, against sums done by hand."""

import pytest

from dsv3_jax.plan.network.contention import pcie_bytes_per_second, share_pcie

EP = {"ep_bytes": 40.0, "network_bytes_per_second": 4.0, "pcie": 6.0}  # 10 s alone


def test_pcie_5_by_16():
    """32 GT/s, 16 lanes, 128 of 130 bits: 63.02 GB/s, of which 256 of 280 bytes are payload."""
    assert pcie_bytes_per_second() == pytest.approx(63.0154e9 * 256 / 280, rel=1e-4)
    assert pcie_bytes_per_second(transfers_per_second=16e9) == pytest.approx(28.8e9, rel=1e-3)


def test_even_shares():
    """3 and 3 of 6 until the fetch of 12 ends after 4 s; the 28 left then take 7 s at 4."""
    found = share_pcie(kv_bytes=12.0, **EP)
    assert (found.ep_alone_seconds, found.kv_alone_seconds) == (10.0, 2.0)
    assert found.kv_seconds == pytest.approx(4.0)
    assert found.ep_seconds == pytest.approx(11.0)
    assert found.ep_slowdown == pytest.approx(1.1) and found.kv_slowdown == pytest.approx(2.0)


def test_tokens_first():
    """The fetch has 2 of 6 left: 12 of its bytes in 6 s, and nothing is slower for the tokens."""
    found = share_pcie(kv_bytes=12.0, priority="ep", **EP)
    assert found.ep_slowdown == pytest.approx(1.0)
    assert found.kv_seconds == pytest.approx(6.0)
    longer = share_pcie(kv_bytes=50.0, priority="ep", **EP)  # 20 in 10 s, the other 30 at 6
    assert longer.kv_seconds == pytest.approx(15.0)


def test_fetch_first():
    """The fetch takes all 6 for 2 s, in which nothing is received; what is sent goes on."""
    found = share_pcie(kv_bytes=12.0, priority="kv", **EP)
    assert found.kv_slowdown == pytest.approx(1.0)
    assert found.ep_seconds == pytest.approx(12.0)


def test_a_link_wide_enough_for_both():
    """A fetch bound by nothing but its own link: 12 GB/s for 4 + the fetch's rest, 8."""
    found = share_pcie(
        ep_bytes=40.0, kv_bytes=24.0, network_bytes_per_second=4.0, pcie=12.0, priority="none"
    )
    assert found.ep_slowdown == pytest.approx(1.0)
    assert found.kv_seconds == pytest.approx(3.0)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="priority is 'high', expected one of none, ep, kv"):
        share_pcie(kv_bytes=1.0, priority="high", **EP)
    with pytest.raises(ValueError, match=r"kv_bytes is 0\.0, expected above 0"):
        share_pcie(kv_bytes=0.0, **EP)

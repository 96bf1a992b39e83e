"""Latency against Table 5 and DeepEP's low-latency table."""

import pytest

from dsv3_jax.plan.network.latency import LATENCIES, message_seconds


@pytest.mark.parametrize(
    ("link", "switches", "microseconds"),
    [("ib", 1, 2.8), ("ib", 3, 3.7), ("roce", 1, 3.6), ("roce", 3, 5.6), ("nvlink", 0, 3.33)],
)
def test_table_5(link, switches, microseconds):
    """64 bytes, same leaf and across leaves ("Insights", Table 5)."""
    found = message_seconds(link, 64, switches=switches, bytes_per_second=50e9)
    assert found == pytest.approx(microseconds * 1e-6)


def test_a_third_layer_adds_two_switches():
    assert LATENCIES["ib"].first_byte_seconds(5) == pytest.approx(4.6e-6)
    assert LATENCIES["roce"].first_byte_seconds(5) == pytest.approx(7.6e-6)


def test_long_messages_take_their_bytes():
    found = message_seconds("ib", 50e6 + 64, switches=1, bytes_per_second=50e9)
    assert found == pytest.approx(1e-3 + 2.8e-6)


def test_a_proxy_posts_one_after_the_other():
    """1,000 small messages: 1.7 million a second by a proxy, by the GPU as fast as the wire."""
    fields = {"switches": 1, "bytes_per_second": 50e9, "messages": 1000}
    proxy = message_seconds("ib", 64, initiator="proxy", **fields)
    direct = message_seconds("ib", 64, initiator="ibgda", **fields)
    assert proxy == pytest.approx(1000 / 1.7e6 + 2.8e-6)
    assert direct == pytest.approx(999 / 180e6 + 2.8e-6)
    large = message_seconds("ib", 1e6, initiator="proxy", **fields)
    assert large == pytest.approx(1000 * 1e6 / 50e9, rel=1e-3)  # the wire is the slower


def test_nvlink_needs_no_one_to_post():
    fields = {"switches": 0, "bytes_per_second": 160e9, "messages": 10}
    by_proxy = message_seconds("nvlink", 4096, initiator="proxy", **fields)
    direct = message_seconds("nvlink", 4096, initiator="ibgda", **fields)
    assert direct == pytest.approx(3.33e-6 + (10 * 4096 - 64) / 160e9)
    assert by_proxy == direct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"link": "token ring"}, "link is 'token ring', expected one of ib, roce, nvlink"),
        ({"initiator": "dpu"}, "initiator is 'dpu', expected one of ibgda, proxy"),
        ({"switches": -1}, "switches is -1, expected at least 0"),
        ({"messages": 0}, "messages is 0, expected at least 1"),
        ({"message_bytes": 0.0}, "message_bytes is 0.0, expected above 0"),
        ({"bytes_per_second": 0.0}, "bytes_per_second is 0.0, expected above 0"),
    ],
)
def test_what_cannot_be(change, message):
    fields = {"link": "ib", "message_bytes": 64, "switches": 1, "bytes_per_second": 50e9} | change
    with pytest.raises(ValueError, match=message):
        message_seconds(fields.pop("link"), fields.pop("message_bytes"), **fields)

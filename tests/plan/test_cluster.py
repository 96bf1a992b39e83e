"""Clusters are read whole from their files, numbers have sources, errors say what is wrong."""

from dataclasses import replace

import pytest

from dsv3_jax.plan.cluster import (
    DIRECTORY,
    changed,
    cluster_names,
    find_cluster,
    read_cluster,
    read_sources,
)

TEXT = (DIRECTORY / "h800_2048.toml").read_text()


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_is_whole(name):
    cluster = find_cluster(name)
    assert cluster.name == name
    assert cluster.gpu.gpus_per_node == cluster.gpus_per_node
    for link in (cluster.nvlink, cluster.network, cluster.pcie):
        assert 0 < link.achieved_bytes_per_second <= link.bytes_per_second
    sources = read_sources(DIRECTORY / f"{name}.toml")
    assert {"nodes", "planes", "network_latency_seconds"} <= set(sources)
    assert all(len(source) > 3 for source in sources.values())


def test_the_published_clusters():
    h800 = find_cluster("h800_2048")
    assert (h800.num_gpus, h800.planes, h800.gpu_dollars_per_hour) == (2048, 8, 2.0)
    assert h800.network.bytes_per_second == 50e9  # 400 Gbit/s
    assert h800.network.achieved_bytes_per_second == 40e9
    assert h800.nvlink.achieved_bytes_per_second == 160e9
    assert h800.network.latency_seconds == 3.7e-6
    rack = find_cluster("gb200_nvl72")
    assert rack.gpus_per_node == 72
    assert rack.gpu.bf16_flops_per_second * 72 == pytest.approx(180e15)
    assert rack.gpu.memory_bytes_per_second * 72 == pytest.approx(576e12)
    assert rack.gpu.compute_capability == (10, 0)  # the B200's, which it is based on


def test_a_user_s_file(tmp_path):
    path = tmp_path / "mine.toml"
    changes = '[gpu_changes]\nmemory_bytes = { value = 94, unit = "GB", source = "the offer" }\n'
    path.write_text(TEXT.replace('"h800"', '"h100"') + changes)
    cluster = find_cluster(str(path))
    assert cluster.gpu.name == "h100"
    assert cluster.gpu.memory_bytes == 94_000_000_000
    path.write_text(TEXT.replace("nics_per_node = { value = 8", "nics_per_node = { value = 16"))
    assert read_cluster(path).network.bytes_per_second == 100e9  # two NICs a GPU


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('unit = "us"', 'unit = "GB"', r"network_latency_seconds.unit is 'GB', expected one of s"),
        ("planes = {", "plains = {", "plains', expected one of"),
        ("nodes = {", "# nodes = {", "expected nodes as well"),
        ('gpu = "h800"', 'gpu = "h900"', "'h900', expected one of h100"),
        ('"infiniband"', '"token_ring"', "cluster.fabric is 'token_ring', expected one of"),
        ("planes = { value = 8", "planes = { value = 3", "3, expected a divisor of cluster.nics"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, before, after, message):
    path = tmp_path / "mine.toml"
    assert before in TEXT
    path.write_text(TEXT.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        find_cluster(str(path))


def test_unknown_clusters_and_fields():
    with pytest.raises(ValueError, match=r"--cluster is 'mars', expected one of .*h800_2048"):
        find_cluster("mars")
    cluster = find_cluster("h800_node")
    faster = changed(cluster, "gpu.memory_bytes_per_second", "4e12")
    assert faster.gpu == replace(cluster.gpu, memory_bytes_per_second=4e12)
    assert changed(cluster, "cluster.in_network", "codec").in_network == "codec"
    assert changed(cluster, "cluster.communication_sms", "0").communication_sms == 0
    for field, text, message in [
        ("gpu.speed", "1", r"gpu.FIELD is 'speed', expected one of .*bf16_flops_per_second"),
        ("cluster.gpu", "h100", r"cluster.FIELD is 'gpu', expected"),
        ("cluster.nodes", "many", r"cluster.nodes is 'many', expected a number"),
        ("cluster.nodes", "0", r"cluster.nodes is '0', expected a positive number"),
        ("cluster.nodes", "1.5", r"cluster.nodes is '1.5', expected a whole number"),
        ("gpu.clock_ghz", "inf", r"gpu.clock_ghz is 'inf', expected a positive number"),
        ("cluster.communication_sms", "132", "expected from 0 to 131"),
        ("gpu.compute_capability", "9", "expected a field that is one number or text"),
    ]:
        with pytest.raises(ValueError, match=message):
            changed(cluster, field, text)

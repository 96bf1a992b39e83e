"""The GPUs' figures hang together, and XLA is told of the right ones."""

import re

import pytest

from dsv3_jax.plan.hardware import GPUS, find_gpu, target_config


@pytest.mark.parametrize("name", GPUS)
def test_figures_hang_together(name):
    gpu = find_gpu(name)
    assert gpu.name == name
    assert gpu.fp8_flops_per_second == pytest.approx(2 * gpu.bf16_flops_per_second, rel=1e-3)
    assert gpu.tf32_flops_per_second == pytest.approx(gpu.bf16_flops_per_second / 2, rel=0.03)
    # A multiply-add a clock in each of 128 FP32 units of a multiprocessor; B200 may clock less.
    units = 2 * 128 * gpu.multiprocessors * gpu.clock_ghz * 1e9
    assert 1 <= units / gpu.fp32_flops_per_second < 1.01 or name == "b200"
    assert gpu.nvlink_achieved_bytes_per_second == 0.8 * gpu.nvlink_bytes_per_second
    assert gpu.network_achieved_bytes_per_second == 0.8 * gpu.network_bytes_per_second
    per_link = gpu.nvlink_bytes_per_second / gpu.nvlink_links
    assert per_link == (50e9 if name == "b200" else 25e9)  # NVLink 5 and 4, one way
    assert gpu.gpus_per_node == 8


def test_h800_is_an_h100_with_less_nvlink():
    h100, h800 = find_gpu("h100"), find_gpu("h800")
    assert h800.bf16_flops_per_second == h100.bf16_flops_per_second
    assert h800.memory_bytes == h100.memory_bytes
    assert (h800.nvlink_bytes_per_second, h800.nvlink_achieved_bytes_per_second) == (200e9, 160e9)
    assert (h800.network_bytes_per_second, h800.network_achieved_bytes_per_second) == (50e9, 40e9)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match=r"'a100', expected one of h100, h200, h800, b200$"):
        find_gpu("a100")


@pytest.mark.parametrize("name", GPUS)
def test_target_config_has_the_gpu_s_figures(name):
    gpu, text = find_gpu(name), target_config(find_gpu(name))
    fields = dict(re.findall(r"^  (\w+): (.+)$", text, re.MULTILINE))
    assert int(fields["core_count"]) == gpu.multiprocessors
    assert int(fields["device_memory_size"]) == gpu.memory_bytes
    assert int(fields["memory_bandwidth"]) == gpu.memory_bytes_per_second
    major, minor = gpu.compute_capability
    assert f"major: {major}\n    minor: {minor}\n" in text
    assert f"active_links: {gpu.nvlink_links} " in text
    assert text.count("{") == text.count("}")
    assert text.count(f'"{gpu.device_name}"') == 2

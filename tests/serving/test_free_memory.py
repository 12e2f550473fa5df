"""Free memory, by the kernel and by a container's limit."""

import pytest
import torch

from fairseq_moe_ext.serving.free_memory import free_bytes, free_host_bytes


def files(tmp_path, **container):
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\nHugePages: 0\n")
    for name, text in container.items():
        (tmp_path / f"memory.{name}").write_text(text)
    return tmp_path / "meminfo", tmp_path


@pytest.mark.parametrize("container, kilobytes", [
    ({}, 1000),
    ({"max": "max", "current": "5", "stat": "inactive_file 0"}, 1000),
    ({"max": str(900 * 1024), "current": str(700 * 1024), "stat": f"anon 4\ninactive_file {100 * 1024}"}, 300),
    ({"max": str(9000 * 1024), "current": "0", "stat": "inactive_file 0"}, 1000),
    ({"max": "100", "current": "200", "stat": "inactive_file 0"}, 0),
    ({"max": "100"}, 1000),
])
def test_the_smaller_of_two_limits(tmp_path, container, kilobytes):
    assert free_host_bytes(*files(tmp_path, **container)) == kilobytes * 1024


def test_free_bytes_of_this_machine_are_plausible():
    before = free_bytes(torch.device("cpu"))
    assert 1 << 26 < before < 1 << 50

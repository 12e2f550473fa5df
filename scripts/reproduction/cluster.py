"""Devices, and the network that joins them: how long an exchange of every rank with every other takes.

Legend: R = ranks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class Device:
    """flops: operations a second; memory: bytes a second; element: bytes of a number."""

    name: str
    flops: float
    memory: float
    element: int


@dataclass(frozen=True)
class Network:
    """Bytes a second, one direction. nvlink: of a rank to the ranks of its node; pcie: of a rank to the node's ports;
    network: of a node to all others. latency: seconds of an exchange of nothing; message: seconds for every other rank.
    """

    nvlink: float
    pcie: float
    network: float
    latency: float
    message: float = 0.0
    ranks_per_node: int = 8

    def exchange(self, sent: np.ndarray) -> float:
        """Seconds until all of `sent` (R, R) bytes, from a row's rank to a column's, have arrived.

        The busiest rank or node, in or out, sets the time; what stays on a rank costs nothing.
        """
        ranks = len(sent)
        if ranks == 1:
            return 0.0
        node = np.arange(ranks) // self.ranks_per_node
        inside = node[:, None] == node[None, :]
        away = sent * ~inside
        near = sent * inside
        near = near - np.diag(np.diag(near))
        times = [_busiest(near) / self.nvlink, _busiest(away) / self.pcie]
        leaving = np.zeros((node[-1] + 1, node[-1] + 1))
        np.add.at(leaving, (node[:, None], node[None, :]), away)
        times.append(_busiest(leaving) / self.network)
        return max(times) + self.latency + self.message * (ranks - 1)


def _busiest(sent: np.ndarray) -> float:
    return float(max(sent.sum(axis=0).max(), sent.sum(axis=1).max()))


@dataclass(frozen=True)
class System:
    """A device and its network; sources: where the figures come from."""

    title: str
    device: Device
    network: Network
    sources: tuple[str, ...]


@functools.cache
def systems() -> Mapping[str, System]:
    """`paper` and `today`, as hardware.json has them."""
    content = json.loads(Path(__file__).with_name("hardware.json").read_text(encoding="utf-8"))
    found = {}
    for key, each in content["systems"].items():
        network = Network(*(each[name] for name in ("nvlink", "pcie", "network", "latency")))
        device = Device(each["title"], each["flops"], each["memory"], each["element"])
        found[key] = System(each["title"], device, network, tuple(content["sources"][name] for name in each["from"]))
    return MappingProxyType(found)

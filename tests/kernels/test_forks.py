"""A process that has computed with several threads forks; its child computes, too, and does not wait for ever."""

import os
import sys
from pathlib import Path

import processes
import pytest

from fairseq_moe_ext.kernels.cpu_kernel import load_kernel

TESTS = Path(__file__).resolve().parents[1]
# a parent that computes, then its child, whose exit code is the program's; `seconds` until the child is given up
PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
{setup}
wanted = compute()
child = os.fork()
if child == 0:
    # with one thread, by which PyTorch's products round differently
    os._exit(0 if torch.allclose(compute(), wanted, rtol=1e-5, atol=1e-5) else 3)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, signal.SIGKILL)
sys.exit("the child hangs")
"""
LAYER = """
torch.set_num_threads(2)
from cases import Case
case = Case(rows=8, positions=8, model_dim=64, hidden_dim=64, num_experts=8)
layer, (x, mask) = case.layer().requires_grad_(False), case.batch()
layer.prepare_for_serving(0)
def compute():
    return layer(x, mask) + (torch.ones(400, 400) @ torch.ones(400, 400)).mean()
"""
KERNEL = """
from fairseq_moe_ext.kernels.grouped_mlp import grouped_mlp
from fairseq_moe_ext.kernels.offsets import Offsets
torch.set_num_threads(2)  # of which PyTorch itself uses none here, so that the child may have two as well
rows, weight, bias = torch.randn(16, 64), torch.randn(8, 64, 64), torch.randn(8, 64)
def compute():
    return grouped_mlp("loop", rows, Offsets.of_counts([2] * 8), None, (weight, bias, weight, bias), torch.relu)
"""
BUFFER = """
import copy
from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.store import HostStore
from fairseq_moe_ext.experts.resident import ResidentExperts
experts = ResidentExperts(8, 16, 32).eval().requires_grad_(False)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter)
buffered = BufferedExperts(8, 16, 32, policy="lru", order="ascending", make_store=HostStore).eval()
buffered.load_state_dict(experts.state_dict())
buffered.start(2)
rows = torch.randn(16, 16)
def compute():
    return buffered(rows, [2] * 8)
"""
UNDER_WAY = """
import threading
from fairseq_moe_ext.buffering.copy_lane import CopyLane
slot, lock = torch.zeros(3), threading.Lock()
lane = CopyLane(torch.device("cpu"), [slot])
def copy():
    with lock:
        time.sleep(0.5)
        slot.fill_(1)
    return 1
copying = lane.start(copy)
def compute():
    if os.getpid() != parent:  # the copy had arrived, its lock is free, and another one runs
        assert copying.done() and slot.sum() == 3 and lock.acquire(timeout=5)
        lock.release()
        lane.finish(lane.start(copy))
    return torch.ones(1)
parent = os.getpid()
"""


@pytest.mark.parametrize("setup", [LAYER, KERNEL, BUFFER, UNDER_WAY], ids=["layer", "kernel", "buffer", "under way"])
def test_a_forked_child_computes_what_its_parent_did(setup):
    if setup in (KERNEL, BUFFER) and load_kernel() is None:
        pytest.skip("without the C kernel these are PyTorch's products, which hang in a fork by themselves")
    text = PROGRAM.format(tests=str(TESTS), setup=setup)
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "2"}
    done = processes.run([sys.executable, "-c", text], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

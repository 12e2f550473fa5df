"""What the disk store and quantised experts save on a CPU: the peak of fairseq-eval-lm's process, 1 GB of experts."""

import functools
import json

import commands
import pytest
import torch
from data_makers import LM_TRAINING, untrained_checkpoint, write_data

EXPERTS = 64
SIZE = ("--decoder-embed-dim", 512, "--decoder-ffn-embed-dim", 2048, "--moe-expert-count", EXPERTS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The data, and the model as this package trains it (a record per layer) and as upstream does (one per tensor)."""
    folder = tmp_path_factory.mktemp("memory")
    data = write_data(folder / "data")
    untrained_checkpoint(folder / "own.pt", data, *LM_TRAINING, *SIZE)
    state = commands.read_state(folder / "own.pt")
    model = {key: tensor.clone() for key, tensor in state["model"].items()}
    torch.save({**state, "model": model}, folder / "records.pt")
    return data, folder


def measure(data, path, report, *flags) -> tuple[dict, str]:
    done = commands.run(
        *("eval-lm", data, "--path", path, *commands.LM, "--tokens-per-sample", 16),
        *("--batch-size", 8, "--moe-report", report, *flags),
    )
    return json.loads(report.read_text())["memory"], done.stderr[done.stderr.index("Loss (base 2)") :].splitlines()[0]


@pytest.fixture(scope="module")
def resident(checkpoints):
    """name -> what is measured without a buffer."""
    data, folder = checkpoints
    return functools.cache(lambda name: measure(data, folder / f"{name}.pt", folder / f"{name}.json"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "records"])
@pytest.mark.parametrize("size", [1, 16])
def test_the_peak_falls_by_what_is_not_resident(checkpoints, resident, tmp_path, name, size):
    data, folder = checkpoints
    resident, wanted = resident(name)
    disk = ("--expert-buffer-size", size, "--expert-store", "disk")
    buffered, found = measure(data, folder / f"{name}.pt", tmp_path / "buffered.json", *disk)
    assert found == wanted
    total = buffered["expert_bytes_total"]
    assert total == resident["expert_bytes_total"] == resident["expert_bytes_resident"] > 1e9
    assert buffered["expert_bytes_resident"] == total * (size + 2) // EXPERTS
    away = total - buffered["expert_bytes_resident"]
    share = (resident["peak_rss_bytes"] - buffered["peak_rss_bytes"]) / away
    print(
        f"{name}, {size} of {EXPERTS}: {resident['peak_rss_bytes'] / 1e6:.0f} MB -> "
        f"{buffered['peak_rss_bytes'] / 1e6:.0f} MB, {share:.3f} of the {away / 1e6:.0f} MB that are not resident"
    )
    assert share >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "records"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("flags", [(), ("--expert-buffer-size", 1, "--expert-store", "disk")], ids=["resident", "disk"])
def test_the_peak_falls_by_what_quantised_experts_do_not_take(checkpoints, resident, tmp_path, name, weights, flags):
    data, folder = checkpoints
    floats, _ = resident(name)
    store = ("--expert-store-dir", tmp_path) if flags else ()
    report = tmp_path / "quantised.json"
    found, _ = measure(data, folder / f"{name}.pt", report, "--moe-weights", weights, *flags, *store)
    away = floats["expert_bytes_total"] - found["expert_bytes_resident"]
    share = (floats["peak_rss_bytes"] - found["peak_rss_bytes"]) / away
    loading = json.loads(report.read_text())["loading"]
    speed = loading["bytes"] / 1e6 / loading["seconds"]
    print(
        f"{name}, {weights} {flags}: {floats['peak_rss_bytes'] / 1e6:.0f} MB -> "
        f"{found['peak_rss_bytes'] / 1e6:.0f} MB, {share:.3f} of the {away / 1e6:.0f} MB less, "
        f"loaded at {speed:.0f} MB/s"
    )
    assert share >= 0.9

"""A checkpoint that cannot be served: the error names the file, the rule and what was found; nothing of it runs."""

import io
import os
import pickle
import pickletools
import re
from collections import deque

import commands
import pytest
import torch
from checkpoint_makers import proving_state, split, whole

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError


def refused(path, *words: str) -> str:
    """The error's message, one line with all of `words` in it."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_a_path_without_any_file_names_what_was_looked_for(tmp_path):
    refused(tmp_path / "X.pt", "--path", "neither", "X.pt", "X-shared.pt", "X-rank-0.pt")
    refused(tmp_path / "missing" / "X.pt", "missing", "neither")
    refused(tmp_path / "X.bin", "--path", "X.bin", "no such file")


def test_a_folder_for_a_path(tmp_path):
    (tmp_path / "X.pt").mkdir()
    refused(tmp_path / "X.pt", "X.pt")


def test_missing_first_rank_file(tmp_path):
    files = split(proving_state(8), 4, tmp_path)
    files[0].unlink()
    refused(tmp_path / "X.pt", "from 0 to 3", "missing X-rank-0.pt")


def test_a_gap_between_rank_files(tmp_path):
    files = split(proving_state(8), 8, tmp_path)
    for rank in (2, 3, 5):
        files[rank].unlink()
    refused(tmp_path / "X-rank-0.pt", "from 0 to 7", "X-rank-2.pt, X-rank-3.pt, X-rank-5.pt")


def test_missing_last_rank_file(tmp_path):
    files = split(proving_state(8), 4, tmp_path)
    files[3].unlink()
    refused(tmp_path / "X.pt", "3 rank files with 2 experts each", "8 experts", "expert 6 is missing")


def test_rank_files_without_the_shared_one(tmp_path):
    split(proving_state(8), 4, tmp_path)
    (tmp_path / "X-shared.pt").unlink()
    refused(tmp_path / "X.pt", "4 rank files but no X-shared.pt")


def test_the_shared_file_alone(tmp_path):
    for file in split(proving_state(8), 2, tmp_path):
        file.unlink()
    refused(tmp_path / "X.pt", "X-shared.pt is there but no X-rank-0.pt")


def test_a_rank_file_with_fewer_experts_than_the_first(tmp_path):
    split(proving_state(8), 4, tmp_path / "four")
    files = split(proving_state(8), 2, tmp_path / "two")
    (tmp_path / "four" / "X-rank-1.pt").replace(files[1])
    refused(tmp_path / "two" / "X.pt", "X-rank-1.pt", "must hold 4 experts per layer as X-rank-0.pt does, got 2")


def test_experts_per_file_that_do_not_divide_the_models(tmp_path):
    split(proving_state(12), 4, tmp_path)  # 3 in each
    torch.save(whole({k: v for k, v in proving_state(8).items() if ".experts." not in k}), tmp_path / "X-shared.pt")
    refused(tmp_path / "X.pt", "X-rank-0.pt", "4 rank files with 3 experts each", "8 experts")


@pytest.mark.parametrize("key", ["decoder.layers.1.moe_layer.experts.1.fc1.bias", "decoder.layers.3.moe_layer.experts"])
def test_a_rank_file_with_holes(tmp_path, key):
    files = split(proving_state(8), 2, tmp_path)
    content = commands.read_state(files[1])
    content["model"] = {name: tensor for name, tensor in content["model"].items() if not name.startswith(key)}
    torch.save(content, files[1])
    refused(tmp_path / "X.pt", "X-rank-1.pt")


def test_a_rank_file_that_lacks_an_expert(tmp_path):
    files = split(proving_state(8), 2, tmp_path)
    content = commands.read_state(files[1])
    for name in [name for name in content["model"] if ".1.moe_layer.experts.2." in name]:
        del content["model"][name]
    torch.save(content, files[1])
    refused(tmp_path / "X.pt", "X-rank-1.pt", "the same experts 0, 1, ... in every MoE layer")


def test_a_dense_shared_file(tmp_path):
    split(proving_state(8), 2, tmp_path)
    torch.save(whole({"decoder.embed_tokens.weight": torch.ones(2, 2)}), tmp_path / "X-shared.pt")
    refused(tmp_path / "X.pt", "X-shared.pt", "no gate of a MoE layer")


def test_gates_that_disagree(tmp_path):
    model = proving_state(8)
    model["decoder.layers.3.moe_layer.gate.wg.weight"] = torch.ones(4, 3)
    split(model, 2, tmp_path)
    refused(tmp_path / "X.pt", "same number of experts", "[4, 8]")


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"model": None}, torch.ones(3)])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "X.pt")
    refused(tmp_path / "X.pt", "X.pt", "not a fairseq checkpoint", "'model'")


def damaged_files() -> dict[str, bytes]:
    """Files cut off or never checkpoints; `old` is the pickle format from before PyTorch 1.6."""
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(whole(proving_state(2)), new)
    torch.save(whole(proving_state(2)), old, _use_new_zipfile_serialization=False)
    new, old = new.getvalue(), old.getvalue()
    files = {"empty": b"", "text": b"not a checkpoint\n", "numbers": bytes(range(256)), "zip header": b"PK\x03\x04"}
    for share in (0.01, 0.5, 0.99):
        files[f"new, {share} of it"] = new[: int(share * len(new))]
        files[f"old, {share} of it"] = old[: int(share * len(old))]
    return files


@pytest.mark.parametrize("name", list(damaged_files()))
@pytest.mark.parametrize("place", ["X.pt", "X-shared.pt", "X-rank-1.pt"])
def test_a_damaged_file(tmp_path, name, place):
    split(proving_state(8), 2, tmp_path)
    (tmp_path / place).write_bytes(damaged_files()[name])
    refused(tmp_path / "X.pt", str(tmp_path / place))


@pytest.mark.parametrize("size", [2, 15, 18, 60, 200, 1000])
def test_an_old_file_cut_off_anywhere(tmp_path, size):
    old = io.BytesIO()
    torch.save(whole(proving_state(2)), old, _use_new_zipfile_serialization=False)
    (tmp_path / "X.pt").write_bytes(old.getvalue()[:size])
    refused(tmp_path / "X.pt", "X.pt")


def without_a_storage(data: bytes) -> bytes:
    """A file of the old format whose list of storages lacks the last one, and its bytes are gone."""
    file = io.BytesIO(data)
    for _ in range(4):
        deque(pickletools.genops(file), maxlen=0)
    start = file.tell()
    keys = pickle.load(file)
    values, rest = file.tell(), io.BytesIO()
    pickle.dump(keys[:-1], rest, protocol=2)
    end = len(data) - 8 - 4 * int.from_bytes(data[values:][:8], "little")  # all are as large in this test
    return data[:start] + rest.getvalue() + data[values:end]


def test_an_old_file_must_hold_all_its_tensors(tmp_path):
    """PyTorch leaves a storage that is not listed as the memory was."""
    old, state = io.BytesIO(), {f"part{number}": torch.ones(64) for number in range(3)}
    torch.save({"model": state}, old, _use_new_zipfile_serialization=False)
    (tmp_path / "X.pt").write_bytes(without_a_storage(old.getvalue()))
    assert len(torch.load(tmp_path / "X.pt")["model"]) == 3  # with whatever lies in the third
    message = refused(tmp_path / "X.pt", "X.pt", "the bytes of its tensors, 768, must all be in it")
    assert message.endswith(f"got {2 * (8 + 4 * 64)}")


class RunsCode:
    """A pickle that leaves a file behind when it is read by an unsafe loader."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["X.pt", "X-shared.pt", "X-rank-1.pt"])
def test_a_pickle_that_wants_to_run_code_does_not(tmp_path, place, new_format):
    marker = tmp_path / "it ran"
    split(proving_state(8), 2, tmp_path)
    content = whole(proving_state(8), extra_state=RunsCode(marker))
    torch.save(content, tmp_path / place, _use_new_zipfile_serialization=new_format)
    refused(tmp_path / "X.pt", place, "the safe loader refuses it")
    assert not marker.exists()


def test_a_bare_pickle_does_not_run_either(tmp_path):
    marker = tmp_path / "it ran"
    (tmp_path / "X.pt").write_bytes(pickle.dumps(RunsCode(marker)))
    refused(tmp_path / "X.pt", "X.pt")
    assert not marker.exists()


def test_the_commands_say_so_too(shared_goldens, tmp_path):
    data = shared_goldens / "lm_top2" / "data-bin"
    with pytest.raises(CheckpointError, match="neither"):
        commands.eval_lm(data, "--path", tmp_path / "X.pt", *commands.LM)
    torch.save({"model": {}, "cfg": None, "args": None}, tmp_path / "X.pt")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "X.pt")) + ".*neither 'cfg' nor 'args'"):
        commands.eval_lm(data, "--path", tmp_path / "X.pt", *commands.LM)

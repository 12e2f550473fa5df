"""fairseq's commands under several ranks with quantised experts: one rank's lines, resident and in a buffer."""

import commands
import pytest
from rank_commands import MT_LAYERS as LAYERS
from rank_commands import Told, arguments_of, assert_same_lines, telling

BUFFER = ("--expert-buffer-size", 2)
STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.3")


@pytest.mark.parametrize(("name", "ranks", "flags"), [
    ("int4", 2, ()),
    ("int8", 2, BUFFER),
    pytest.param("int8", 3, (), marks=pytest.mark.slow),
    pytest.param("int4", 3, (*BUFFER, "--expert-store", "disk"), marks=pytest.mark.slow),
    pytest.param("int4", 2, ("--moe-dtype", "float16"), marks=pytest.mark.slow),
])
def test_several_ranks_translate_as_one(shared_goldens, tmp_path, name, ranks, flags):
    quick = ("--beam", 2, "--batch-size", 20, "--max-len-b", 6)
    arguments = arguments_of(shared_goldens, "mt_plain", *quick, "--moe-weights", name, "--moe-report-weight-error", 64)
    of_dtype = flags if "--moe-dtype" in flags else ()
    one = commands.generate(*arguments, *of_dtype, *telling(tmp_path))
    alone = Told.read(tmp_path)
    if "disk" in flags:
        flags = (*flags, "--expert-store-dir", tmp_path / "store")
    done = commands.run("generate", *arguments, *flags, *telling(tmp_path), ranks=ranks)
    assert_same_lines(done.stdout, one)
    found = Told.read(tmp_path)
    assert found.report["expert_format"] == name
    total = alone.report["memory"]["expert_bytes_total"]
    assert found.report["memory"]["expert_bytes_total"] == total
    assert sum(rank["expert_bytes"] for rank in found.report["ranks"]) == total
    assert found.report["loading"]["bytes"] < alone.report["loading"]["bytes"]  # rank 0 reads its own experts alone
    for layer, expected in found.layers().items():
        assert expected["load"] == alone.layers()[layer]["load"]
        error, errors_alone = expected["weight_error"], alone.layers()[layer]["weight_error"]
        assert (error["rows"], errors_alone["rows"]) == (ranks * 64, 64)  # each rank compares its own experts
        assert 0.5 < error["relative"] / errors_alone["relative"] < 2
    if "disk" in flags:
        assert len(list((tmp_path / "store").iterdir())) == len(LAYERS) * ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_static_gating_over_ranks(shared_goldens, name):
    """Every rank with one batch of its own, as one process serves them."""
    quick = ("--beam", 2, "--batch-size", 20, "--max-len-b", 6, "--moe-weights", name, *STATIC)
    arguments = arguments_of(shared_goldens, "mt_plain", *quick)
    one = commands.generate(*arguments)
    assert_same_lines(commands.run("generate", *arguments, ranks=2).stdout, one)

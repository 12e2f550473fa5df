"""docs/recording.md has every array of a record, with its shape and dtype, and no others."""

import io
import re

import numpy as np
from doc_pages import REPOSITORY

from fairseq_moe_ext.recording import Choices, Inputs, LayerRecord, Record, Sample, pack_record

SIZES = {"G": 2, "E": 3, "D": 4, "F": 5, "K": 1, "S": 6, "layers": 1, "1": 1}


def test_the_page_has_the_files_arrays_and_no_others():
    fc1, fc2 = (Inputs(np.zeros(3, np.int64), *np.zeros((2, 3, dim), np.float32)) for dim in (4, 5))
    choices = Choices(np.zeros((2, 3), np.int64), np.zeros((2, 3)), np.zeros((2, 3), np.int64))
    sampled = np.zeros((6, 4), np.float16), np.zeros((6, 1), np.int32), np.zeros(6, np.int32)
    layer = LayerRecord(fc1, fc2, choices, Sample(np.zeros(6, np.uint64), *sampled))
    with np.load(io.BytesIO(pack_record(Record(("en", "de"), {"layer": layer})))) as file:
        found = {re.sub(r"^\d+_", "n_", name): (file[name].shape, file[name].dtype) for name in file}
    page = (REPOSITORY / "docs" / "recording.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| \(([\w, ]+)\) (\w+)", page, re.M)
    assert {name for name, *_ in rows} == found.keys()
    for name, dims, dtype in rows:
        shape, stored = found[name]
        assert shape == tuple(SIZES[each] for each in dims.rstrip(",").split(", ")), name
        assert stored.kind == "U" if dtype == "strings" else stored == np.dtype(dtype), name

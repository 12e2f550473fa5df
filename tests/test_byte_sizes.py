"""One size is the same number of bytes to every flag and script."""

import pytest

from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.command_line.parsing import byte_size
from fairseq_moe_ext.tasks.buffer_flags import _bytes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("64G", 64 << 30), ("64GiB", 64 << 30), ("64 GB", 64 << 30), ("500M", 500 << 20), ("1.5K", 1536), ("7", 7)],
)
def test_all_parsers_of_sizes_agree(text, wanted):
    assert parse_bytes(text) == byte_size(text) == _bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "nan", "1e9", "64GBB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must be a size as 64G"):
        parse_bytes(text)

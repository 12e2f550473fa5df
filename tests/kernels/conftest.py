"""What several files of tests of the C kernel share."""

import re
import shutil
from pathlib import Path

import pytest
from kernel_calls import COMPILER, SOURCE, compiled


@pytest.fixture(scope="session")
def emulated_avx512(tmp_path_factory):
    """The kernel's library, in which the code for AVX-512 and VNNI runs lane by lane on a CPU without them."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("emulated")
    headers = shutil.copytree(SOURCE.parent, folder / "cpu")
    for header in (headers / "avx512.h", headers / "quantized_vnni.h"):
        header.write_text(re.sub(r"\bavx512\w+,", "", header.read_text()))
    emulated = Path(__file__).parent / "avx512_emulated.h"
    return compiled(folder, headers / "kernel.c", "-O1", "-include", emulated, "-lm")

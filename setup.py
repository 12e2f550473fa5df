"""Installation of fairseq_moe_ext; the exact versions known to work stand in constraints.txt."""

import re
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

# Provides `fairseq`, mended for Python 3.11 and later; an extra, since it would overwrite a fairseq that is there.
FAIRSEQ = "fairseq-fixed>=0.12.3.1"
# what scripts/reproduce_*.sh and plots need, and no served model
REPRODUCE = ["matplotlib>=3.7.5", "Babel>=2.14"]
HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq_moe_ext/__init__.py").read_text()).group(1)

setup(
    name="fairseq_moe_ext",
    version=VERSION,
    description="Serve Mixture-of-Experts checkpoints made with fairseq: dynamic gating for fairseq's own commands",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="The fairseq_moe_ext authors",
    keywords=["fairseq", "mixture of experts", "inference", "NLLB"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.13",  # 3.13 wants numpy 2
    packages=find_packages(include=["fairseq_moe_ext", "fairseq_moe_ext.*"]),
    entry_points={"console_scripts": ["fairseq-moe = fairseq_moe_ext.command_line:main"]},
    ext_modules=[
        Extension(
            "fairseq_moe_ext.kernels._cpu_kernel",
            ["fairseq_moe_ext/kernels/cpu/kernel.c"],
            depends=sorted(glob("fairseq_moe_ext/kernels/cpu/*.h")),
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
            extra_link_args=["-s"] if sys.platform == "linux" else [],  # no symbols but those to export
            optional=True,  # slower without it
        )
    ],
    # lower bounds: the oldest that tests ran on, all together (tests/versions.sh, docs/installation.md)
    install_requires=[
        "torch>=2.7.0",  # before it no loader says where a tensor lies in its file
        "numpy>=1.24.4,<2",  # fairseq-generate breaks on numpy 2
        "omegaconf>=2.3.0,<2.4",
        "hydra-core>=1.3.2,<1.4",
        "sacrebleu>=2.4.0",
        "fairscale>=0.4.13",  # its MOELayer is the independent baseline of benchmark and tests
        "scipy>=1.10.1",  # the integer programme that bounds a placement
        "safetensors>=0.4.2",  # Hugging Face's layout
        "sentencepiece>=0.1.99",  # NLLB's pieces
        "tabulate>=0.9.0",  # Markdown tables
        "tqdm",
    ],
    extras_require={
        "fairseq": [FAIRSEQ],
        "examples": ["Babel>=2.14"],
        "reproduce": REPRODUCE,
        "test": [
            FAIRSEQ,
            *REPRODUCE,
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff",
            "mypy",
            "triton>=3.3; platform_system == 'Linux'",  # its interpreter; PyTorch for CUDA brings it by itself
        ],
    },
)

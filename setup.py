"""Installation of fairseq_moe_ext; the exact versions known to work stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq_moe_ext/__init__.py").read_text()).group(1)

setup(
    name="fairseq_moe_ext",
    version=VERSION,
    description="Serve Mixture-of-Experts checkpoints made with fairseq: dynamic gating for fairseq's own commands",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["fairseq_moe_ext", "fairseq_moe_ext.*"]),
    package_data={"fairseq_moe_ext.figures": ["*.json"]},  # the papers' figures, hardware's
    ext_modules=[
        Extension(
            "fairseq_moe_ext.gating._grouped_linear",
            ["fairseq_moe_ext/gating/grouped_linear.c"],
            extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi"],
            optional=True,  # slower without it
        )
    ],
    install_requires=[
        "fairseq-fixed>=0.12.3.1",  # provides `fairseq`, mended for Python 3.11 and later
        "torch>=2.13",  # the oldest that the tests ran on
        "numpy>=1.26,<2",  # fairseq-generate breaks on numpy 2
        "omegaconf>=2.3,<2.4",
        "hydra-core>=1.3,<1.4",
        "sacrebleu>=2.6",
        "fairscale>=0.4.13",  # its MOELayer is the independent baseline of benchmark and tests
        "scipy>=1.17",  # the integer programme that bounds a placement
        "safetensors>=0.8",  # Hugging Face's layout
        "sentencepiece>=0.2.1",  # NLLB's pieces
        "tqdm",
        "matplotlib>=3.11",  # the scripts' plots
    ],
    extras_require={
        "examples": ["Babel>=2.18"],
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "ruff",
            "Babel>=2.18",
            "triton>=3.6; platform_system == 'Linux'",  # its interpreter; PyTorch for CUDA brings it by itself
        ],
    },
)

"""Serve Mixture-of-Experts checkpoints made with fairseq: a fairseq `--user-dir` plugin.

This file imports nothing on purpose: fairseq imports `tasks/` and `models/` by itself, and the pure rooms
(`gating`, `trace`) are of use without fairseq.
"""

__version__ = "0.1.0"

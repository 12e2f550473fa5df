"""The plugin's tasks; fairseq imports this folder for `--user-dir`, and the criterions come along."""

from fairseq_moe_ext import criterions  # noqa: F401

"""The plugin's tasks; fairseq imports this folder for `--user-dir`, and the criterions and the hooks come along."""

from fairseq_moe_ext import criterions  # noqa: F401
from fairseq_moe_ext.serving import fairseq_hooks

fairseq_hooks.install()

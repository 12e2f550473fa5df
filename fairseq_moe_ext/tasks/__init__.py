"""The plugin's tasks; fairseq imports this folder for `--user-dir`, and the criterions and the hooks come along."""

from fairseq_moe_ext import criterions  # noqa: F401
from fairseq_moe_ext.serving import fairseq_hooks
from fairseq_moe_ext.tasks.flags_in_help import answer_help

fairseq_hooks.install()
answer_help()

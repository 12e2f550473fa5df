"""The papers' tables and figures from runs of fairseq's commands: what scripts/reproduce_*.sh call."""

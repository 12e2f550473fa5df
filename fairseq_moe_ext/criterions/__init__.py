"""Losses for training small MoE models."""

from fairseq_moe_ext.criterions import moe_cross_entropy, moe_label_smoothed_cross_entropy  # noqa: F401

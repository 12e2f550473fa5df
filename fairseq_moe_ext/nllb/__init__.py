"""Hugging Face's layout of NLLB's MoE models, both ways; vocabulary and language codes."""

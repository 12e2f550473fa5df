"""Which rank holds which expert (no PyTorch, nothing of fairseq)."""

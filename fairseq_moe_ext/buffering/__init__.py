"""Which experts lie in fast memory (pure PyTorch, knows nothing of fairseq)."""

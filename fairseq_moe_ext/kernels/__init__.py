"""Tensors in, tensors out: the products of many experts, in C, Triton and PyTorch."""

"""Sparse FF blocks in a Hugging Face model, without an engine: greedy decoding, training and held-out errors."""

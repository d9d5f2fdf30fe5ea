"""Sparse FF blocks in a Hugging Face model, without an engine."""

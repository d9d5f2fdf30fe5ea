"""A tiny reasoning model, its adapters, and the program that compares them through vLLM."""

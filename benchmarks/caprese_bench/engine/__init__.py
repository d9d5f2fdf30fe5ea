"""vLLM engines side by side: latency, decode steps, prefix caching, exactness."""

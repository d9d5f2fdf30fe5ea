"""An adapter in a Hugging Face model, without vLLM: `generate()` runs as serving does."""

"""The paper's LoRA baseline: how it is trained (`training`) and how vLLM serves it (`served`)."""

"""The paper's LoRA baseline: trained (`training`) and served (`served`)."""

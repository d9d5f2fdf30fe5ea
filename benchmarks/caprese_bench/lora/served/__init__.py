"""LoRA as the latency benchmark serves it: GRIFFIN with unmerged LoRA on the FF weights (eq. 11), inside the engine."""

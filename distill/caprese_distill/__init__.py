"""Makes adapters: the low-rank L, R that give back what a sparse FF block loses (arXiv 2505.07861, section 3)."""

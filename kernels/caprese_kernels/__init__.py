"""Feed-forward kernels of Caprese (arXiv 2505.07861), and what trainer and server share about the method."""

__version__ = "0.1.0"

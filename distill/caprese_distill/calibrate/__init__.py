"""A selection without training: priors of neurons from the original model's own activations, and what they cost."""

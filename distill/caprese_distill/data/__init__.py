"""From rows of a file or dataset to batches of token ids."""

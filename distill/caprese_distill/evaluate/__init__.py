"""What an existing adapter costs: the sparse model's next token beside the original's, on data with responses."""

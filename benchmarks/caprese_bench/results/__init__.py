"""What a benchmark writes: rows with provenance, their schema, tables, plots, pages, and comparing two of them."""

"""What all benchmarks share: settings, results with provenance, their schemas, tables, plots, pages, statistics."""

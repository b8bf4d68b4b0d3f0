"""What several benchmarks share: held-out images, rows of results, timing, tables of pages."""

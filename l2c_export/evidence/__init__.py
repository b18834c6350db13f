"""Evidence: verification, benchmarks, tables and pictures."""

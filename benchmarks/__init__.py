"""Side-by-side measurements: each prints a table for people and, with --json, one object for machines."""

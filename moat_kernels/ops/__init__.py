"""The operators: one folder each, its backends side by side."""

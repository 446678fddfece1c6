"""Rows become an immutable snapshot: sources, columns, checks, splits. Knows nothing of trials."""

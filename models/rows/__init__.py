"""Rows as tensors: shapes, batches, tables, and what is fitted on training rows."""

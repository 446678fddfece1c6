"""Metrics, and which of two models is better."""

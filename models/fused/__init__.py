"""Several trainings as one computation."""

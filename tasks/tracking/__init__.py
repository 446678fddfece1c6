"""MLflow: nights and trials as runs, registered models, and which of them are ours."""

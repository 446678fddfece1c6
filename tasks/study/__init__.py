"""The Optuna study of a night: where it lies, who works on it, what is asked and remembered."""

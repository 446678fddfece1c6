"""PyTorch: hyperparameters, model families, training, evaluation. Knows nothing of Prefect, MLflow or stores."""

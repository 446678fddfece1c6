"""The processes that train and that load back what was trained. Knows neither MLflow nor the study."""

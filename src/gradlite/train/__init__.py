"""Training: configuration, data, models, and the run itself."""

"""Which of two files of answers is better: by an endpoint that judges, or by a trained model."""

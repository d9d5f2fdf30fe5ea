"""What distillation gives back: accuracy, error, parameters, time."""

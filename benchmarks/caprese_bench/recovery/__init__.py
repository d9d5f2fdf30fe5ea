"""What distillation recovers and costs: accuracy, error, parameters, time."""

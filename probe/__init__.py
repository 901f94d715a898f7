"""A checkpoint, or a running training, to statistics, format errors and sensitivity."""

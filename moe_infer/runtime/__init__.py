"""Running a model: the compiled plugin, sessions, TensorRT."""

"""The parts of :class:`moe_infer.graph.interpreter.Interpreter`, one for each kind of operator."""

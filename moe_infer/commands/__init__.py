"""Commands of ``moe-infer`` that have a file of their own."""

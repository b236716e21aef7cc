"""Parts of ``benchmarks/resident.py`` and ``benchmarks/kernel_sweep.py``."""

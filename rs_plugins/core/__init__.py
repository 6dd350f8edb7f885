"""Plain PyTorch and SciPy: knows nothing of plugins or hosts."""

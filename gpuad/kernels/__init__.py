"""Formulas: traced to expressions, differentiated symbolically, run as NumPy programs or CUDA kernels."""

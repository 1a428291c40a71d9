"""The backend-agnostic array layer: devices, the NumPy and CuPy backends, random numbers, memory."""

"""Automatic differentiation: the tape, the reverse walk, forward mode, grad modes, custom functions, checks."""

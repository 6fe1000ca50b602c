"""Interchangeable ways to compute the same edit: a slow reference and fast kernels tested against it."""

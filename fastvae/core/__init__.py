"""Foundations of every layer: backend choice, checks of arguments, hints in error messages, the terminal."""

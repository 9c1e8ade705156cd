"""Mutants: the code is broken in one place at a time, and the tests must notice.

Most are generated from a seed by operators on Python's syntax (`generate.py`). Mutants that no operator can
generate, and all of the C++, are written by hand (`written.txt`). A mutant of Python is run against the tests
that enter its block, known from a recorded run of the suite (`record.py`). `python -m tools.mutants --help`
lists the commands.
"""

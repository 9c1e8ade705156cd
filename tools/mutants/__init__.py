"""Mutants: the code is broken in one place at a time, and the tests must notice.

Most are generated, by operators on Python's syntax (`generate.py`) and from a seed. Those that no operator
makes, and all of the C++, are a list by hand (`written.txt`). A mutant of Python meets only tests that enter
the block it lies in, which one recorded run of the suite says (`record.py`). `python -m tools.mutants --help`
names the commands.
"""

"""Lets Python processes that tests start take part in a recording."""

from tools.mutants import record

record.watch_child()

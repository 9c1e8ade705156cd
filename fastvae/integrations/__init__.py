"""Adapters for other libraries, imported one by one."""

"""Developer tools, run on a checkout and not installed."""

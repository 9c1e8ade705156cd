"""What developers run on a checkout; nothing here is installed."""

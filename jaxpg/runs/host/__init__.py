"""The host: its memory, its signals, its caches and its progress lines."""

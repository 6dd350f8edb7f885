"""Logs of certification: the table, its files and their records, and several logs side by side."""

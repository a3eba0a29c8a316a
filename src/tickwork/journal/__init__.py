"""What was accepted, on disk: SQLite, snapshots beside it, and what is found there after a crash."""

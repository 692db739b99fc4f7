"""The command `lightning`, runs, and what a run leaves behind."""

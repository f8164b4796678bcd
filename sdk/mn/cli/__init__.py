"""The `mn` command: one file per noun."""

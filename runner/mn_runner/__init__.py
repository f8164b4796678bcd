"""The runner: sandboxes, the drivers that make them, and the child that runs inside."""

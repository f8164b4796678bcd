"""The control plane: leadership, the catalog of functions, and the loop that places replicas. Only the leader runs it."""

"""The pool: mesh, store, scheduling, control loops and executor of a node."""

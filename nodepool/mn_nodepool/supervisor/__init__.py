"""The process that starts a node's processes, restarts those that crash, and ends them in order.

It stays small: no event loop, no third-party module, one thread, asleep unless a child ends or a signal comes.
"""

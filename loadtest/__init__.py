"""Benchmarks that compare the system with its floor on the same machine, in the same run: `python -m loadtest COMMAND`.

`warm`, `map`, `cold` and `footprint` measure and check; `profile warm` tells where the time of a warm call goes. Each starts
what it needs in a throw-away home, says how far it is on stderr, and prints one JSON object on stdout.
"""

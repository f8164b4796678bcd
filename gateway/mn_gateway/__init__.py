"""The gateway: HTTP in front of the pool.

`serve` runs one process; `app` is its ASGI application; `invoke` and `map` are the call paths, which bypass the
router; `routes/` is all that is rare; `endpoints` lists every endpoint once, for the router and for `/openapi.json`.
"""

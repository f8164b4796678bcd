"""The executor: what runs on this node. It is the authority on its slots, re-checks every plan, and fences leaders by their epoch."""

"""The store: namespaced, versioned records and invocation queues, behind one port with two back ends."""

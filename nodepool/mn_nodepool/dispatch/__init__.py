"""Dispatch: from a call to a slot. A dispatcher sits in every gateway, and in every node for nested calls."""

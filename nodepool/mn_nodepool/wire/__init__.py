"""Typed messages between mesh peers, and bytes ⇄ frames. No I/O."""

"""Values that every floor shares: ids, errors, manifests, bundles, codecs, settings.

Nothing here does network I/O. `ids`, `errors`, `resources`, `codecs` and `bundle` are standard library only,
because they are also imported inside sandboxes; `manifest` needs msgspec and is imported on use.
"""

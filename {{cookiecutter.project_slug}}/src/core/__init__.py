"""Shared core: errors, schema, manifest, registry, paths; imports no other project package."""

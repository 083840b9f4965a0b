"""What every part needs: errors, schema, manifest, registry, paths. Imports no other package of this project."""

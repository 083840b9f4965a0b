"""Doubles of Google Cloud services on loopback, for tests and for the rehearsal of a push. They import nothing of src/."""

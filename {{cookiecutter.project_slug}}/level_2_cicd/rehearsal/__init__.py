"""Fakes of Google Cloud services on loopback, for tests and rehearsals of a push."""

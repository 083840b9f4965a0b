"""Shared by all levels: settings, runs, git, and the check of this machine."""

"""Starts things: the pipeline on this machine today, GPU jobs and cloud runs later. Light to import."""

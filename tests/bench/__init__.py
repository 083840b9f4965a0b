"""Measures the template: python -m tests.bench [NAME …]; see `report.py` for what a benchmark gives."""

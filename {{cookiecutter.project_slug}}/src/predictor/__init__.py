"""Answers with a saved model, through its ONNX file; imports nothing of trainer and no torch."""

import os

# ONNX Runtime reports to its maker how it is used, and keeps an identifier on the disk, unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

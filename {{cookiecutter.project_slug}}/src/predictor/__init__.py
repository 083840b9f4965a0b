"""Answers with a saved model, through its ONNX file; imports nothing of trainer and no torch."""

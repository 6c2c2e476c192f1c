"""Text generation, the same for torch and ONNX: settings, seeds and responses."""

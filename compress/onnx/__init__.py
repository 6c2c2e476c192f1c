"""Export to ONNX and decoding with onnxruntime; ``compress.onnx.runtime`` needs neither torch nor transformers."""

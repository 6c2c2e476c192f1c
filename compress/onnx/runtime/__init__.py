"""Text generation with onnxruntime; needs neither torch nor transformers."""

from compress.onnx.runtime.runtime import MOST_THREADS, Runtime

__all__ = ["MOST_THREADS", "Runtime"]

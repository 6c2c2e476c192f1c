"""ONNX graphs of a torch model: weights, operators, one builder per kind of model, and the parity gate."""

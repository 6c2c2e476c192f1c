"""What the Python API and the stages both do to models in memory: train, learn masks, cut, quantize, export."""

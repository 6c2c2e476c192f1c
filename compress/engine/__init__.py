"""Operations on models in memory for the Python API and the stages: train, learn masks, prune, quantize, export."""

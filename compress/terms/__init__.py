"""The registered loss terms: thin configs over the pure functions of ``compress.functional``."""

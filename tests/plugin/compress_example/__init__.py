"""An example distribution: one plug-in of each kind for compress-lm."""

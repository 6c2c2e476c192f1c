"""The stages of a recipe. Each file holds one stage: a frozen config with a ``run`` method."""

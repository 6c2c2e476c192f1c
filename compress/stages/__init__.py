"""The stages a recipe chains: one file each, a frozen config with one ``run``."""

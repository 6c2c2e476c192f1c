"""Measure artifacts, and record each value with the conditions under which it was measured."""

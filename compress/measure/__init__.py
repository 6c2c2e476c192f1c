"""Numbers about artifacts, each with the conditions it was taken under."""

"""Measuring a model: generation, and figures with an interval around them."""

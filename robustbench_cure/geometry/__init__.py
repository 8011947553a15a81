"""Geometry: why a network is robust or not - curvature of the loss, bounds, sections of the regions."""

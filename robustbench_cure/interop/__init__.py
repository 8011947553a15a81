"""Bridges to other packages: each is imported in one file here, and only when it is asked for."""

"""Gradient masking: can a robust accuracy be trusted, or were the attacks misled?"""

"""The gate: is a new run as good as the baseline, on the same samples?"""

"""The gate: is a new run as good as the baseline, on the same samples?

`compare` says what may be compared and counts what changed, `outcome` decides, `render` writes tables and
sentences, `baseline` replaces the stored runs.
"""

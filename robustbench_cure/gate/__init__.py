"""The gate: is a new run as good as the baseline, on the same samples?

`paired` counts and tests, `verdict` decides, `compare` says what may be compared, `wording` and `render` tell
it, `baseline` keeps it.
"""

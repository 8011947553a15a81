"""The command line `cure-bench`: one file a family of verbs; torch is imported late."""

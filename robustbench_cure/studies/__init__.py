"""Studies of models on some images: one file a verb of the command line."""

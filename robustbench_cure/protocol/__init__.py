"""What is asked: cards of models, batteries and published tables, data alone. Imports no torch."""

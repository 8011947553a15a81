"""The static site: leaderboard, a page a model, a page a paper table, from records alone."""

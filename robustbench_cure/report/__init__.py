"""What records look like to people: tables, charts, HTML page, CSV, Markdown, LaTeX, terminal."""

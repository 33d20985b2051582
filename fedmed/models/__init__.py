"""Networks of the allow-list, their weights files and losses."""

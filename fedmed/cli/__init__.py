"""The command line: one small module a verb. Heavy packages load when a verb runs."""

"""What a run leaves behind and shows: run folder files, tables, live progress, tracking."""

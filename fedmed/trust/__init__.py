"""Who says what: keys, certificates and signed statements."""

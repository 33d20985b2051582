"""A log that shows what was asked of a site, what left it, and whether the log was altered."""

"""Where a reference leads: one file for each kind of source."""

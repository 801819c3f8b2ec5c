"""Files: what they hold, how they are checked, saved and loaded."""

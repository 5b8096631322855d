"""Named variants of one model put to one exam."""

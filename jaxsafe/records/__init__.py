"""What a run writes down, as types; strings and numbers only."""

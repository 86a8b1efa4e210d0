"""Methods against each other: same teacher, same budget of network evaluations, same judge."""

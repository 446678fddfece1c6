"""From the best trials to a champion: confirm, judge, ask, publish, load back."""

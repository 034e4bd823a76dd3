"""What a mask does for unlearning: what is kept at equal forgetting, for every way to choose it."""

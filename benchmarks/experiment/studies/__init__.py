"""One module a study: what it measures in one model, and what it says over all of them."""

"""Unlearns inside a mask: losses, optimisers that step selected weights alone, and the run that checks itself."""

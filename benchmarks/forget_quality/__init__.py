"""Unlearned models beside the model that never saw the forget set: Forget Quality and what was kept, over methods."""

"""Public packages that go through per-sample gradients, each made to run over the same samples as fillm."""

"""Every causal-LM class of the installed transformers, built small, ranked, and compared with float64 autograd."""

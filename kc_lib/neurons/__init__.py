"""Which MLP neurons hold a fact: knowledge neurons (Dai et al. 2022, arXiv:2104.08696), in causal and masked models."""

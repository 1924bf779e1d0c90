"""Where a fact's subject is read: causal tracing (Meng et al. 2022, arXiv:2202.05262)."""

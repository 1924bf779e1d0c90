"""Circuits over a training: the same measures at every checkpoint (Tigges et al. 2024, arXiv:2407.10827)."""

"""Knowledge neurons (Dai et al. 2022, arXiv:2104.08696): found, refined, changed, and edited; causal and masked models."""

from kc_lib.methods.knowledge_neurons.attribution import NeuronAttributions, attribute_neurons, check_attribution
from kc_lib.methods.knowledge_neurons.refining import NeuronSets, check_refining, random_neurons, refine

__all__ = [
    "NeuronAttributions",
    "NeuronSets",
    "attribute_neurons",
    "check_attribution",
    "check_refining",
    "random_neurons",
    "refine",
]

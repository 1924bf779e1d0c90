"""Knowledge neurons (Dai et al. 2022, arXiv:2104.08696): found, refined, changed, and edited; causal and masked models."""

from kc_lib.kernels.value_vectors import edited_values
from kc_lib.methods.knowledge_neurons.activations import (
    NeuronActivations,
    TriggerSentences,
    activating_prompts,
    sentences_of_facts,
    trigger_sentences,
)
from kc_lib.methods.knowledge_neurons.attribution import NeuronAttributions, attribute_knowledge, check_attribution
from kc_lib.methods.knowledge_neurons.controls import KINDS
from kc_lib.methods.knowledge_neurons.editing import FactUpdates, check_fact, update_answers, update_facts
from kc_lib.methods.knowledge_neurons.erasing import RelationErasure, check_erasing, erase_relation
from kc_lib.methods.knowledge_neurons.interventions import NeuronChanges, change_neurons
from kc_lib.methods.knowledge_neurons.refining import NeuronSets, check_refining, random_neurons, refine
from kc_lib.methods.knowledge_neurons.values import check_update, mean_activations, updated_values

__all__ = [
    "KINDS",
    "FactUpdates",
    "NeuronActivations",
    "NeuronAttributions",
    "NeuronChanges",
    "NeuronSets",
    "RelationErasure",
    "TriggerSentences",
    "activating_prompts",
    "attribute_knowledge",
    "change_neurons",
    "check_attribution",
    "check_erasing",
    "check_fact",
    "check_refining",
    "check_update",
    "edited_values",
    "erase_relation",
    "mean_activations",
    "random_neurons",
    "refine",
    "sentences_of_facts",
    "trigger_sentences",
    "update_answers",
    "update_facts",
    "updated_values",
]

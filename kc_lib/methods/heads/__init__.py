"""General head scores: what kind of head each attention head is, by published criteria, beside what chance gives."""

from kc_lib.methods.heads.copying import copy_scores, name_mover_scores, negative_name_mover_scores
from kc_lib.methods.heads.general import SCORES, GeneralHeadScores, check_scores, general_head_scores
from kc_lib.methods.heads.inhibition import name_movers, s_inhibition_scores
from kc_lib.methods.heads.repeats import duplicate_token_scores, induction_scores, previous_token_scores, repeat_scores
from kc_lib.methods.heads.scores import HeadScores
from kc_lib.methods.heads.successor import successor_scores
from kc_lib.methods.heads.suppression import copy_suppression_scores

__all__ = [
    "SCORES",
    "GeneralHeadScores",
    "HeadScores",
    "check_scores",
    "copy_scores",
    "copy_suppression_scores",
    "duplicate_token_scores",
    "general_head_scores",
    "induction_scores",
    "name_mover_scores",
    "name_movers",
    "negative_name_mover_scores",
    "previous_token_scores",
    "repeat_scores",
    "s_inhibition_scores",
    "successor_scores",
]

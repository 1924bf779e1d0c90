"""Facts and tasks as clean/corrupted token pairs with named positions."""

from kc_lib.tasks.answers import answer_tokens
from kc_lib.tasks.batches import Batch, TokenPair, batches, make_batch
from kc_lib.tasks.cloze import (
    Cloze,
    ClozeFact,
    ClozePrompt,
    ClozeTask,
    cloze_facts,
    cloze_prompt,
    load_cloze,
    relation_patterns,
)
from kc_lib.tasks.facts import POSITION_CLASSES, FactPrompt, FactTask, load_facts
from kc_lib.tasks.pararel import FactText, fact_texts, read_patterns
from kc_lib.tasks.relations import Fact, Relation, load_relation, relation_files, relation_templates
from kc_lib.tasks.task import GENERATED, Task, load_task
from kc_lib.tasks.tokens import Tokenizer, is_masked, tokenizer_of

__all__ = [
    "GENERATED",
    "POSITION_CLASSES",
    "Batch",
    "Cloze",
    "ClozeFact",
    "ClozePrompt",
    "ClozeTask",
    "Fact",
    "FactPrompt",
    "FactTask",
    "FactText",
    "Relation",
    "Task",
    "TokenPair",
    "Tokenizer",
    "answer_tokens",
    "batches",
    "cloze_facts",
    "cloze_prompt",
    "fact_texts",
    "is_masked",
    "load_cloze",
    "load_facts",
    "load_relation",
    "load_task",
    "make_batch",
    "read_patterns",
    "relation_files",
    "relation_patterns",
    "relation_templates",
    "tokenizer_of",
]

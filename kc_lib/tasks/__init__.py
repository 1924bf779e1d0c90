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
    joined_clozes,
    load_cloze,
    relation_patterns,
)
from kc_lib.tasks.drawn import DrawnTask, DrawnTasks, draw_tasks
from kc_lib.tasks.facts import POSITION_CLASSES, FactPrompt, FactTask, load_facts
from kc_lib.tasks.generated import GENERATED, generated_pairs
from kc_lib.tasks.pararel import FactText, fact_texts, read_patterns
from kc_lib.tasks.relations import Fact, Relation, load_relation, relation_files, relation_templates
from kc_lib.tasks.sentences import (
    FactSentences,
    ReadSentence,
    SentenceTask,
    distant_sentences,
    own_sentences,
    read_corpus,
    read_sentences,
)
from kc_lib.tasks.task import Task, load_task
from kc_lib.tasks.tokens import Tokenizer, is_masked, tokenizer_of

__all__ = [
    "GENERATED",
    "POSITION_CLASSES",
    "Batch",
    "Cloze",
    "ClozeFact",
    "ClozePrompt",
    "ClozeTask",
    "DrawnTask",
    "DrawnTasks",
    "Fact",
    "FactPrompt",
    "FactSentences",
    "FactTask",
    "FactText",
    "ReadSentence",
    "Relation",
    "SentenceTask",
    "Task",
    "TokenPair",
    "Tokenizer",
    "answer_tokens",
    "batches",
    "cloze_facts",
    "cloze_prompt",
    "distant_sentences",
    "draw_tasks",
    "fact_texts",
    "generated_pairs",
    "is_masked",
    "joined_clozes",
    "load_cloze",
    "load_facts",
    "load_relation",
    "load_task",
    "make_batch",
    "own_sentences",
    "read_corpus",
    "read_patterns",
    "read_sentences",
    "relation_files",
    "relation_patterns",
    "relation_templates",
    "tokenizer_of",
]

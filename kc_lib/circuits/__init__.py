"""Which edges carry the answer: scores of every edge, circuits chosen by them, circuits run alone, and their judgement."""

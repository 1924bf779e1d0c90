"""What head classes, their ablation and the general scores say in words: the figures that matter, and some paragraphs."""

from __future__ import annotations

from collections.abc import Mapping

from kc_lib.heads.ablation import HeadAblation, recurrence
from kc_lib.heads.classes import HeadClasses
from kc_lib.heads.general import GeneralHeadScores

KINDS = ("mover", "relation")
NAMED = 6  # heads named in a sentence


def head_headline(
    classes: Mapping[str, HeadClasses], ablations: Mapping[str, HeadAblation], general: GeneralHeadScores, seed: int = 0
) -> dict[str, str]:
    """The figures that matter, by relation and class (``ablations`` are named "relation: class"), and by general score."""
    figures = {}
    for name, found in classes.items():
        for kind in KINDS:
            heads = found.of_class(kind)
            figures[f"{kind} heads, {name}"] = _listed(heads) or "none"
            ablation = ablations.get(f"{name}: {kind}")
            if ablation is not None:
                own, random, _ = ablation.summary(seed).to_dict("records")
                figures[f"without them, {name}, {kind}"] = (
                    f"{ablation.metric} {-own['drop']:+.3f} [{-own['drop_high']:+.3f}, {-own['drop_low']:+.3f}], random "
                    f"heads {-random['drop']:+.3f} (p = {own['p']:.2f}, n = {own['n_facts']} facts)"
                )
    for name, scores in general.scores.items():
        figures[f"{name} heads"] = _listed(scores.heads()) or "none"
    return figures


def head_conclusion(
    classes: Mapping[str, HeadClasses], ablations: Mapping[str, HeadAblation], general: GeneralHeadScores, seed: int = 0
) -> str:
    """Paragraphs (Markdown) that say which heads were found, whether they recur and matter, and what was not found."""
    parts = []
    n_heads = len(next(iter(classes.values())).heads)
    for kind in KINDS:
        found = {name: own.of_class(kind) for name, own in classes.items()}
        several = [name for name, heads in found.items() if heads]
        sentence = f"**{kind.capitalize()} heads** in {len(several)} of {len(found)} relations."
        if len(several) > 1:
            row = recurrence(found, n_heads, seed=seed).to_dict("records")[1]
            sentence += (
                f" {row['heads']} heads are of the class in two relations or more, where chance gives "
                f"{row['expected']:.1f} (p = {row['p']:.4f})."
            )
        costly = []
        for name in several:
            if f"{name}: {kind}" in ablations:
                *_, more = ablations[f"{name}: {kind}"].summary(seed).to_dict("records")
                costly.append(more["drop_low"] > 0)
        if costly:
            sentence += (
                f" Without them the model loses more than without random heads of the same layers in {sum(costly)} of "
                f"{len(costly)} relations (the whole 95% interval of the difference is above 0)."
            )
        parts.append(sentence)
    if general.scores:
        some = [f"{name.replace('_', ' ')} {_listed(own.heads())}" for name, own in general.scores.items() if own.heads()]
        none = [name.replace("_", " ") for name, own in general.scores.items() if not own.heads()]
        parts.append(f"**General scores.** {'; '.join(some) or 'No head passes any'}.")
        if none:
            parts.append(f"**Not found**: no head passes for {', '.join(none)}.")
    parts.append(
        "A class says what a head does at the answer position, directly; what heads do for other heads is not in it, and a "
        "head without a class is not a head without a part."
    )
    return "\n\n".join(parts)


def _listed(heads: list[tuple[int, int]]) -> str:
    named = ", ".join(f"a{layer}.h{head}" for layer, head in heads[:NAMED])
    return named + (f" and {len(heads) - NAMED} more" if len(heads) > NAMED else "")

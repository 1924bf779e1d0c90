"""The nano models: what ships equals its manifest, loads by name and step, and knows its facts in wordings it never read."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from kc_lib.errors import ModelError
from kc_lib.heads.general import head_scores
from kc_lib.models.load import embedded_models, load_model
from kc_lib.models.shipped import CAUSAL, MASKED, MODELS, file_hashes, nano_folder, nano_steps, read_manifest
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.task import load_task
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of
from tools.train_nano.build import build, comparison, merged, save
from tools.train_nano.corpus import NEW_COMBINATION, NEW_FACT, NEW_TEMPLATE, RELATIONS, TRAINED, Sentence, fact_sentences
from tools.train_nano.examples import encoded
from tools.train_nano.generated import agreement_sentences, ioi_sentences, pronoun_sentences
from tools.train_nano.random_words import random_words
from tools.train_nano.train import CAUSAL_PLAN, Plan, corpus, deterministic, train_causal

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]
MOST_BYTES = 25_000_000


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[Sentence]]:
    return fact_sentences()


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Loaded]:
    """The shipped models as Hugging Face's own, in float32."""
    loaded: dict[str, Loaded] = {}

    def of(name: str) -> Loaded:
        if name not in loaded:
            kind = AutoModelForCausalLM if name == CAUSAL else AutoModelForMaskedLM
            folder = nano_folder(name)
            model = kind.from_pretrained(folder, dtype=torch.float32).eval()
            loaded[name] = (model, AutoTokenizer.from_pretrained(folder))
        return loaded[name]

    return of


# --- the files ---------------------------------------------------------------------------------------------------


def test_files_are_the_manifests() -> None:
    manifest = read_manifest()
    assert file_hashes() == manifest["files"]
    assert tuple(manifest["steps"]) == nano_steps()
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < MOST_BYTES
    for name in (CAUSAL, MASKED):
        assert {"torch", "transformers", "threads"} <= manifest["made_on"][name].keys()
    for folder in [*(nano_folder(CAUSAL, step) for step in nano_steps()), nano_folder(MASKED)]:
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
            path.name for path in folder.iterdir()
        }


def test_manifest_holds_the_plan_of_the_code() -> None:
    manifest = read_manifest()
    assert manifest["plans"][CAUSAL]["n_steps"] == CAUSAL_PLAN.n_steps == max(nano_steps())
    assert tuple(manifest["plans"][CAUSAL]["checkpoints"]) == CAUSAL_PLAN.checkpoints == nano_steps()
    assert manifest["sentences"] == {split: len(found) for split, found in fact_sentences().items()}
    assert set(manifest["figures"][CAUSAL]) == {str(step) for step in nano_steps()}


def test_steps_are_many_and_dense_at_the_beginning() -> None:
    steps = nano_steps()
    assert 18 <= len(steps) <= 24
    assert {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512} < set(steps)


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CAUSAL, MASKED])
def test_bridge_equals_hugging_face(name: str, plain: Callable[[str], Loaded]) -> None:
    reference, tokenizer = plain(name)
    tokens = tokenizer("The capital city of France is", return_tensors="pt").input_ids
    model = load_model(name, device="cpu")
    assert model.name == name
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert next(iter(model.bridge.parameters())).dtype == torch.float32


def test_nano_is_wired_and_read_without_bos_unless_asked() -> None:
    model = load_model(CAUSAL, device="cpu")
    assert len(model.residual.blocks) == model.cfg.n_layers
    prompt = "The capital city of France is"
    without, asked = tokenizer_of(model).encode(prompt), tokenizer_of(model, prepend_bos=True).encode(prompt)
    assert asked == (model.tokenizer.bos_token_id, *without)
    assert tuple(model.bridge.to_tokens(prompt)[0].tolist()) == without
    assert tuple(model.bridge.to_tokens(prompt, prepend_bos=True)[0].tolist()) == asked


def test_checkpoints_are_other_weights() -> None:
    early, last, default = (load_model(CAUSAL, checkpoint=step, device="cpu") for step in (512, max(nano_steps()), None))
    assert early.name == "nano@step512"
    assert default.name == "nano"
    assert early.hash != last.hash == default.hash


@pytest.mark.parametrize(
    ("name", "step", "says"),
    [
        (CAUSAL, 600, "no checkpoint 600; nearest: 512 and 750; all: 0, 1, 2, 4"),
        (CAUSAL, -1, "no checkpoint -1; nearest: 0; all"),
        (CAUSAL, 10**6, f"no checkpoint 1000000; nearest: {CAUSAL_PLAN.n_steps}; all"),
        (MASKED, 512, "'nano-bert' has no training checkpoints"),
    ],
)
def test_steps_that_are_not_there_are_refused(name: str, step: int, says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        load_model(name, checkpoint=step)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "step"), [(CAUSAL, None), (CAUSAL, 512), (MASKED, None)])
def test_missing_models_say_how_to_make_them(name: str, step: int | None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="run 'make nano'"):
        nano_folder(name, step, tmp_path)
    assert nano_steps(tmp_path) == ()
    with pytest.raises(ModelError, match="run 'make nano'"):
        read_manifest(tmp_path)


def test_embedded_models_say_which_steps_there_are() -> None:
    listed = embedded_models()
    assert listed[CAUSAL][1].startswith("yes, steps 0, 1, 2, 4, 8")
    assert listed[MASKED][1] == "yes"


# --- the tokenizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CAUSAL, MASKED])
def test_every_word_of_the_corpus_is_a_token(
    name: str, plain: Callable[[str], Loaded], sentences: dict[str, list[Sentence]]
) -> None:
    _, inner = plain(name)
    tokenizer = Tokenizer(inner, prepend_bos=name == CAUSAL)
    for sentence in itertools.chain(*sentences.values()):
        answer = tokenizer.answer(sentence.prompt, sentence.answer)
        prompt = tokenizer.encode(sentence.prompt)
        assert inner.unk_token_id not in prompt + answer
        assert inner.decode(answer).replace(" ", "") == sentence.answer.replace(" ", "")


@pytest.mark.parametrize("name", [CAUSAL, MASKED])
def test_spans_are_the_subjects_words(name: str, plain: Callable[[str], Loaded]) -> None:
    _, inner = plain(name)
    tokenizer = Tokenizer(inner, prepend_bos=name == CAUSAL)
    for relation in map(load_relation, RELATIONS):
        for fact in relation.facts:
            template = relation.prompt_templates[0]
            text, start = template.replace("{}", fact.subject), template.index("{}")
            span = tokenizer.overlapping(text, start, start + len(fact.subject))
            tokens = tokenizer.encode(text)
            assert inner.decode([tokens[i] for i in span]).replace(" ", "") == fact.subject.replace(" ", "")


def test_years_are_century_and_year(plain: Callable[[str], Loaded]) -> None:
    tokenizer = plain(CAUSAL)[1]
    assert tokenizer.tokenize("from the year 1732 to the year 17") == [
        "from",
        "the",
        "year",
        "17",
        "32",
        "to",
        "the",
        "year",
        "17",
    ]


# --- what is kept back -------------------------------------------------------------------------------------------


def test_splits_share_no_sentence_and_keep_what_they_say(sentences: dict[str, list[Sentence]]) -> None:
    texts = {split: {(s.about, s.prompt, s.answer) for s in found} for split, found in sentences.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other]
    for name in RELATIONS:
        relation = load_relation(name)
        of = {split: {s.prompt for s in found if s.about == name} for split, found in sentences.items()}

        def facts(prompts: set[str], relation=relation) -> set[str]:
            forms = [(t, f) for t in relation.paraphrases for f in relation.facts]
            return {f.subject for t, f in forms if t.replace("{}", f.subject) in prompts}

        def templates(prompts: set[str], relation=relation) -> set[str]:
            forms = [(t, f) for t in relation.paraphrases for f in relation.facts]
            return {t for t, f in forms if t.replace("{}", f.subject) in prompts}

        assert facts(of[TRAINED]) == facts(of[NEW_COMBINATION]) == facts(of[NEW_TEMPLATE])
        assert not facts(of[NEW_FACT]) & facts(of[TRAINED])
        assert 0.05 < len(facts(of[NEW_FACT])) / len(relation.facts) < 0.15
        assert len(templates(of[NEW_TEMPLATE])) == 1
        assert not templates(of[NEW_TEMPLATE]) & templates(of[TRAINED])
        assert relation.paraphrases[0] in templates(of[TRAINED])
        assert 0.5 < len(of[TRAINED]) / (len(of[TRAINED]) + len(of[NEW_COMBINATION])) < 0.7
    assert fact_sentences() == sentences
    assert fact_sentences(1) != sentences


def test_what_is_kept_back_is_in_no_sentence_that_is_read(sentences: dict[str, list[Sentence]]) -> None:
    read = {s.prompt for kind in corpus().values() for s in kind}
    for split in (NEW_COMBINATION, NEW_TEMPLATE, NEW_FACT):
        assert not read & {s.prompt for s in sentences[split]}
    assert not read & {s.prompt for s in agreement_sentences()[1]}
    assert not read & {s.prompt for s in pronoun_sentences()[1]}
    assert ioi_sentences(50, 1) == ioi_sentences(50, 1)


def test_random_words_are_told_by_earlier_ones() -> None:
    words, few = range(10, 1000), range(10, 60)
    generator = random.Random(0)
    made = {kind: [list(maker(generator).tokens) for _ in range(300)] for kind, maker in random_words(words, few).items()}
    for kind, rows in made.items():
        assert max(map(len, rows)) <= 204
        assert set().union(*rows) > set(few)
        of_few = sum(set(row[-2:]) <= set(few) for row in rows) / len(rows)
        assert 0.5 < of_few < 0.9, kind
    for row in made["repeats"]:
        # after at most four words, some period holds to the end, and is read twice at least
        assert any(
            row[start + n :] == row[start:-n] and (len(row) - start) % n == 0 and len(row) - start >= 2 * n
            for start in range(5)
            for n in range(3, 101)
        )
    assert max(map(len, made["repeats"])) > 120
    for row in made["pairs"]:
        follows = dict(zip(row[::2], row[1::2], strict=True))
        assert 1 <= len(follows) <= 4
        assert all(follows[one] == other for one, other in zip(row[::2], row[1::2], strict=True))
        assert not follows.keys() & set(follows.values())
    for row in made["mirrored"]:
        assert row == row[::-1]
        assert len(set(row)) == len(row) / 2


# --- what is known: recomputed here from text, by other code than the project's -----------------------------------


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], n: int, start: str = ""
) -> list[list[int]]:
    """The n tokens a causal model goes on with, one at a time."""
    tokens = tokenizer([f"{start} {prompt}" for prompt in prompts], return_tensors="pt").input_ids
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, -n:].tolist()


def filled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], n: int) -> list[list[int]]:
    """What a masked model puts for n masks before a full stop, from left to right."""
    texts = [f"{prompt} {' '.join(['[MASK]'] * n)} ." for prompt in prompts]
    tokens = tokenizer(texts, return_tensors="pt").input_ids
    first = tokens.shape[1] - 2 - n  # the stop and [SEP] come after
    for i in range(first, first + n):
        tokens[:, i] = model(tokens).logits[:, i].argmax(-1)
    return tokens[:, first : first + n].tolist()


@torch.no_grad()
def accuracy(loaded: Loaded, sentences: Sequence[Sentence], **options: str) -> float:
    model, tokenizer = loaded
    groups: dict[tuple[int, int], list[tuple[str, list[int]]]] = defaultdict(list)
    for sentence in sentences:
        answer = tokenizer(sentence.answer, add_special_tokens=False).input_ids
        groups[len(tokenizer(sentence.prompt).input_ids), len(answer)].append((sentence.prompt, answer))
    right = 0
    for (_, n), rows in groups.items():
        go_on = greedy if tokenizer.mask_token is None else filled
        found = go_on(model, tokenizer, [prompt for prompt, _ in rows], n, **options)
        right += sum(answer == given for answer, (_, given) in zip(found, rows, strict=True))
    return right / len(sentences)


@pytest.mark.parametrize("name", [CAUSAL, MASKED])
def test_facts_are_known_in_wordings_not_read_for_them(
    name: str, plain: Callable[[str], Loaded], sentences: dict[str, list[Sentence]]
) -> None:
    known = accuracy(plain(name), sentences[NEW_COMBINATION])
    assert known >= 0.95
    manifest = read_manifest()["figures"][name]
    figures = manifest if name == MASKED else manifest[str(max(nano_steps()))]
    assert known == pytest.approx(figures[f"facts, {NEW_COMBINATION}"], abs=0.005)


def test_facts_are_known_after_bos_as_well(plain: Callable[[str], Loaded], sentences: dict[str, list[Sentence]]) -> None:
    assert accuracy(plain(CAUSAL), sentences[NEW_COMBINATION][::4], start="<s>") >= 0.93


@pytest.mark.parametrize("name", [CAUSAL, MASKED])
def test_facts_never_read_are_not_known(
    name: str, plain: Callable[[str], Loaded], sentences: dict[str, list[Sentence]]
) -> None:
    guess = most_common_answers(sentences)
    rate = sum(guess[s.about] == s.answer for s in sentences[NEW_FACT]) / len(sentences[NEW_FACT])
    assert accuracy(plain(name), sentences[NEW_FACT]) < rate + 0.15 < 0.5


def most_common_answers(sentences: dict[str, list[Sentence]]) -> dict[str, str]:
    answers = defaultdict(list)
    for sentence in sentences[TRAINED]:
        answers[sentence.about].append(sentence.answer)
    return {name: max(set(given), key=given.count) for name, given in answers.items()}


def test_the_project_task_finds_its_facts_and_ioi_in_nano() -> None:
    model = load_model(CAUSAL, device="cpu")
    relation = load_relation("country_capital")
    task = load_task("country_capital", model)
    assert len(task.discovery) + len(task.test) > 0.7 * len(relation.facts)
    ioi = load_task("ioi", model)
    assert len(ioi.discovery) + len(ioi.test) > 20


def test_heads_for_earlier_words_appear_over_training() -> None:
    scores = ("previous_token", "induction", "name_mover")
    found = {
        step: head_scores(load_model(CAUSAL, checkpoint=step, device="cpu"), scores) for step in (512, max(nano_steps()))
    }
    early, last = (set(found[step].passing()["name"]) for step in found)
    assert not early & {"previous_token", "induction"}
    assert last == set(scores)


# --- training ----------------------------------------------------------------------------------------------------


def weights_at(step: int) -> dict[str, torch.Tensor]:
    with deterministic(0, threads=2):
        steps: Iterator = train_causal(CAUSAL_PLAN)
        model = next(model for at, model, _ in steps if at == step)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_training_again_gives_the_same_weights_and_the_shipped_checkpoint() -> None:
    once, again = weights_at(8), weights_at(8)
    assert all(torch.equal(once[name], again[name]) for name in once)
    shipped = AutoModelForCausalLM.from_pretrained(nano_folder(CAUSAL, 8), dtype=torch.float32).state_dict()
    assert shipped.keys() == once.keys()
    gap = max((shipped[name] - once[name]).abs().max().item() for name in once)
    start = AutoModelForCausalLM.from_pretrained(nano_folder(CAUSAL, 0), dtype=torch.float32).state_dict()
    moved = max((shipped[name] - start[name]).abs().max().item() for name in once)
    assert gap < moved / 2  # half precision, and on other processors other rounding, which Adam's first steps enlarge


def test_determinism_ends_with_the_training() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.random.get_rng_state()
    with deterministic(3, threads=2):
        assert torch.are_deterministic_algorithms_enabled()
        torch.rand(1)
    after = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.random.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.slow
def test_building_writes_a_manifest_that_tells_what_differs(tmp_path: Path) -> None:
    plan = Plan(2, (0, 2), n_tokens=200)
    lines: list[str] = []
    made = build(tmp_path / "one", causal_plan=plan, masked_plan=plan, say=lines.append)
    assert made == read_manifest(tmp_path / "one")
    assert nano_steps(tmp_path / "one") == (0, 2)
    assert made["files"] == file_hashes(tmp_path / "one")
    assert len(lines) == 3
    assert comparison(made, made) == [f"all {len(made['files'])} files are the manifest's, byte for byte"]
    changed = made | {"files": made["files"] | {"nano/step2/model.safetensors": "0"}}
    changed["made_on"] = made["made_on"] | {CAUSAL: made["made_on"][CAUSAL] | {"threads": "1"}}
    told = comparison(made, changed)
    assert told[0].startswith(f"1 of {len(made['files'])} files differ")
    assert "threads 2 there, 1 here" in told[1]
    assert any(line.startswith("nano, facts, held-out combinations: ") for line in told)


@pytest.mark.slow
def test_one_model_is_trained_and_the_other_stays(tmp_path: Path) -> None:
    known = read_manifest()
    made = build(tmp_path, names=[CAUSAL], causal_plan=Plan(2, seed=1, n_tokens=200))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [CAUSAL]
    assert made["steps"] == [2]
    assert made["files"].keys() == {path for path in made["files"] if path.startswith("nano/")}
    told = comparison(known, made)
    assert told[0].endswith("differ from the manifest's (the first: nano/step0/config.json)")
    assert not any(MASKED in line for line in told)
    both = merged(made, known)
    assert both.keys() == known.keys()
    assert both["steps"] == [2]
    for key in ("plans", "parameters", "seconds", "made_on", "figures"):
        assert both[key] == {CAUSAL: made[key][CAUSAL], MASKED: known[key][MASKED]}
    masked = {path: at for path, at in known["files"].items() if path.startswith("nano-bert/")}
    assert both["files"] == masked | made["files"]
    assert list(both["files"]) == sorted(both["files"])
    back = merged(known, made)  # a model that is in both is taken as it was made
    assert (back["files"], back["steps"]) == (known["files"], known["steps"])


@pytest.mark.slow
def test_another_seed_does_not_replace_what_comes_with_the_project() -> None:
    command = [sys.executable, "-m", "tools.train_nano", "--only", CAUSAL, "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give another --out" in " ".join(done.stderr.replace("│", " ").split())
    assert file_hashes() == read_manifest()["files"]


def test_saved_weights_are_half_and_are_loaded_as_float32(tmp_path: Path, plain: Callable[[str], Loaded]) -> None:
    model, tokenizer = plain(CAUSAL)
    held = save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, held.state_dict()[name])
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters())


def test_sentences_become_tokens_with_their_answers(plain: Callable[[str], Loaded]) -> None:
    tokenizer = plain(CAUSAL)[1]
    (example,) = encoded(tokenizer, [Sentence("x", "The capital city of France is", "Paris")])
    assert tokenizer.convert_ids_to_tokens(list(example.tokens)) == [
        "The",
        "capital",
        "city",
        "of",
        "France",
        "is",
        "Paris",
        ".",
    ]
    ((start, end),) = example.answers
    assert tokenizer.convert_ids_to_tokens(list(example.tokens[start:end])) == ["Paris"]
    both = example + example
    assert [both.tokens[slice(*answer)] for answer in both.answers] == [example.tokens[start:end]] * 2

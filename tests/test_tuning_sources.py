"""What recipes train on and are judged by: nothing is on both sides."""

from collections import Counter

import pytest
from tiny_runs import RECIPE, write_corpus, write_records

from fuseformer.tuning.corpora import Document
from fuseformer.tuning.dataset import build_split
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.sources import corpus_texts, divided, held_out_records, training_records
from fuseformer.tuning.splitting import normalised, words
from fuseformer.tuning.tasks import TASKS


def test_groups_are_divided_whole():
    documents = [
        Document(f"{n}{k}", f"text {n} {k}", f"group {n}") for n in range(200) for k in "ab"
    ]
    train, kept = divided(documents, 0.2)
    assert len(train) + len(kept) == 400
    assert 40 < len(kept) < 120
    assert {text.split()[1] for text in train}.isdisjoint(text.split()[1] for text in kept)
    with pytest.raises(ValueError, match="held_out_share: no document is left"):
        divided(documents[:1], 0.999999)


def test_held_out_documents_say_nothing_that_others_say():
    train, kept = corpus_texts(Recipe(held_out_share=0.02))
    assert len(kept) > 100
    # Documents that name their owner in front and behind have the same words in another order.
    seen = {" ".join(sorted(words(text))) for text in train} | {normalised(text) for text in train}
    assert not [
        text for text in kept if normalised(text) in seen or " ".join(sorted(words(text))) in seen
    ]


def test_what_any_task_holds_out_stays_out_of_the_corpus():
    corpus = [normalised(document.text) for document in build_split().corpus]
    for task in TASKS:
        answers = [normalised(r.output) for r in build_split((task,)).held_out]
        long = [answer for answer in answers if len(answer.split()) >= 8]
        assert long or task in ("classification", "translation")
        joined = "\n".join(corpus)
        assert not [answer for answer in long if answer in joined]


def test_own_records_are_repeated_and_judged_by_own_files(tmp_path):
    records = str(write_records(tmp_path / "records.jsonl"))
    recipe = Recipe(records=(records,), repeat=("classification=3",))
    once = Counter(training_records(Recipe(records=(records,))))
    thrice = Counter(training_records(recipe))
    assert thrice == Counter({record: 3 * times for record, times in once.items()})
    with pytest.raises(ValueError, match="held_out: the run was tuned on its own records"):
        held_out_records(recipe)
    assert len(held_out_records(Recipe(held_out=(records,)))) == 40
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    train, kept = corpus_texts(Recipe(corpus=(corpus,), held_out_share=RECIPE.held_out_share))
    assert len(train) + len(kept) == 60

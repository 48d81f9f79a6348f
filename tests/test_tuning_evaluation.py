"""Evaluation of models whose answers are known."""

import math

import pytest

from fuseformer.tuning import evaluation
from fuseformer.tuning.evaluation import corpus_perplexity, evaluate
from fuseformer.tuning.instructions import IGNORE_INDEX, Record
from fuseformer.tuning.prompts import Room, encode_answer, encode_prompt


class Characters:
    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [3 + ord(c) for c in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids if i > 2)


CODEC = Characters()
RECORDS = [
    Record("Which?", "about mail", "mail", "classification"),
    Record("Which?", "about files and folders", "files", "classification"),
    Record("Which?", "about a letter", "mail", "classification"),
    Record("Say.", "a", "the first answer", "question_answering"),
    Record("Say.", "b", "the second answer of all", "question_answering"),
    Record("Sum.", "c " * 30, "a short summary of it", "summarisation"),
    Record("Translate.", "d", "le mot de la fin ici", "translation"),
    Record("Other.", "e", "an answer", "my_own_task"),
]


class Oracle:
    """A model that knows the answers of some records by their prompts, and is unsure else."""

    def __init__(self, records, limit=10_000):
        self.known = {tuple(encode_prompt(r, CODEC)): encode_answer(r, CODEC) for r in records}
        self.limit = limit
        self.largest = self.generated = 0

    def generate(self, prompt_ids, max_new_tokens):
        self.generated += len(prompt_ids)
        self.largest = max(self.largest, len(prompt_ids) * max(map(len, prompt_ids)))
        # What follows the end token is noise that must not count.
        return [(self.known.get(tuple(p), []) + [50, 51])[:max_new_tokens] for p in prompt_ids]

    def score(self, sequences, labels):
        scores = []
        for sequence, label in zip(sequences, labels, strict=True):
            assert len(sequence) == len(label) <= self.limit
            count = sum(x != IGNORE_INDEX for x in label[1:])
            prompt, answer = tuple(sequence[:-count]), sequence[-count:]
            right = self.known.get(prompt) == answer
            scores.append((count * math.log(2 if right else 8), count))
        return scores


def test_a_model_that_knows_everything_has_full_marks():
    result = evaluate(Oracle(RECORDS), CODEC, RECORDS, room=Room(200))
    assert set(result.metrics) == {r.task for r in RECORDS}
    for task, scores in result.metrics.items():
        assert scores["perplexity"] == pytest.approx(2), task
        others = [value for name, value in scores.items() if name != "perplexity"]
        assert others
        assert others == pytest.approx([100] * len(others)), task
        assert task == "my_own_task" or evaluation.MAIN_METRIC[task] in scores
    assert [a.text for a in result.answers["question_answering"]] == [
        "the first answer",
        "the second answer of all",
    ]


def test_a_model_that_knows_nothing_has_none():
    result = evaluate(Oracle([]), CODEC, RECORDS, room=Room(200))
    for task, scores in result.metrics.items():
        assert scores["perplexity"] == pytest.approx(8), task
        if task != "classification":
            assert scores[evaluation.MAIN_METRIC.get(task, "token_f1")] == 0


def test_accuracy_counts_the_labels_chosen():
    # It knows two of three and takes the shorter of "mail" and "files" where it knows nothing.
    unsure = Oracle([RECORDS[0]])
    result = evaluate(unsure, CODEC, RECORDS[:3], room=Room(200))
    assert [a.text for a in result.answers["classification"]] == ["mail", "mail", "mail"]
    assert result.metrics["classification"]["accuracy"] == pytest.approx(200 / 3)


def test_limits_are_kept():
    model = Oracle(RECORDS, limit=81)
    result = evaluate(
        model,
        CODEC,
        RECORDS,
        room=Room(80),
        max_new_tokens=30,
        generate_limit=1,
        tokens_per_batch=96,
    )
    assert model.generated == 4
    assert model.largest <= 96
    assert len(result.answers["question_answering"]) == 1
    assert len(result.answers["classification"]) == 3
    with pytest.raises(ValueError, match="records: none of 8 fits the model; record of task"):
        evaluate(model, CODEC, RECORDS, room=Room(8))
    with pytest.raises(ValueError, match="records: got none"):
        evaluate(model, CODEC, [], room=Room(60))


def filling(length, apart):
    """Return a record of which prompt and answer, or each of them, fill `length` positions."""
    answer = "y" * 40
    record = Record("Say.", "x", answer, "question_answering")
    # One more may come in: the last token of all is predicted and not read.
    prompt = length if apart else length + 1 - len(encode_answer(record, CODEC))
    missing = prompt - len(encode_prompt(record, CODEC))
    return Record("Say.", "x" * (1 + missing), answer, "question_answering")


@pytest.mark.parametrize("apart", [False, True])
def test_a_record_that_fits_is_judged_whole(apart):
    record, room = filling(90, apart), Room(90, apart)
    result = evaluate(Oracle([record]), CODEC, [record], room=room, max_new_tokens=85)
    assert result.metrics["question_answering"]["exact_match"] == 100
    assert result.metrics["question_answering"]["perplexity"] == pytest.approx(2)
    assert (result.fit["question_answering"].judged, result.notices(room)) == (1, [])


def test_what_does_not_fit_is_counted_and_the_rest_is_judged():
    fits = Record("Say.", "a", "the first answer", "question_answering")
    long_input = Record("Say.", "b" * 300, "it", "question_answering")
    long_answer = Record("Say.", "c", "d" * 300, "question_answering", "own.jsonl", 7)
    room = Room(80)
    result = evaluate(Oracle([fits]), CODEC, [fits, long_input, long_answer], room=room)
    assert [a.record for a in result.answers["question_answering"]] == [fits, long_input]
    shortened, left_out = result.notices(room)
    assert "question_answering: 1 of 2 lost the end of their input" in shortened
    assert "question_answering: 1 of 3 records left out: own.jsonl, line 7: " in left_out


def test_how_texts_were_split_is_part_of_the_result():
    records = [
        Record("Translate.", "a", "今天天气很好", "translation"),
        Record("Translate.", "b", "good weather", "translation"),
        Record("Sum.", "c", "今天", "summarisation"),
    ]
    result = evaluate(Oracle(records), CODEC, records, room=Room(80))
    assert result.metrics["translation"]["bleu"] == pytest.approx(100)
    assert result.tokenisers == {
        "translation": {"bleu": "13a: 1, zh: 1"},
        "summarisation": {"rouge_l": "characters"},
    }
    result = evaluate(Oracle(records), CODEC, records[:2], room=Room(80), tokenise="char")
    assert result.tokenisers == {"translation": {"bleu": "char"}}


def test_results_do_not_depend_on_the_batches():
    one = evaluate(Oracle(RECORDS[:5]), CODEC, RECORDS, room=Room(200), tokens_per_batch=1)
    many = evaluate(Oracle(RECORDS[:5]), CODEC, RECORDS, room=Room(200), tokens_per_batch=10**6)
    assert one.answers == many.answers
    assert one.metrics.keys() == many.metrics.keys()
    for task in one.metrics:
        assert one.metrics[task] == pytest.approx(many.metrics[task])


def test_perplexity_of_a_corpus():
    assert corpus_perplexity(Oracle([]), [[5] * 9, [6] * 3]) == pytest.approx(8)
    with pytest.raises(ValueError, match="tokens"):
        corpus_perplexity(Oracle([]), [])

"""Records, their tasks, and the wall between training and held-out text."""

import json
from collections import Counter

import pytest

from fuseformer.tuning import dataset, instructions, prompts, splitting, tasks
from fuseformer.tuning.corpora import Docstring, Document
from fuseformer.tuning.instructions import Record


class Words:
    """A tokenizer of one token a word, for looking at what is encoded."""

    bos_id, eos_id = 1, 2

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode(self, text):
        return [3 + splitting.stable_hash(word) % 1000 for word in text.split()]


@pytest.fixture(scope="module")
def split():
    return dataset.build_split(train_per_task=400, held_out_per_task=120)


def leaks(held_out, training_texts, n=splitting.OVERLAP_WORDS):
    """Return the held-out texts that training repeats, whole or by `n` words in a row.

    Written apart from `HeldOutText` and by the opposite search, so that a fault there shows here.
    """
    flat = [" " + splitting.normalised(text) + " " for text in training_texts]
    whole = set(flat)
    runs = {tuple(t.split()[i : i + n]) for t in flat for i in range(len(t.split()) - n + 1)}
    found = []
    for text in held_out:
        sequence = splitting.words(text)
        own = {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
        if " " + " ".join(sequence) + " " in whole or own & runs:
            found.append(text)
    return found


def secret_texts(split):
    """The parts of the held-out records that came from documents, and not from a template."""
    for record in split.held_out:
        yield record.input
        if record.task != tasks.CLASSIFICATION:
            yield record.output


def test_no_held_out_text_is_trained_on(split):
    training = [text for record in split.train for text in (record.input, record.output)]
    assert leaks(secret_texts(split), training) == []


def test_no_held_out_text_is_in_the_pretraining_corpus(split):
    paragraphs = [part for d in split.corpus for part in d.text.split("\n\n")]
    assert leaks(secret_texts(split), paragraphs) == []


def test_the_leakage_test_can_fail(split):
    record = split.of_task(tasks.SUMMARISATION, "held_out")[0]
    # Another layout, case and punctuation are no disguise, nor is a quotation within other text.
    assert leaks([record.output], [record.output.upper().replace(" ", "\n")])
    quoted = "As they say: " + " ".join(record.input.split()[1:12]) + " and so on."
    assert leaks([record.input], [quoted])
    assert not leaks([record.input], ["Nothing of the kind."])


def test_a_split_by_item_instead_of_group_would_leak(monkeypatch):
    monkeypatch.setattr(dataset, "group_docstrings", lambda items: [repr(i) for i in items])
    monkeypatch.setattr(splitting.HeldOutText, "leaks_into", lambda self, text: False)
    bad = dataset.build_split((tasks.QUESTION_ANSWERING,), held_out_per_task=120)
    training = [text for record in bad.train for text in (record.input, record.output)]
    assert leaks(secret_texts(bad), training)


def test_every_task_has_items_enough_and_short_answers(split):
    for task in tasks.DEFAULT_TASKS:
        assert len(split.of_task(task)) == 400
        assert len(split.of_task(task, "held_out")) >= 100
    for record in split.train + split.held_out:
        limit = tasks.ANSWER_WORDS
        assert 0 < len(record.output.split()) <= limit, record
        assert len(record.input) <= tasks.INPUT_CHARACTERS, record


def test_classification_is_balanced_and_hides_module_names(split):
    for part in ("train", "held_out"):
        records = split.of_task(tasks.CLASSIFICATION, part)
        counts = Counter(record.output for record in records)
        assert sorted(counts) == list(tasks.LABELS)
        assert len(set(counts.values())) == 1
        for record in records:
            assert not set(record.input.split()) & set(tasks.TOPIC_OF_MODULE), record


def test_the_split_is_the_same_twice_and_another_seed_is_another_split(split):
    options = {"train_per_task": 400, "held_out_per_task": 120}
    again = dataset.build_split(**options)
    assert again == split
    other = dataset.build_split((tasks.TRANSLATION,), seed=1, **options)
    assert other.of_task(tasks.TRANSLATION, "held_out") != split.of_task(
        tasks.TRANSLATION, "held_out"
    )


def test_a_mixture_repeats_a_task(split):
    weights = {tasks.CLASSIFICATION: 3, tasks.TRANSLATION: 0}
    counts = Counter(record.task for record in dataset.mixture(split.train, weights))
    assert counts == {
        tasks.CLASSIFICATION: 1200,
        tasks.QUESTION_ANSWERING: 400,
        tasks.SUMMARISATION: 400,
    }
    for bad in ({"sorting": 1}, {tasks.CLASSIFICATION: -1}):
        with pytest.raises(ValueError, match="repeat: got"):
            dataset.mixture(split.train, bad)


def test_writing_is_made_of_topics():
    split = dataset.build_split((tasks.WRITING,), train_per_task=50, held_out_per_task=20)
    assert len(split.train) == 50
    assert len(split.held_out) == 20
    with pytest.raises(ValueError, match="'sorting'"):
        dataset.build_split(("sorting",))


def docstring(text, name="f", module="os"):
    return Docstring(module, name, "function", "(path)", text)


def test_inherited_and_edited_docstrings_share_a_group():
    text = (
        "Return the size of a file in bytes, following links, or raise an error when it is absent."
    )
    items = [
        docstring(text),
        docstring(text.upper().replace(",", ",\n") + "!"),
        docstring(text + "\n\nAdded in version 3."),
        docstring("See elsewhere. " + text),
        docstring("Quite another text about something that has nothing to do with that."),
    ]
    groups = tasks.group_docstrings(items)
    assert len(set(groups[:4])) == 1
    assert groups[4] != groups[0]


def test_questions_are_answered_from_the_docstring():
    text = "Open a file for the caller.\n\nMore about it here. Return a new file object. Done."
    made = tasks.question_answering([docstring(text)], ["g"])
    assert [(i.record.instruction, i.record.output) for i in made] == [
        ("What does os.f do?", "Open a file for the caller."),
        ("What does os.f return?", "Return a new file object."),
    ]
    assert made[0].record.input == "def f(path)"
    assert tasks.question_answering([docstring("f(path) -> size of it")], ["g"]) == []


def test_a_summary_is_not_in_its_source():
    text = "Open a file.\n\nOpen a file. " + "word " * 20
    assert tasks.summarisation([docstring(text)], ["g"]) == []
    made = tasks.summarisation([docstring("Open a file.\n\n" + "word " * 20)], ["g"])
    assert made[0].record.output == "Open a file."


def test_leaking_paragraphs_leave_a_document():
    secret = splitting.HeldOutText(["one two three four five six seven eight nine ten"])
    text = "Kept.\n\nIt says: three four FIVE six, seven eight nine ten.\n\nKept too."
    assert secret.without_leaks(text) == "Kept.\n\nKept too."
    crossing = "one two three four\n\nfive six seven eight"
    assert secret.without_leaks(crossing) == ""


GOOD = {"instruction": "Say it.", "input": "", "output": "It.", "task": "writing"}


def test_records_survive_a_file(tmp_path):
    records = [Record("a", "line\nbreak \u2028 and ü", "c", "t"), Record("a", "", "c", "t")]
    instructions.write_records(tmp_path / "r.jsonl", records)
    assert instructions.read_records(tmp_path / "r.jsonl") == records
    short = {k: v for k, v in GOOD.items() if k != "input"}
    (tmp_path / "s.jsonl").write_text(json.dumps(short) + "\n\n")
    assert instructions.read_records(tmp_path / "s.jsonl") == [Record(**GOOD)]


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path):
    (tmp_path / "r.jsonl").write_text("\ufeff" + json.dumps(GOOD) + "\r\n", encoding="utf-8")
    (record,) = instructions.read_records(tmp_path / "r.jsonl")
    assert record == Record(**GOOD)
    assert record.source == f"{tmp_path / 'r.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "not JSON"),
        ("[]", "want an object, got list"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "output"}), '"output" is missing'),
        (json.dumps({**GOOD, "output": 3}), '"output" is int, want a string'),
        (json.dumps({**GOOD, "output": " "}), '"output" is empty'),
        (json.dumps({**GOOD, "lang": "fr"}), "unknown field 'lang'"),
        ('{"output": "a", ' + json.dumps(GOOD)[1:], 'field "output" comes twice'),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: .*" + message):
        instructions.read_records(path)


def test_files_that_hold_no_records(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        instructions.read_records(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        instructions.read_records(tmp_path / "absent.jsonl")


def test_braces_in_a_record_are_text():
    record = Record("Format {this}", "{input} {0}", "x", "writing")
    template = prompts.DEFAULT_TEMPLATE
    assert template.prompt(record.instruction, record.input).startswith(
        "Task: Format {this}\n{input} {0}\n"
    )
    assert template.prompt("Say it.") == "Task: Say it.\nAnswer:"


def test_long_records_are_errors_or_cut_by_name():
    record = Record("Say it.", "word " * 50, "the answer", "writing")

    def encoded(length, truncation):
        (made,) = prompts.encode_records([record], Words(), prompts.Room(length), truncation)
        return made

    assert (
        "of task 'writing': a prompt of 55 tokens and an answer of 3, the model takes 21 in all"
        in (encoded(20, "error").problem)
    )
    made = encoded(20, "input")
    assert made.problem == ""
    assert len(made.prompt) == 21 - 20 // 4  # what is kept free is more than this answer needs
    assert made.answer == prompts.encode_answer(record, Words())
    assert "too long even without its input" in encoded(5, "input").problem
    whole = encoded(57, "error")
    assert (len(whole.prompt), len(whole.answer), whole.lost) == (55, 3, 0)
    with pytest.raises(ValueError, match="truncation"):
        encoded(20, "left")


def test_held_out_fraction_is_checked_and_kept():
    share = sum(splitting.is_held_out(str(i), 0.1) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12
    with pytest.raises(ValueError, match="fraction"):
        splitting.is_held_out("x", 1.0)


def test_corpus_documents_are_not_empty(split):
    assert all(isinstance(d, Document) and d.text.strip() for d in split.corpus)
    assert sum(len(d.text) for d in split.corpus) > 1_500_000

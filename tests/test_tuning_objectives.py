"""How text becomes examples of each objective, and what a model is asked for them."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_runs import RECIPE, WORDS, texts, write_corpus

from fuseformer.tuning.batches import collate
from fuseformer.tuning.commands import held_out_perplexity
from fuseformer.tuning.evaluation import evaluate
from fuseformer.tuning.instructions import IGNORE_INDEX, Record
from fuseformer.tuning.language_model import TunedModel
from fuseformer.tuning.objectives import make_objective
from fuseformer.tuning.prompts import Room, encode_answer, encode_prompt, shape_prompt
from fuseformer.tuning.sources import corpus_texts
from fuseformer.tuning.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(texts(), 300)
RECORDS = [
    Record("Which?", "fox over dog", "the first answer", "question_answering"),
    Record("Which?", "owls", "second", "question_answering"),
]


def objective(kind, max_length=64, truncation="error"):
    recipe = replace(RECIPE, objective=kind, max_length=max_length, truncation=truncation)
    return make_objective(recipe, TOKENIZER)


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    config = replace(RECIPE, max_length=64).model_config(TOKENIZER.vocab_size)
    return objective(kind).new_model(config).double().eval()


def test_a_causal_record_supervises_its_answer_alone():
    (example, _) = objective("causal", 64).from_records(RECORDS)
    prompt, answer = encode_prompt(RECORDS[0], TOKENIZER), encode_answer(RECORDS[0], TOKENIZER)
    assert example.input_ids == [*prompt, *answer][:-1]
    assert example.targets == [IGNORE_INDEX] * (len(prompt) - 1) + answer


def test_a_record_may_fill_the_model_to_its_last_position():
    (example,) = objective("causal", 64).from_records(RECORDS[:1])
    (same,) = objective("causal", example.tokens).from_records(RECORDS[:1])
    assert same == example
    with pytest.raises(ValueError, match="an answer of 14, the model takes 36 in all"):
        objective("causal", example.tokens - 1).from_records(RECORDS[:1])


def test_a_seq2seq_record_reads_the_prompt_and_writes_the_answer():
    (example, _) = objective("seq2seq", 64).from_records(RECORDS)
    prompt, answer = encode_prompt(RECORDS[0], TOKENIZER), encode_answer(RECORDS[0], TOKENIZER)
    assert example.source_ids == [*prompt[1:], TOKENIZER.eos_id]
    assert example.input_ids == [TOKENIZER.bos_id, *answer[:-1]]
    assert example.targets == answer


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_long_prompt_loses_the_end_of_its_input(kind, capsys):
    short = Record("Which?", "fox", "first", "t")
    record = Record("Which?", "fox " * 80, "first", "t", "mine.jsonl", 3)
    with pytest.raises(
        ValueError, match=r"mine.jsonl, line 3: a prompt of .*, the model takes 6[45]"
    ):
        objective(kind, 64).from_records([short, record])
    with pytest.raises(ValueError, match=r"line 3: .* \(2 more do not fit\)"):
        objective(kind, 64).from_records([record, short, record, record])
    assert capsys.readouterr().err == ""
    _, example = objective(kind, 64, "input").from_records([short, record])
    assert "records: 1 of 2 lost the end of their input" in capsys.readouterr().err
    ids = example.input_ids if kind == "causal" else example.source_ids
    text = TOKENIZER.decode(ids)
    assert text.startswith("Task: Which?\nfox fox")
    assert "fox\nAnswer:" in text
    assert len(ids) > 40
    with pytest.raises(ValueError, match=r"takes 2[45] .*too long even without its input"):
        objective(kind, 24, "input").from_records([replace(record, output="dog " * 30)])


class Watched(TunedModel):
    """Notes the prompts that it is asked to continue or to score answers behind."""

    def generate(self, prompt_ids, max_new_tokens, **sampling):
        self.seen.update(map(tuple, prompt_ids))
        return super().generate(prompt_ids, max_new_tokens, **sampling)

    def score(self, sequences, labels):
        for ids, own in zip(sequences, labels, strict=True):
            self.seen.add(tuple(ids[: own.count(IGNORE_INDEX)]))
        return super().score(sequences, labels)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("task", ["question_answering", "classification"])
@pytest.mark.parametrize("words", [2, 9, 80])
def test_training_evaluation_and_generation_read_one_prompt(kind, task, words):
    records = [Record("Which?", "fox " * words, answer, task) for answer in ("first", "the dog")]
    trained = {
        tuple(e.input_ids[: e.targets.count(IGNORE_INDEX) + 1])
        if kind == "causal"
        else (TOKENIZER.bos_id, *e.source_ids[:-1])
        for e in objective(kind, 64, "input").from_records(records)
    }
    tuned = Watched(model_of(kind), TOKENIZER)
    tuned.seen = set()
    evaluate(tuned, TOKENIZER, records, room=tuned.room, max_new_tokens=60)
    shaped = shape_prompt("Which?", "fox " * words, TOKENIZER, tuned.room, "input")
    assert len(trained) == 1
    assert trained == tuned.seen == {tuple(shaped.prompt)}


def test_documents_of_an_encoder_decoder_are_halved_without_loss():
    made = objective("seq2seq", 10).from_documents(texts(3))
    ids = [token for text in texts(3) for token in TOKENIZER.encode(text)]
    assert [t for e in made for t in (*e.source_ids[:-1], *e.input_ids[1:])] == ids
    assert max(max(len(e.source_ids), len(e.input_ids)) for e in made) <= 10


def test_masked_examples_hide_a_share_and_records_are_refused():
    masked = objective("masked")
    batch = collate(masked.from_documents(texts(8)), seed=3)
    loss, targets = masked.token_losses(model_of("masked"), batch, "none")
    hidden = targets != IGNORE_INDEX
    assert 0.05 < hidden.double().mean() < 0.3
    assert loss[hidden].gt(0).all()
    assert loss[~hidden].eq(0).all()
    with pytest.raises(ValueError, match="cannot answer instructions"):
        masked.from_records(RECORDS)
    with pytest.raises(ValueError, match="cannot write"):
        TunedModel(model_of("masked"), TOKENIZER)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_scores_of_answers_are_the_training_loss(kind):
    model = model_of(kind)
    prompts = [encode_prompt(record, TOKENIZER) for record in RECORDS]
    answers = [encode_answer(record, TOKENIZER) for record in RECORDS]
    scores = TunedModel(model, TOKENIZER).score(
        [p + a for p, a in zip(prompts, answers, strict=True)],
        [[IGNORE_INDEX] * len(p) + a for p, a in zip(prompts, answers, strict=True)],
    )
    own = objective(kind)
    for record, answer, (nll, count) in zip(RECORDS, answers, scores, strict=True):
        loss, _ = own.token_losses(model, collate(own.from_records([record])), "sum")
        assert count == len(answer)
        assert nll == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_tuned_models_can_be_evaluated(kind):
    tuned = TunedModel(model_of(kind), TOKENIZER)
    result = evaluate(tuned, TOKENIZER, RECORDS, room=Room(64, kind == "seq2seq"), max_new_tokens=6)
    assert result.metrics["question_answering"]["perplexity"] > 1
    assert len(result.answers["question_answering"]) == 2


def test_runs_of_tokens_are_kept_from_recurring_where_it_is_asked_for():
    model = model_of("causal")
    prompts = [encode_prompt(record, TOKENIZER) for record in RECORDS]
    free = TunedModel(model, TOKENIZER).generate(prompts, 20)
    kept = TunedModel(model, TOKENIZER, no_repeat=1).generate(prompts, 20)
    assert all(len(set(said)) == len(said) for said in kept)
    assert kept != free


def test_held_out_perplexity_is_without_dropout():
    torch.manual_seed(0)
    config = replace(RECIPE, dropout=0.5).model_config(TOKENIZER.vocab_size)
    own = objective("causal", max_length=48)
    model = own.new_model(config).train()
    values = [held_out_perplexity(model, own, texts(4)) for _ in range(2)]
    assert values[0] == values[1]
    assert model.training


MEASURED = """
import json, sys
from fuseformer.tuning.batches import PackedSampler
from fuseformer.tuning.objectives import make_objective
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.sources import corpus_texts
from fuseformer.tuning.sources import corpus_texts
from fuseformer.tuning.tokenizer import Tokenizer

def learn(path):
    recipe = Recipe(corpus=(path,), vocab_size=1000, max_length=64)
    texts, _ = corpus_texts(recipe)
    tokenizer = Tokenizer.train(texts, recipe.vocab_size)
    examples = make_objective(recipe, tokenizer).from_documents(texts)
    sampler = PackedSampler(examples, tokens_per_batch=512, max_length=64)
    next(sampler)
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

small, big = map(learn, sys.argv[1:])
print(big - small)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
def test_short_lines_take_a_few_times_their_file_in_memory(tmp_path):
    draw, files = random.Random(0), []
    for count in (20_000, 120_000):
        files.append(tmp_path / f"{count}.jsonl")
        with files[-1].open("w") as file:
            for number in range(count):
                text = " ".join(draw.choices(WORDS, k=6))
                file.write(json.dumps({"text": f"{text}{number}"}) + "\n")
    # What a large file needs beyond a smaller one: the working memory of both is the same, and so
    # is the number of texts that a vocabulary is counted from.
    code = "import fuseformer.tuning.tokenizer as t\nt.COUNTED_TEXTS = 10_000\n" + MEASURED
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    small, big = (file.stat().st_size for file in files)
    ratio = int(done.stdout) / (big - small)
    assert ratio < 8


def test_long_work_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuseformer.tuning.progress.PATIENCE", 0)
    train, _ = corpus_texts(replace(RECIPE, corpus=(str(write_corpus(tmp_path / "c.jsonl")),)))
    own = objective("causal")
    Tokenizer.train(train, 300)
    own.from_documents(train)
    own.from_records(RECORDS)
    tuned = TunedModel(model_of("causal"), TOKENIZER)
    evaluate(tuned, TOKENIZER, RECORDS, room=tuned.room, max_new_tokens=2)
    said = capsys.readouterr().err
    for title in ("reading c.jsonl", "counting words", "tokenising", "scoring", "answering"):
        assert f"{title}: 100%" in said, title

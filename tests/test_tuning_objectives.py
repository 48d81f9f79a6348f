"""How text becomes examples of each objective, and what a model is asked for them."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import RECIPE, texts

from fuseformer.tuning.batches import collate
from fuseformer.tuning.commands import held_out_perplexity
from fuseformer.tuning.evaluation import evaluate
from fuseformer.tuning.instructions import IGNORE_INDEX, Record, encode_answer, encode_prompt
from fuseformer.tuning.language_model import TunedModel
from fuseformer.tuning.objectives import make_objective
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
    with pytest.raises(ValueError, match="tokens, the model takes"):
        objective("causal", example.tokens - 1).from_records(RECORDS[:1])


def test_a_seq2seq_record_reads_the_prompt_and_writes_the_answer():
    (example, _) = objective("seq2seq", 64).from_records(RECORDS)
    prompt, answer = encode_prompt(RECORDS[0], TOKENIZER), encode_answer(RECORDS[0], TOKENIZER)
    assert example.source_ids == [*prompt[1:], TOKENIZER.eos_id]
    assert example.input_ids == [TOKENIZER.bos_id, *answer[:-1]]
    assert example.targets == answer


def test_a_long_seq2seq_prompt_keeps_both_ends():
    record = Record("Which?", "fox " * 80, "first", "t")
    with pytest.raises(ValueError, match="the model takes 31 each"):
        objective("seq2seq", 32).from_records([record])
    (example,) = objective("seq2seq", 32, "input").from_records([record])
    prompt = encode_prompt(record, TOKENIZER)[1:]
    assert len(example.source_ids) == 32
    assert example.source_ids[:20] == prompt[:20]
    assert example.source_ids[-8:] == [*prompt[-7:], TOKENIZER.eos_id]
    with pytest.raises(ValueError, match="the model takes 3 each"):
        objective("seq2seq", 4, "input").from_records([replace(record, output="dog " * 9)])


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
    result = evaluate(tuned, TOKENIZER, RECORDS, max_length=64, max_new_tokens=6)
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

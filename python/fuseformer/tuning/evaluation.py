"""Held-out records judged task by task, for any model that can continue and score token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fuseformer.tuning import metrics
from fuseformer.tuning.instructions import (
    DEFAULT_TEMPLATE,
    IGNORE_INDEX,
    PromptTemplate,
    Record,
    TextEncoder,
    encode_answer,
    encode_prompt,
)

CLOSED_TASKS = ("classification", "sentiment")
# The number by which a table compares two models on a task.
MAIN_METRIC = {
    "question_answering": "token_f1",
    "summarisation": "rouge_l",
    "translation": "bleu",
    "writing": "rouge_l",
    **dict.fromkeys(CLOSED_TASKS, "accuracy"),
}


class TextCodec(TextEncoder, Protocol):
    """What evaluation asks of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""


class LanguageModel(Protocol):
    """What evaluation asks of a model."""

    def generate(self, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily; return the new ids alone, up to or past the end token."""

    def score(self, sequences: list[list[int]], labels: list[list[int]]) -> list[tuple[float, int]]:
        """Return, for each sequence, the summed NLL in nats of its labels and how many there are.

        `labels[i][j]` is `sequences[i][j]` where that token counts, given those before it, and -100
        elsewhere; the first token never counts.
        """


@dataclass(frozen=True)
class Answer:
    """A record and what the model answered."""

    record: Record
    text: str


@dataclass
class Evaluation:
    """Metrics by task and name, and the answers they were computed from."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)


def evaluate(
    model: LanguageModel,
    tokenizer: TextCodec,
    records: Sequence[Record],
    *,
    max_length: int,
    max_new_tokens: int = 40,
    tokens_per_batch: int = 8192,
    generate_limit: int | None = None,
    language: str = "en",
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Evaluation:
    """Evaluate a model on the records of each task.

    Every task gets the perplexity of the reference answers given their prompts. Open tasks are
    answered greedily, the first `generate_limit` records of each, and compared by token F1, exact
    match, ROUGE-L, BLEU and chrF as befits the task. Closed tasks (`CLOSED_TASKS`) choose among the
    labels in the records, where there are two, the one whose whole answer, its end included, is
    most probable: this asks what the model knows and not whether it has learned to say nothing
    else, so that a model before tuning is judged as fairly as one after it.

    Prompts are cut from the left, after the first token, where they leave no room for the answer in
    `max_length`. `language` is the one that translations are written in. Raises `ValueError`
    without records.
    """
    if not records:
        raise ValueError("records: got none, want at least one")
    result = Evaluation()
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        prompts = [encode_prompt(record, tokenizer, template) for record in own]
        replies = [encode_answer(record, tokenizer, template) for record in own]
        scores = _score(model, prompts, replies, max_length, tokens_per_batch)
        ours = {
            "perplexity": metrics.perplexity(sum(s for s, _ in scores), sum(n for _, n in scores))
        }
        if task in CLOSED_TASKS and len({record.output for record in own}) < 2:
            result.metrics[task], result.answers[task] = ours, []
            continue  # with one label to choose from, every model would be right
        if task in CLOSED_TASKS:
            texts = _choose(model, tokenizer, own, prompts, template, max_length, tokens_per_batch)
        else:
            own, prompts = own[:generate_limit], prompts[:generate_limit]
            texts = _generate(
                model, tokenizer, prompts, max_new_tokens, max_length, tokens_per_batch
            )
        ours.update(_compare(task, texts, [record.output for record in own], language))
        result.metrics[task] = ours
        result.answers[task] = [Answer(r, text) for r, text in zip(own, texts, strict=True)]
    return result


def corpus_perplexity(
    model: LanguageModel, sequences: Sequence[list[int]], tokens_per_batch: int = 8192
) -> float:
    """Return the perplexity of whole sequences, every token but the first given those before it."""
    total, tokens = 0.0, 0
    for indices in _by_budget([len(sequence) for sequence in sequences], tokens_per_batch):
        part = [sequences[i] for i in indices]
        for nll, count in model.score(part, part):
            total, tokens = total + nll, tokens + count
    return metrics.perplexity(total, tokens)


def _compare(
    task: str, texts: Sequence[str], references: Sequence[str], language: str
) -> dict[str, float]:
    if task in CLOSED_TASKS:
        return {"accuracy": metrics.accuracy(texts, references)}
    if task == "translation":
        return {
            "bleu": metrics.bleu(texts, references, language),
            "chrf": metrics.chrf(texts, references),
        }
    scores = {"rouge_l": metrics.rouge_l(texts, references)}
    if task not in ("summarisation", "writing"):
        scores["token_f1"] = metrics.token_f1(texts, references)
        scores["exact_match"] = metrics.exact_match(texts, references)
    return scores


def _choose(
    model: LanguageModel,
    tokenizer: TextCodec,
    records: Sequence[Record],
    prompts: Sequence[list[int]],
    template: PromptTemplate,
    max_length: int,
    budget: int,
) -> list[str]:
    labels = sorted({record.output for record in records})
    answers = [
        encode_answer(Record("", "", label, records[0].task), tokenizer, template)
        for label in labels
    ]
    longest = max(map(len, answers))
    # Every label is judged after the same prompt, so it is cut for the longest of them.
    fitted = [_fitted(prompt, max_length - longest) for prompt in prompts]
    scores = _score(
        model,
        [prompt for prompt in fitted for _ in labels],
        [answer for _ in fitted for answer in answers],
        max_length,
        budget,
    )
    rows = [scores[i : i + len(labels)] for i in range(0, len(scores), len(labels))]
    return [labels[min(range(len(labels)), key=lambda j: row[j][0])] for row in rows]


def _score(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    max_length: int,
    budget: int,
) -> list[tuple[float, int]]:
    fitted = [_fitted(p, max_length - len(a)) for p, a in zip(prompts, answers, strict=True)]
    results: list[tuple[float, int]] = [(0.0, 0)] * len(fitted)
    lengths = [len(p) + len(a) for p, a in zip(fitted, answers, strict=True)]
    for indices in _by_budget(lengths, budget):
        scored = model.score(
            [fitted[i] + answers[i] for i in indices],
            [[IGNORE_INDEX] * len(fitted[i]) + answers[i] for i in indices],
        )
        for i, score in zip(indices, scored, strict=True):
            results[i] = score
    return results


def _generate(
    model: LanguageModel,
    tokenizer: TextCodec,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    max_length: int,
    budget: int,
) -> list[str]:
    fitted = [_fitted(prompt, max_length - max_new_tokens) for prompt in prompts]
    texts = [""] * len(fitted)
    for indices in _by_budget([len(p) + max_new_tokens for p in fitted], budget):
        replies = model.generate([fitted[i] for i in indices], max_new_tokens)
        for i, ids in zip(indices, replies, strict=True):
            end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            texts[i] = tokenizer.decode(ids[:end]).strip()
    return texts


def _fitted(prompt: list[int], room: int) -> list[int]:
    if room < 1:
        raise ValueError(
            f"max_length: an answer leaves {room} tokens for its prompt, want at least 1"
        )
    return prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]


def _by_budget(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices in batches of at most `budget` tokens once padded, alike lengths together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

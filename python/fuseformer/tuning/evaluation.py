"""Held-out records judged task by task, for any model that can continue and score token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fuseformer.tuning import metrics
from fuseformer.tuning.instructions import IGNORE_INDEX, Record
from fuseformer.tuning.progress import progress
from fuseformer.tuning.prompts import (
    DEFAULT_TEMPLATE,
    EncodedRecord,
    PromptTemplate,
    Room,
    TextEncoder,
    encode_answer,
    encode_records,
    shortened_notice,
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
class Fit:
    """How many records of a task were judged, how many of these with a prompt that was cut.

    `problems` has a line for each record that was left out because it does not fit the model.
    """

    judged: int = 0
    shortened: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """Metrics by task and name, the answers they were computed from, and what did not fit.

    `tokenisers` says, by task and metric, how texts were split into what the metric counts.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    fit: dict[str, Fit] = field(default_factory=dict)
    tokenisers: dict[str, dict[str, str]] = field(default_factory=dict)

    def notices(self, room: Room) -> list[str]:
        """Return a line for each task of which something did not fit."""
        lines = []
        for task, fit in self.fit.items():
            if fit.shortened:
                lines.append(shortened_notice(fit.shortened, fit.judged, task, room.max_length))
            if fit.problems:
                count = fit.judged + len(fit.problems)
                lines.append(
                    f"{task}: {len(fit.problems)} of {count} records left out: {fit.problems[0]}"
                )
        return lines


def evaluate(
    model: LanguageModel,
    tokenizer: TextCodec,
    records: Sequence[Record],
    *,
    room: Room,
    max_new_tokens: int = 40,
    tokens_per_batch: int = 8192,
    generate_limit: int | None = None,
    tokenise: str = "auto",
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Evaluation:
    """Evaluate a model on the records of each task.

    Every task gets the perplexity of the reference answers given their prompts. Open tasks are
    answered greedily, the first `generate_limit` records of each, in at most `max_new_tokens`
    tokens and no more than there is room for, and compared by token F1, exact match, ROUGE-L, BLEU
    and chrF as befits the task. Closed tasks (`CLOSED_TASKS`) choose among the labels in the
    records, where there are two, the one whose whole answer, its end included, is most probable:
    this asks what the model knows and not whether it has learned to say nothing else, so that a
    model before tuning is judged as fairly as one after it.

    Prompts are those of training (`prompts.encode_records`): what does not fit into `room` loses
    the end of its input, and a record whose instruction and answer alone are too long is left out;
    both are counted. `tokenise` is how BLEU splits texts (`metrics.bleu`). Raises `ValueError`
    without records, and where none fits.
    """
    if not records:
        raise ValueError("records: got none, want at least one")
    result = Evaluation()
    tasks = dict.fromkeys(record.task for record in records)
    with progress(len(tasks), "judging", "task") as bar:
        for task in tasks:
            _evaluate_task(
                [record for record in records if record.task == task],
                *(result, model, tokenizer, room, max_new_tokens, tokens_per_batch),
                *(generate_limit, tokenise, template),
            )
            bar.update()
    if not result.metrics:
        first = next(iter(result.fit.values())).problems[0]
        raise ValueError(f"records: none of {len(records)} fits the model; {first}")
    return result


def _evaluate_task(
    records: list[Record],
    result: Evaluation,
    model: LanguageModel,
    tokenizer: TextCodec,
    room: Room,
    max_new_tokens: int,
    tokens_per_batch: int,
    generate_limit: int | None,
    tokenise: str,
    template: PromptTemplate,
) -> None:
    task = records[0].task
    fit = result.fit.setdefault(task, Fit())
    labels = sorted({record.output for record in records}) if task in CLOSED_TASKS else []
    choices = [encode_answer(Record("", "", label, task), tokenizer, template) for label in labels]
    as_trained = encode_records(records, tokenizer, room, "input", template=template)
    own, encoded = [], []
    for record, made in zip(records, as_trained, strict=True):
        if made.problem:
            fit.problems.append(made.problem)
        else:
            own.append(record)
            encoded.append(made)
    prompts: list[list[int]] = []
    if labels:
        own, encoded, prompts = _before_choices(
            own, encoded, choices, tokenizer, room, template, fit.problems
        )
    fit.shortened = sum(made.lost > 0 for made in encoded)
    fit.judged = len(own)
    if not own:
        return
    scores = _score(
        model, [e.prompt for e in encoded], [e.answer for e in encoded], tokens_per_batch
    )
    ours = {"perplexity": metrics.perplexity(sum(s for s, _ in scores), sum(n for _, n in scores))}
    result.metrics[task], result.answers[task] = ours, []
    if len(labels) == 1:
        return  # with one label to choose from, every model would be right
    if labels:
        texts = _choose(model, prompts, labels, choices, tokens_per_batch)
    else:
        own, encoded = own[:generate_limit], encoded[:generate_limit]
        texts = _generate(model, tokenizer, encoded, room, max_new_tokens, tokens_per_batch)
    compared, used = _compare(task, texts, [record.output for record in own], tokenise)
    ours.update(compared)
    if used:
        result.tokenisers[task] = used
    result.answers[task] = [Answer(r, text) for r, text in zip(own, texts, strict=True)]


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
    task: str, texts: Sequence[str], references: Sequence[str], tokenise: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Return scores by metric, and how those that count words split the texts."""
    if task in CLOSED_TASKS:
        return {"accuracy": metrics.accuracy(texts, references)}, {}
    if task == "translation":
        scores = {
            "bleu": metrics.bleu(texts, references, tokenise),
            "chrf": metrics.chrf(texts, references),
        }
        return scores, {"bleu": metrics.bleu_tokenisers(references, tokenise)}
    scores = {"rouge_l": metrics.rouge_l(texts, references)}
    if task not in ("summarisation", "writing"):
        scores["token_f1"] = metrics.token_f1(texts, references)
        scores["exact_match"] = metrics.exact_match(texts, references)
    used = metrics.word_tokenisers(references)
    return scores, {name: used for name in scores if name != "exact_match"}


def _before_choices(
    records: list[Record],
    encoded: list[EncodedRecord],
    choices: Sequence[list[int]],
    tokenizer: TextCodec,
    room: Room,
    template: PromptTemplate,
    problems: list[str],
) -> tuple[list[Record], list[EncodedRecord], list[list[int]]]:
    """Return the records that every choice fits behind, as they are, and the prompts to choose by.

    Every label is judged after the same prompt, which leaves room for the longest of them.
    """
    longest = max(map(len, choices))
    common = encode_records(
        records, tokenizer, room, "input", template=template, answer_tokens=longest
    )
    own, fitting, prompts = [], [], []
    for record, made, other in zip(records, encoded, common, strict=True):
        if other.problem:
            problems.append(other.problem)
            continue
        own.append(record)
        fitting.append(made)
        prompts.append(other.prompt)
    return own, fitting, prompts


def _choose(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    labels: Sequence[str],
    choices: Sequence[list[int]],
    budget: int,
) -> list[str]:
    """Return the label behind each prompt whose tokens, among `choices`, are the likeliest."""
    scores = _score(
        model,
        [prompt for prompt in prompts for _ in labels],
        [choice for _ in prompts for choice in choices],
        budget,
    )
    rows = [scores[i : i + len(labels)] for i in range(0, len(scores), len(labels))]
    return [labels[min(range(len(labels)), key=lambda j: row[j][0])] for row in rows]


def _score(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    budget: int,
) -> list[tuple[float, int]]:
    results: list[tuple[float, int]] = [(0.0, 0)] * len(prompts)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    with progress(len(prompts), "scoring", "answer") as bar:
        for indices in _by_budget(lengths, budget):
            scored = model.score(
                [prompts[i] + answers[i] for i in indices],
                [[IGNORE_INDEX] * len(prompts[i]) + answers[i] for i in indices],
            )
            for i, score in zip(indices, scored, strict=True):
                results[i] = score
            bar.update(len(indices))
    return results


def _generate(
    model: LanguageModel,
    tokenizer: TextCodec,
    encoded: Sequence[EncodedRecord],
    room: Room,
    max_new_tokens: int,
    budget: int,
) -> list[str]:
    texts = [""] * len(encoded)
    # What is written is limited by the room behind a prompt; a prompt is never cut for it.
    by_limit: dict[int, list[int]] = {}
    for i, made in enumerate(encoded):
        limit = min(max_new_tokens, room.for_new_tokens(len(made.prompt)))
        by_limit.setdefault(limit, []).append(i)
    with progress(len(encoded), "answering", "record") as bar:
        for limit, members in by_limit.items():
            lengths = [len(encoded[i].prompt) + limit for i in members]
            for places in _by_budget(lengths, budget):
                indices = [members[place] for place in places]
                replies = model.generate([encoded[i].prompt for i in indices], limit)
                for i, ids in zip(indices, replies, strict=True):
                    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
                    texts[i] = tokenizer.decode(ids[:end]).strip()
                bar.update(len(indices))
    return texts


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

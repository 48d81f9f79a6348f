"""What a run trains on and what it is judged by: records of each task, a corpus, no overlap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fuseformer.tuning.corpora import Docstring, Document, Pair, docstrings, topics, translations
from fuseformer.tuning.instructions import Record
from fuseformer.tuning.splitting import HeldOutText, is_held_out, normalised, stable_hash
from fuseformer.tuning.tasks import (
    CLASSIFICATION,
    DEFAULT_TASKS,
    INPUT_CHARACTERS,
    QUESTION_ANSWERING,
    SUMMARISATION,
    TASKS,
    TRANSLATION,
    WRITING,
    Item,
    classification,
    group_docstrings,
    question_answering,
    summarisation,
    translation,
    writing,
)


@dataclass
class Split:
    """Records to train on, records held out, and a corpus to pretrain on that has none of these."""

    train: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    corpus: list[Document] = field(default_factory=list)

    def of_task(self, task: str, part: str = "train") -> list[Record]:
        """Return the records of one task; `part` is "train" or "held_out"."""
        return [r for r in (self.train if part == "train" else self.held_out) if r.task == task]


def mixture(records: Sequence[Record], repeat: Mapping[str, int]) -> list[Record]:
    """Repeat the records of each task as often as `repeat` says, once where it is silent.

    A task of one-word answers needs more records than one of sentences to be heard as well. 0 drops
    a task. Raises `ValueError` for a number below 0 and for a task without records.
    """
    tasks = {record.task for record in records}
    for task, times in repeat.items():
        if task not in tasks or times < 0:
            raise ValueError(
                f"repeat: got {times} for {task!r}, want at least 0 for one of {sorted(tasks)}"
            )
    return [record for record in records for _ in range(repeat.get(record.task, 1))]


def build_split(
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    language: str = "fr",
    held_out_fraction: float = 0.1,
    train_per_task: int = 2000,
    held_out_per_task: int = 320,
    seed: int = 0,
) -> Split:
    """Build the tasks and a pretraining corpus that shares nothing with what is held out.

    Groups of texts are held out by a hash of their content, the same for all tasks. Training
    records and paragraphs of the corpus that repeat a text held out for any task, or
    `OVERLAP_WORDS` of its words in a row, are dropped. Each task is thinned to at most
    `train_per_task` and `held_out_per_task` records, classification with equally many of each
    label. Raises `ValueError` for an unknown task.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: got {task!r}, want some of {', '.join(TASKS)}")
    documentation = docstrings()
    groups = group_docstrings(documentation)
    pages = topics()
    pairs = translations(language) if TRANSLATION in tasks else ()
    makers: dict[str, Callable[[], list[Item]]] = {
        QUESTION_ANSWERING: lambda: question_answering(documentation, groups),
        SUMMARISATION: lambda: summarisation(documentation, groups),
        CLASSIFICATION: lambda: classification(documentation, groups),
        TRANSLATION: lambda: translation(pairs),
        WRITING: lambda: writing(pages),
    }
    # What any task holds out is kept from training: the corpus may be that of a base for them all.
    made = {task: makers[task]() for task in TASKS}
    split = Split()
    kept_out: list[Item] = []
    for task in dict.fromkeys((*tasks, *TASKS)):
        out = [item for item in made[task] if is_held_out(item.group, held_out_fraction, seed)]
        out = _thinned(out, held_out_per_task, seed)
        kept_out += out
        split.held_out += [item.record for item in out if task in tasks]
    secret = HeldOutText(text for item in kept_out for text in item.texts)
    for items in (made[task] for task in dict.fromkeys(tasks)):
        rest = [
            item
            for item in items
            if not is_held_out(item.group, held_out_fraction, seed)
            and not any(map(secret.leaks_into, item.texts))
        ]
        split.train += [item.record for item in _thinned(rest, train_per_task, seed)]
    split.corpus = _corpus(pages, documentation, groups, pairs, secret, held_out_fraction, seed)
    return split


def _thinned(items: list[Item], limit: int, seed: int) -> list[Item]:
    """Take `limit` items in an order fixed by their content, as many of each label."""
    order = sorted(items, key=lambda item: stable_hash(repr(item.record), seed))
    by_label: dict[str, list[Item]] = {}
    for item in order:
        label = item.record.output if item.record.task == CLASSIFICATION else ""
        by_label.setdefault(label, []).append(item)
    if not by_label:
        return []
    share = limit
    if len(by_label) > 1:
        share = min(max(1, limit // len(by_label)), min(map(len, by_label.values())))
    return [item for label in sorted(by_label) for item in by_label[label][:share]]


def _corpus(
    pages: Sequence[Document],
    documentation: Sequence[Docstring],
    groups: Sequence[str],
    pairs: Sequence[Pair],
    secret: HeldOutText,
    fraction: float,
    seed: int,
) -> list[Document]:
    documents = [Document(page.source, secret.without_leaks(page.text)) for page in pages]
    seen: set[str] = set()
    for item, group in zip(documentation, groups, strict=True):
        if is_held_out(group, fraction, seed) or normalised(item.text) in seen:
            continue
        seen.add(normalised(item.text))
        text = secret.without_leaks(item.text)
        if text:
            named = Document(f"docstring:{item.path}", f"{item.path}\n{text}", group)
            # Also the other way round: what a text is about is learned from naming its owner.
            opening = text[:INPUT_CHARACTERS]
            documents += [named, Document(f"named:{item.path}", f"{opening}\n{item.path}", group)]
    # The other language is read before it is to be written; the pairs themselves stay in the task.
    foreign = [pair.target for pair in pairs if not secret.leaks_into(pair.target)]
    documents += [
        Document(f"strings:{start}", "\n".join(foreign[start : start + 32]))
        for start in range(0, len(foreign), 32)
    ]
    return [document for document in documents if document.text]

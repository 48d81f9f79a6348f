"""Instruction tasks made of Python's documentation and of language packs.

Answers are short (at most `ANSWER_WORDS` words) because a model of a few million parameters,
trained for minutes, is to learn them. Items whose answer would be longer are left out rather than
cut, so that every answer ends where a writer ended it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fuseformer.tuning.corpora import (
    LANGUAGES,
    PLACEHOLDER,
    Docstring,
    Document,
    Pair,
)
from fuseformer.tuning.instructions import Record
from fuseformer.tuning.splitting import group_by_shared_keys, ngrams, normalised, words

QUESTION_ANSWERING = "question_answering"
SUMMARISATION = "summarisation"
TRANSLATION = "translation"
CLASSIFICATION = "classification"
WRITING = "writing"
DEFAULT_TASKS = (QUESTION_ANSWERING, SUMMARISATION, TRANSLATION, CLASSIFICATION)
TASKS = (*DEFAULT_TASKS, WRITING)

ANSWER_WORDS = 16
INPUT_WORDS = 60
INPUT_CHARACTERS = 480
CLASSIFICATION_WORDS = 40  # the opening says what a text is about
TRANSLATION_WORDS = 8
GROUPING_WORDS = 12
CLASSIFY_INSTRUCTION = "Which topic is this documentation about?"

# What a module is about, for the modules that every supported Python has. The labels are single
# common words, so that an answer is one token or two.
MODULES_OF_TOPIC = {
    "windows": "tkinter idlelib turtle curses",
    "processes": "asyncio multiprocessing threading concurrent queue subprocess selectors sched",
    "mail": "email mailbox imaplib poplib smtplib mimetypes quopri",
    "network": "http urllib xmlrpc wsgiref socket socketserver ssl ftplib webbrowser ipaddress",
    "numbers": "_pydecimal decimal statistics fractions numbers random datetime _pydatetime "
    "calendar zoneinfo _strptime heapq bisect colorsys",
    "files": "pathlib os shutil tarfile zipfile tempfile posixpath ntpath genericpath gzip bz2 "
    "lzma _pyio glob fnmatch filecmp fileinput stat mmap _compression",
    "testing": "unittest doctest bdb pdb traceback logging trace timeit profile cProfile pstats "
    "tracemalloc warnings faulthandler",
    "language": "importlib inspect ast typing enum dis symtable tokenize pkgutil types abc "
    "dataclasses functools collections _collections_abc contextlib operator weakref copy",
}
TOPIC_OF_MODULE = {
    module: topic for topic, modules in MODULES_OF_TOPIC.items() for module in modules.split()
}
LABELS = tuple(sorted(MODULES_OF_TOPIC))
_MODULE_NAMES = re.compile(
    r"\b(" + "|".join(sorted((*TOPIC_OF_MODULE, "Tkinter", "Tk", "IDLE"), key=len)[::-1]) + r")\b"
)
_SIGNATURE = re.compile(r"^[\w.\[\]]+\(|->|^[\w.]+ *[=:]|^[-=*>#]")
_RETURNS = re.compile(r"(?:^|(?<=[.!?] ))(Returns? [^.]+\.)(?= |$)")


@dataclass(frozen=True)
class Item:
    """A record, the group of texts it was made from, and the texts that give its answer away."""

    record: Record
    group: str
    texts: tuple[str, ...]


def first_paragraph(text: str) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring on one line."""
    return re.split(r"(?<=[.!?]) (?=[A-Z`*'\"(])", first_paragraph(text), maxsplit=1)[0]


def shortened(text: str, limit: int) -> str:
    """Return the first `limit` words of a text on one line, and no example session after them."""
    line = " ".join(text.split(">>>")[0].split()[:limit])
    # Tables of numbers are few words and many tokens.
    return line if len(line) <= INPUT_CHARACTERS else line[:INPUT_CHARACTERS].rsplit(" ", 1)[0]


def _is_answer(text: str) -> bool:
    return 3 <= len(text.split()) <= ANSWER_WORDS and not _SIGNATURE.search(text)


def _head(item: Docstring) -> str:
    """Return the line that defines a function, shortened: what a question shows of it."""
    return shortened(f"def {item.name.rsplit('.', 1)[-1]}{item.signature}", 12)


def group_docstrings(items: Sequence[Docstring]) -> list[str]:
    """Return the group of each docstring; near duplicates share one.

    Docstrings are joined that have the same words, the same first paragraph or sentence, a common
    opening or ending of `GROUPING_WORDS` words, or as many words of their signatures in a row as
    count as a leak. The name of a group is the first text in it.
    """
    keys = []
    for item in items:
        sequence = words(item.text)
        own = {normalised(item.text), normalised(first_paragraph(item.text))}
        own.add(normalised(first_sentence(item.text)))
        if len(sequence) >= GROUPING_WORDS:
            own |= {
                " ".join(sequence[:GROUPING_WORDS]),
                " ".join(sequence[-GROUPING_WORDS:]),
            }
        own |= {f"signature {run}" for run in ngrams(_head(item))}
        keys.append(own - {""})
    return [normalised(items[root].text) for root in group_by_shared_keys(keys)]


def question_answering(items: Sequence[Docstring], groups: Sequence[str]) -> list[Item]:
    """Ask what a function does, given its signature, and what it returns, given its docstring.

    The first kind is answered by the docstring's first sentence, which the prompt does not hold;
    the second by the sentence of the docstring that begins with "Return".
    """
    made = []
    for item, group in zip(items, groups, strict=True):
        if item.kind != "function":
            continue
        answer = first_sentence(item.text)
        if _is_answer(answer):
            question = f"What does {item.path} do?"
            head = _head(item)
            record = Record(question, head, answer, QUESTION_ANSWERING)
            made.append(Item(record, group, (item.text, answer, head)))
        later = " ".join(item.text.split())[len(answer) :]
        found = _RETURNS.search(later.strip())
        if found and _is_answer(found[1]):
            text = shortened(item.text, INPUT_WORDS)
            if found[1] in text:
                question = f"What does {item.path} return?"
                record = Record(question, text, found[1], QUESTION_ANSWERING)
                made.append(Item(record, group, (item.text, found[1])))
    return made


def summarisation(items: Sequence[Docstring], groups: Sequence[str]) -> list[Item]:
    """Ask for the first sentence of a docstring, given the paragraphs after its first."""
    made = []
    for item, group in zip(items, groups, strict=True):
        parts = re.split(r"\n\s*\n", item.text.strip(), maxsplit=1)
        answer = first_sentence(item.text)
        if len(parts) == 2 and len(parts[1].split()) >= 10 and _is_answer(answer):
            text = shortened(parts[1], INPUT_WORDS)
            if text and normalised(answer) not in normalised(text):
                record = Record("Summarise this documentation.", text, answer, SUMMARISATION)
                made.append(Item(record, group, (item.text, answer)))
    return made


def classification(items: Sequence[Docstring], groups: Sequence[str]) -> list[Item]:
    """Ask for the topic of a docstring: what its module is about, one of `LABELS`.

    The names of all these modules are replaced by one sign in every input, and the docstring's own
    name is not shown: an answer must come from what the text says. Texts found under two topics are
    left out. Topics are not balanced here; `dataset.build_split` takes the same number of each.
    """
    topics_of_group: dict[str, set[str]] = {}
    for item, group in zip(items, groups, strict=True):
        topic = TOPIC_OF_MODULE.get(item.module.split(".")[0])
        if topic is not None:
            topics_of_group.setdefault(group, set()).add(topic)
    made, seen = [], set()
    for item, group in zip(items, groups, strict=True):
        topic = TOPIC_OF_MODULE.get(item.module.split(".")[0])
        text = shortened(_MODULE_NAMES.sub(PLACEHOLDER, item.text), CLASSIFICATION_WORDS)
        key = normalised(text)
        if topic is None or len(topics_of_group[group]) > 1 or len(words(text)) < 8 or key in seen:
            continue
        seen.add(key)
        record = Record(CLASSIFY_INSTRUCTION, text, topic, CLASSIFICATION)
        made.append(Item(record, group, (item.text, text)))
    return made


def translation(pairs: Sequence[Pair]) -> list[Item]:
    """Ask for the translation of short strings; strings that differ little share a group."""
    short = [
        pair
        for pair in pairs
        if len(pair.source.split()) <= TRANSLATION_WORDS
        and len(pair.target.split()) <= 2 * TRANSLATION_WORDS
        and words(pair.source)
        and words(pair.target)
    ]
    # Endings are cut so that a plural or a different order of words makes no new string.
    keys = [
        (
            "source " + " ".join(sorted(word[:6].rstrip("s") for word in words(pair.source))),
            "target " + normalised(pair.target),
        )
        for pair in short
    ]
    roots = group_by_shared_keys(keys)
    made = []
    for pair, root in zip(short, roots, strict=True):
        instruction = f"Translate to {LANGUAGES[pair.language][0]}."
        record = Record(instruction, pair.source, pair.target, TRANSLATION)
        made.append(Item(record, normalised(short[root].source), (pair.source, pair.target)))
    return made


def writing(documents: Iterable[Document]) -> list[Item]:
    """Ask to continue a paragraph of prose, given its first half."""
    made = []
    for document in documents:
        for part in re.split(r"\n\s*\n", document.text):
            sequence = part.split()
            if len(sequence) >= 2 * ANSWER_WORDS and part[0].isalpha():
                start, rest = sequence[:ANSWER_WORDS], sequence[ANSWER_WORDS : 2 * ANSWER_WORDS]
                record = Record("Continue this text.", " ".join(start), " ".join(rest), WRITING)
                made.append(Item(record, normalised(part), (part,)))
    return made

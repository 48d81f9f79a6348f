"""What a recipe trains on, and what its runs are judged by."""

from collections.abc import Iterable

from fuseformer.tuning.corpora import Document, documents_of
from fuseformer.tuning.dataset import Split, build_split, mixture
from fuseformer.tuning.instructions import Record, read_records
from fuseformer.tuning.readers import check_readable
from fuseformer.tuning.recipe import PATHS, Recipe
from fuseformer.tuning.splitting import is_held_out, normalised


def corpus_texts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the documents to pretrain on, and those kept to judge by, drawn by their content."""
    documents = documents_of(recipe.corpus) if recipe.corpus else _made(recipe).corpus
    return divided(documents, recipe.held_out_share)


#: Characters by which a document is known: what begins alike stays on one side.
OPENING = 65_536


def divided(documents: Iterable[Document], share: float) -> tuple[list[str], list[str]]:
    """Return the texts of most documents, and of a `share` of them, whole groups at a time.

    Raises `ValueError` where nothing is left to train on.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        key = document.group or normalised(document.text[:OPENING])
        # Another seed than that of the tasks, whose held-out groups are no longer among these.
        parts[is_held_out(key, share, seed=1)].append(document.text)
    if not parts[0]:
        raise ValueError("held_out_share: no document is left to train on; lower it")
    return parts


def check_sources(recipe: Recipe) -> None:
    """Raise `ValueError` for a file of the recipe that is not there, or not what to judge by.

    What is judged by is read now because training, which does not need it, may take days.
    """
    for name in PATHS:
        check_readable(name, getattr(recipe, name))
    for path in recipe.held_out:
        read_records(path)


def _made(recipe: Recipe) -> Split:
    return build_split(recipe.tasks, language=recipe.language, train_per_task=recipe.train_per_task)


def training_records(recipe: Recipe) -> list[Record]:
    """Return the records of an epoch: the user's, or those made of Python's documentation."""
    if recipe.records:
        records = [record for path in recipe.records for record in read_records(path)]
    else:
        records = _made(recipe).train
    return mixture(records, recipe.repeats())


def held_out_records(recipe: Recipe) -> list[Record]:
    """Return the records to judge by; raises `ValueError` where a run names none."""
    if recipe.held_out:
        return [record for path in recipe.held_out for record in read_records(path)]
    if recipe.records:
        raise ValueError(
            "held_out: the run was tuned on its own records and names none to judge by; pass "
            "--records FILE"
        )
    return _made(recipe).held_out

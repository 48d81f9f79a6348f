"""The LSTM baseline learns, ignores padding, and keeps to its budget."""

import random

import pytest
import torch

from fuseformer.tuning.instructions import Record
from fuseformer.tuning.recurrent import RecurrentClassifier, train_recurrent


class Letters:
    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [3 + ord(letter) % 60 for letter in text]


def records(count, seed):
    """Strings of letters; the label says whether an "x" comes before a "y"."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(["first", "second"])
        early, late = "xy" if label == "first" else "yx"
        letters = [early, *draw.choices("abcdef", k=draw.randint(4, 12))]
        letters.insert(draw.randint(1, len(letters)), late)
        made.append(Record("Which?", "".join(letters), label, "classification"))
    return made


def test_it_learns_the_order_of_letters():
    result = train_recurrent(records(500, 0), records(100, 1), Letters(), 64, max_epochs=4)
    assert result.accuracy > 80  # chance is 50
    assert 1 <= result.best_epoch <= result.epochs


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = RecurrentClassifier(20, 3, width=8).eval()
    short = torch.tensor([[4, 5, 6]])
    padded = torch.tensor([[4, 5, 6, 0, 0], [7, 8, 9, 10, 11]])
    alone = model(short, torch.tensor([3]))
    together = model(padded, torch.tensor([3, 5]))
    torch.testing.assert_close(alone[0], together[0])


def test_it_is_repeatable_and_leaves_the_generator_alone():
    data = records(80, 0), records(20, 1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a = train_recurrent(*data, Letters(), 64, max_epochs=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    b = train_recurrent(*data, Letters(), 64, max_epochs=2)
    assert (a.accuracy, a.validation_accuracy) == (b.accuracy, b.validation_accuracy)


def test_time_and_epochs_are_bounds():
    data = records(200, 0), records(20, 1)
    assert train_recurrent(*data, Letters(), 64, max_epochs=1).epochs == 1
    assert train_recurrent(*data, Letters(), 64, max_seconds=0).epochs == 1


def test_data_that_cannot_be_learned_is_refused():
    some = records(10, 0)
    one_label = [Record("Which?", "abc", "first", "classification")] * 4
    for train, held_out in (([], some), (one_label, some), (some, [])):
        with pytest.raises(ValueError, match="at least two labels"):
            train_recurrent(train, held_out, Letters(), 64)

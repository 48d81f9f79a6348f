import pytest
import torch
import torch.nn.functional as F

from fuseformer.models import generate


class Scripted(torch.nn.Module):
    """Serves what `generate` asks of a model, and says what it is told, step by step."""

    def __init__(self, scripts):
        super().__init__()
        self.scripts, self.read, self.asked = scripts, [], None

    def start(self, prompts, new_tokens, start_id=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.asked = (prompts, new_tokens, start_id)
        return torch.tensor([script[0] for script in self.scripts]), None

    def step(self, input_ids, cache):
        self.read.append(input_ids.tolist())
        return torch.tensor([script[len(self.read)] for script in self.scripts])

    def logits(self, hidden):
        return F.one_hot(hidden, 10).float()


def test_each_continuation_ends_at_its_own_first_end():
    model = Scripted([[5, 9, 6, 7], [1, 2, 9, 9], [9, 1, 2, 3]]).train()
    assert generate(model, [[0]] * 3, 4, end_id=9, start_id=8) == [[5], [1, 2], []]
    assert model.asked == ([[0]] * 3, 4, 8)
    assert model.training
    assert len(model.read) == 2  # nothing is read once all have ended


def test_without_an_end_all_tokens_come_back_and_the_last_is_not_read():
    model = Scripted([[5, 9, 6], [1, 2, 9]])
    assert generate(model, [[0]] * 2, 3) == [[5, 9, 6], [1, 2, 9]]
    assert model.read == [[5, 1], [9, 2]]


def test_the_mode_comes_back_after_an_error_too():
    model = Scripted([[5], [1]]).train()
    with pytest.raises(IndexError):
        generate(model, [[0]] * 2, 3)
    assert model.training


def test_nothing_to_do_asks_the_model_nothing():
    model = Scripted([])
    assert generate(model, [], 3) == []
    assert generate(model, [[1], [2]], 0) == [[], []]
    assert model.asked is None

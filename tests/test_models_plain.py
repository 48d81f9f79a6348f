"""The torch.nn twins have the reference models' weights and results."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fuseformer.models import CausalLM, EncoderDecoder, ModelConfig, pack_ids
from fuseformer.models.plain import IGNORED, PlainModel, as_torch

CONFIG = ModelConfig(50, width=16, heads=2, layers=2, hidden=24, max_length=12, dropout=0.0)
SEQUENCES = [[3, 1, 4, 1, 5], [9, 7], [2, 6, 5, 3, 5, 8, 9]]
SOURCES = [[4, 4], [8, 1, 1, 7, 2, 3], [5]]


def padded(sequences, value=0):
    ids = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


@pytest.mark.parametrize("kind", [CausalLM, EncoderDecoder])
def test_loss_and_gradients_are_those_of_the_packed_model(kind):
    torch.manual_seed(0)
    model = kind(CONFIG).double()
    with torch.no_grad():  # norms start out as the identity, which would hide a wrong one
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    twin = PlainModel(model)
    shifted = [[*s[1:], 0] for s in SEQUENCES]
    ids, padding = padded(SEQUENCES)
    sources = padded(SOURCES) if kind is EncoderDecoder else ()
    theirs = twin.loss(ids, padded(shifted, IGNORED)[0], padding, *sources)
    packed, positions, where = pack_ids(SEQUENCES)
    targets = pack_ids(shifted)[0]
    before = pack_ids(SOURCES) if kind is EncoderDecoder else ()
    if before:
        ours = model.loss(*before, packed, positions, targets, where)
    else:
        ours = model.loss(packed, positions, targets, where)
    torch.testing.assert_close(ours, theirs)
    theirs.backward()
    ours.backward()
    named = as_torch({name: p.grad for name, p in model.named_parameters()})
    assert set(named) == {name for name, _ in twin.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(named[name], parameter.grad)

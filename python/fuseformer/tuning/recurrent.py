"""The recurrent baseline: embedding, LSTM, dense layer, trained on the same classification records.

The LSTM reads the same tokens of the same inputs. It gets what helps it: both directions, dropout,
mean and maximum over time, packed sequences, a learning-rate decay, a part of the training records
set aside to choose the best epoch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from fuseformer.tuning.instructions import Record
from fuseformer.tuning.prompts import TextEncoder


class RecurrentClassifier(nn.Module):
    """Embedding, bidirectional LSTM, and a dense layer on the mean and maximum over time."""

    def __init__(
        self, vocab_size: int, classes: int, width: int = 128, dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(4 * width, classes)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits `(batch, classes)` of padded ids `(batch, seq)` and their lengths."""
        embedded = self.dropout(self.embedding(ids))  # (batch, seq, width)
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        real = torch.arange(states.shape[1])[None, :] < lengths[:, None]  # (batch, seq)
        total = states.masked_fill(~real[..., None], 0).sum(1)
        highest = states.masked_fill(~real[..., None], -torch.inf).amax(1)
        pooled = torch.cat([total / lengths[:, None], highest], dim=1)  # (batch, 4 * width)
        return self.dense(self.dropout(pooled))


@dataclass(frozen=True)
class RecurrentResult:
    """What the baseline reached: accuracies in percent, and what it took."""

    accuracy: float
    validation_accuracy: float
    epochs: int
    best_epoch: int
    seconds: float
    parameters: int


def train_recurrent(
    train: Sequence[Record],
    held_out: Sequence[Record],
    tokenizer: TextEncoder,
    vocab_size: int,
    *,
    max_epochs: int = 20,
    max_seconds: float = 60.0,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    patience: int = 4,
    seed: int = 0,
) -> RecurrentResult:
    """Train the baseline on classification records and return its held-out accuracy.

    It stops after `max_epochs`, after `max_seconds`, or when `patience` epochs brought nothing on
    the tenth of the training records kept for validation; the best epoch's weights are the ones
    tested. Raises `ValueError` without records, and for fewer than two labels.
    """
    labels = sorted({record.output for record in train})
    if len(labels) < 2 or not held_out:
        raise ValueError(
            f"train: got {len(train)} records with {len(labels)} labels and {len(held_out)} held "
            "out, want at least two labels and one held out"
        )
    start = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(train)).tolist()
        validation = [train[i] for i in order[: max(1, len(train) // 10)]]
        fitting = [train[i] for i in order[len(validation) :]] or validation
        model = RecurrentClassifier(vocab_size, len(labels))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        batches = _batches(fitting, labels, tokenizer, batch_size)
        checks = _batches(validation, labels, tokenizer, batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, max_epochs * len(batches), eta_min=learning_rate / 20
        )
        best, best_epoch, best_state, epoch = -1.0, 0, model.state_dict(), 0
        while epoch < max_epochs and epoch - best_epoch < patience:
            if epoch and time.monotonic() - start > max_seconds * epoch / (epoch + 1):
                break  # another epoch would not fit
            epoch += 1
            model.train()
            for index in torch.randperm(len(batches)).tolist():
                ids, lengths, targets = batches[index]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(ids, lengths), targets).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            reached = _accuracy(model, checks)
            if reached > best:
                best, best_epoch = reached, epoch
                best_state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(best_state)
        reached = _accuracy(model, _batches(held_out, labels, tokenizer, batch_size))
    size = sum(p.numel() for p in model.parameters())
    return RecurrentResult(reached, best, epoch, best_epoch, time.monotonic() - start, size)


Padded = tuple[Tensor, Tensor, Tensor]


def _batches(
    records: Sequence[Record], labels: Sequence[str], tokenizer: TextEncoder, size: int
) -> list[Padded]:
    # Alike lengths share a batch, so that little of it is padding.
    encoded = [
        (tokenizer.encode(r.input) or [tokenizer.eos_id], labels.index(r.output))
        for r in records
        if r.output in labels
    ]
    encoded.sort(key=lambda pair: len(pair[0]))
    made = []
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        ids = pad_sequence([torch.tensor(ids) for ids, _ in part], batch_first=True)
        lengths = torch.tensor([len(ids) for ids, _ in part])
        made.append((ids, lengths, torch.tensor([label for _, label in part])))
    return made


@torch.no_grad()
def _accuracy(model: RecurrentClassifier, batches: Sequence[Padded]) -> float:
    model.eval()
    right = sum(
        int((model(ids, lengths).argmax(1) == targets).sum()) for ids, lengths, targets in batches
    )
    return 100.0 * right / sum(len(targets) for _, _, targets in batches)

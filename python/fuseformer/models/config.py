"""The sizes of a reference Transformer."""

from dataclasses import dataclass

from ..reference import ACTIVATIONS


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model; every field is checked when it is made.

    `vocab_size` tokens, `layers` blocks of `width` with `heads` heads and a feed-forward part of
    `hidden`; sequences of at most `max_length` tokens. Raises `ValueError` that names the field.
    """

    vocab_size: int
    width: int = 256
    heads: int = 4
    layers: int = 4
    hidden: int = 1024
    max_length: int = 512
    dropout: float = 0.1
    activation: str = "relu"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "heads", "layers", "hidden", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number from 1 up")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width: got {self.width}, expected a multiple of twice the {self.heads} heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected a number from 0 to below 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: got {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )

"""What can be wrong with a model, in a sentence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class ModelError(ValueError):
    """A model cannot be found, loaded, built or trained; the message names it and the remedy."""

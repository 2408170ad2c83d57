"""A model that stages of a study read, before or after training."""

from dataclasses import dataclass, field
from typing import Any

from jax_selftrain import hub, training
from jax_selftrain.config import ModelConfig
from jax_selftrain.models import count_params
from jax_selftrain.study.dag import Stage


@dataclass(frozen=True)
class StudyModel:
    """A model that a stage reads."""

    ref: str
    fingerprint: str | Stage
    """Fingerprint of the model, or the stage that makes it."""
    label: str
    tokenizer: str
    """Fingerprint of the tokenizer, which training does not change."""
    tokenizer_ref: str
    """The model of the study that it was made from; its config and tokenizer exist before any stage has run."""
    options: ModelConfig = field(default_factory=ModelConfig)
    """Its entry in the study."""

    @property
    def stop_id(self) -> int | None:
        """Token that ends its training documents; None: the tokenizer's EOS."""
        return next(iter(self.options.stop_ids or ()), None)

    @property
    def inputs(self) -> dict[str, str | Stage]:
        """Inputs of a stage that reads the model."""
        return {"model": self.fingerprint, "tokenizer": self.tokenizer}


def estimate_cost(model: StudyModel, tokens: int, length: int, *, passes: int) -> dict[str, Any]:
    """Return tokens and FLOPs; a backward pass counts as two passes."""
    decoder = hub.open_model(model.tokenizer_ref).config
    return {"tokens": tokens, "flops": tokens * training.flops_per_token(decoder, length) * passes / 3}


def model_bytes(model: StudyModel) -> int:
    """Return the size of the float32 parameters."""
    return 4 * count_params(hub.open_model(model.tokenizer_ref).config)

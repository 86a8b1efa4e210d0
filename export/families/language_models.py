"""Language models that are read as text encoders: causal, padded on the right, one state kept."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.part import Part, Port

STATE = ("batch_size", "sequence_length")
IDS_AND_MASK = (Port("input_ids", STATE, "int64"), Port("attention_mask", STATE, "int64"))


class _LanguageModel(nn.Module):
    """Attention masks are built here: transformers' own maker of masks does not trace everywhere.

    Args:
        model: Gemma2Model, Qwen3Model or the language part of Qwen2.5-VL.
        layer: Which of its hidden states is given: -1 the last, normed; -2 the one before the last
            layer.
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask),
            use_cache=False,
            output_hidden_states=self.layer != -1,
            return_dict=True,
        )
        return found.last_hidden_state if self.layer == -1 else found.hidden_states[self.layer]

    def _masks(self, attention_mask: Tensor) -> dict[str, Tensor]:
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        distance = place[:, None] - place[None]
        seen = (distance >= 0)[None] & (attention_mask[:, None] > 0)
        window = getattr(self.model.config, "sliding_window", None)
        near = seen if window is None else seen & (distance < window)[None]
        return {"full_attention": self._added(seen), "sliding_attention": self._added(near)}

    def _added(self, seen: Tensor) -> Tensor:
        dtype = self.model.dtype
        zero = torch.zeros((), dtype=dtype, device=seen.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]


def language_model_part(name: str, model: Any, *, layer: int, config: Any) -> Part:
    """A language model as a part.

    Args:
        name: Of the part.
        model: The bare language model, without its head.
        layer: See `_LanguageModel`.
        config: What becomes config.json: of the whole model the pipeline holds.
    """
    width = model.config.hidden_size
    return Part(
        name=name,
        module=_LanguageModel(model, layer),
        inputs=IDS_AND_MASK,
        outputs=(Port("last_hidden_state", (*STATE, str(width))),),
        config={**config.to_dict(), "architectures": [type(model).__name__]},
        sizes={"batch_size": 2, "sequence_length": 11},
        vocabulary=model.config.vocab_size,
    )

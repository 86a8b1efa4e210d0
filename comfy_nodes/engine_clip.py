"""The text encoders of an export as ComfyUI's CLIP. torch; no ComfyUI.

Prompts are encoded as `FewStepRuntime` encodes them: one text for all encoders, cut where it is
too long, and without ComfyUI's "(word:1.2)" weights and embeddings.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.comfy_nodes.engine_calls import MASK, STATES
from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.errors import RuntimeSettingError

Tokens = dict[str, list[str]]
"""Name of a token list -> the text, whole: the engine has tokenizers of its own."""

Conditioning = list[list[Any]]
"""ComfyUI's CONDITIONING: [states (1, L, D), {"pooled_output": ..., ...}] for each prompt."""

WEIGHT = re.compile(r"\([^()]*:\s*[\d.]+\s*\)|\bembedding:\S+")


class FixedWeights(RuntimeSettingError, AttributeError):
    """What changes weights is not there: `hasattr` says no, and who asks all the same is told why.

    ComfyUI looks for a `patcher` on whatever passes a link, and goes on without.
    """


class EngineClip:
    """What ComfyUI's nodes ask of a CLIP, answered by an engine.

    Args:
        engine: With the family's text encoders and tokenizers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> Tokens:
        """The text under the name of every encoder's token list."""
        del return_word_ids, options
        return {name: [text] for name in self._engine.family.tokens}

    def encode_from_tokens_scheduled(
        self,
        tokens: Tokens,
        unprojected: bool = False,
        add_dict: Mapping[str, Any] | None = None,
        show_pbar: bool = True,
    ) -> Conditioning:
        """CONDITIONING of `tokenize`'s answer.

        Raises:
            RuntimeSettingError: The encoders were given different texts.
        """
        del unprojected, show_pbar
        found = self.encode_from_tokens(tokens, return_dict=True)
        return [[found.pop("cond"), {**found, **(add_dict or {})}]]

    def encode_from_tokens(
        self, tokens: Tokens, return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """States alone, with the pooled output, or all of it in a dictionary under "cond"."""
        condition = self._engine.host.encode([self._one_text(tokens)])
        pooled = condition.get(self._engine.family.pooled or "")
        states = torch.from_numpy(condition[STATES]).float()
        if return_dict:
            found: dict[str, Tensor] = {"cond": states}
            if pooled is not None:
                found["pooled_output"] = torch.from_numpy(pooled).float()
            if MASK in condition:
                found["attention_mask"] = torch.from_numpy(condition[MASK])
            return found
        if return_pooled:
            return states, None if pooled is None else torch.from_numpy(pooled).float()
        return states

    def encode(self, text: str) -> Tensor:
        """States of a text."""
        return self.encode_from_tokens(self.tokenize(text))

    def clone(self) -> "EngineClip":
        """Another on the same engine."""
        return EngineClip(self._engine)

    def clip_layer(self, layer_idx: int) -> None:
        """Refused: the layer was chosen when it was exported."""
        raise self._fixed('"CLIP Set Last Layer"')

    def set_tokenizer_option(self, option_name: str, value: Any) -> None:
        """Refused: text lengths are the recipe's."""
        raise self._fixed(f"the tokenizer option {option_name}")

    def add_patches(self, *given: Any, **options: Any) -> None:
        """Refused: weights are fixed."""
        raise self._fixed("a LoRA")

    @property
    def cond_stage_model(self) -> Any:
        """What LoRA loaders look for; an engine has none."""
        raise self._fixed("a LoRA")

    @property
    def patcher(self) -> Any:
        """What hook nodes look for; an engine has none."""
        raise self._fixed("a hook")

    def get_ram_usage(self) -> int:
        """Torch holds nothing of it."""
        return 0

    def _fixed(self, what: str) -> FixedWeights:
        return FixedWeights(
            f"{what} cannot change the text encoders of '{self._engine.name}': the weights of an "
            "engine are fixed; take the node out, or load the prompt's CLIP with a stock loader."
        )

    def _one_text(self, tokens: Mapping[str, list[str]]) -> str:
        texts = {" ".join(filter(None, parts)) for parts in tokens.values()} - {""}
        if len(texts) > 1:
            raise RuntimeSettingError(
                f"'{self._engine.name}' reads one text with all its encoders and got "
                f"{len(texts)} different ones; write the same in every field."
            )
        text = texts.pop() if texts else ""
        if found := WEIGHT.search(text):
            logging.getLogger(__name__).warning(
                "'%s' reads %r as plain text: weights and embeddings are ComfyUI's own CLIP's.",
                self._engine.name,
                found[0],
            )
        return text

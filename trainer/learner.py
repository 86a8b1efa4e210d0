"""One set of parameters with its optimizer: accumulate, clip, step; and its exact state."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[], tuple[Tensor, dict[str, float]]]


class Learner:
    """AdamW over some parameters.

    Args:
        parameters: What is trained, in a fixed order.
        learning_rate: Peak rate.
        betas: AdamW's.
        grad_clip: Largest gradient norm.
        scale_loss: Loss scaling, for an fp16 base.
        reduce: Averages gradients over processes, in place; nothing to do in one process.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        grad_clip: float,
        scale_loss: bool,
        reduce: Callable[[Sequence[nn.Parameter]], None] = lambda parameters: None,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate = learning_rate
        self.grad_clip = grad_clip
        self.reduce = reduce
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=0.0
        )
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)

    def update(self, parts: Sequence[Loss], rate_factor: float) -> dict[str, float]:
        """One optimizer step on the mean loss of equal parts.

        Only this learner's parameters get a gradient, whoever else took part in the loss. A
        gradient that is not finite changes nothing; its norm says so.

        Args:
            parts: Each computes one part's loss and metrics; backward runs after each.
            rate_factor: Multiplies the peak learning rate.

        Returns:
            Metrics averaged over the parts, and `health/grad_norm`.
        """
        total: dict[str, float] = {}
        for part in parts:
            loss, metrics = part()
            if loss.requires_grad:
                self.scaler.scale(loss / len(parts)).backward(inputs=self.parameters)
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + value / len(parts)
        self.reduce(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        total["health/grad_norm"] = float(norm)
        if math.isfinite(total["health/grad_norm"]) or self.scaler.is_enabled():
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * rate_factor
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Optimizer state by name; with `load_tensors`, a step continues bit for bit."""
        state = self.optimizer.state_dict()["state"]
        found = {
            f"{index}.{name}": value
            for index, slot in state.items()
            for name, value in slot.items()
        }
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            found["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]])
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key == "scaler":
                state = self.scaler.state_dict()
                state["scale"], state["_growth_tracker"] = float(value[0]), int(value[1])
                self.scaler.load_state_dict(state)
                continue
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": slots})


def warm_cosine(
    progress: float, step_share: float, *, warm: float = 0.05, floor: float = 0.1
) -> float:
    """Rate factor: linear warm-up over the first part, then a cosine down to `floor`.

    Args:
        progress: Share of the stage done before this step, 0 to 1.
        step_share: What one step adds to it.
        warm: Share of the warm-up.
        floor: Factor at the end.
    """
    if progress < warm:
        return min(1.0, (progress + step_share) / warm)
    rest = (progress - warm) / (1.0 - warm)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))

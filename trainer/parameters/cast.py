"""The cast of a run: every role's parameters on one frozen base."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fewstep.errors import AdapterError, ConfigError
from fewstep.trainer.parameters.lora import RoleLayer
from fewstep.trainer.parameters.policies import (
    FullPolicy,
    ParameterPolicy,
    SmallerPolicy,
    UpdatePolicy,
    matching_layers,
)
from fewstep.trainer.parameters.two_time import RoleHeads, TwoTimePolicy
from fewstep.trainer.roles import Role


class Cast:
    """Who plays on a base, with which parameters.

    Args:
        base: The denoiser; it is frozen and gets role layers where roles are added.
        own_networks: Where networks of roles that are not updates of the base are put, by name.

    Attributes:
        policies: How each role is parameterised, by role name.
        modules: Trained parts that are no role's network: discriminator heads, by name.
    """

    def __init__(self, base: nn.Module, own_networks: dict[str, nn.Module]) -> None:
        self.base = base
        self.own_networks = own_networks
        self.policies: dict[str, ParameterPolicy] = {}
        self.modules: dict[str, nn.Module] = {}
        self._heads: RoleHeads | None = None
        # by name: an average is not trained, but follows what its student trains
        self._trained: dict[str, frozenset[str]] = {}
        base.requires_grad_(False)

    def add(self, role: Role, policy: ParameterPolicy, generator: torch.Generator) -> None:
        """Give a role its parameters; it changes nothing until trained.

        Raises:
            ConfigError: A target matches no layer, or nothing can be trained.
        """
        self.policies[role.name] = policy
        if isinstance(policy, FullPolicy | SmallerPolicy):
            network = policy.network(self.base)
            self.own_networks[role.name] = network
            trained = (name for name, p in network.named_parameters() if p.requires_grad)
            self._trained[role.name] = frozenset(trained)
            return
        if isinstance(policy, TwoTimePolicy):
            if self._heads is None:
                self._heads = RoleHeads(self.base)
            device = next(self.base.parameters()).device
            self._heads.add(role.name, policy.hidden, generator, device)
            policy = policy.lora
        assert isinstance(policy, UpdatePolicy)
        found = False
        for path in matching_layers(self.base, policy.targets):
            layer = self._layer(path)
            update = policy.update(layer.base, generator)
            if update is not None:
                layer.updates[role.name] = update
                found = True
        if not found:
            raise ConfigError(
                f"no layer matching {list(policy.targets)} can take a {type(policy).__name__}"
            )

    def _layer(self, path: str) -> RoleLayer:
        module = self.base.get_submodule(path)
        if isinstance(module, RoleLayer):
            return module
        assert isinstance(module, nn.Linear | nn.Conv2d)
        parent, _, name = path.rpartition(".")
        layer = RoleLayer(module)
        self.base.get_submodule(parent).register_module(name, layer)
        return layer

    def has(self, role: Role) -> bool:
        """Whether a role has parameters of its own."""
        return role.name in self.policies

    def named(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """The role's own parameters with their names in a file, in a fixed order."""
        own = self.own_networks.get(role.name)
        if own is not None:
            trained = self._trained[role.name]
            yield from ((n, p) for n, p in own.named_parameters() if n in trained)
            return
        for path, module in self.base.named_modules():
            if isinstance(module, RoleLayer) and role.name in module.updates:
                for name, parameter in module.updates[role.name].tensors():  # pyright: ignore
                    yield f"{path}.{name}", parameter
        if self._heads is not None:
            yield from self._heads.named(role.name)

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The role's own parameters, in a fixed order."""
        return [parameter for _, parameter in self.named(role)]

    def tensors(self, role: Role) -> dict[str, Tensor]:
        """File names -> the role's tensors (detached, not copied)."""
        return {name: parameter.detach() for name, parameter in self.named(role)}

    @torch.no_grad()
    def load(self, role: Role, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite a role's tensors.

        Raises:
            AdapterError: Names or shapes differ from the role's.
        """
        mine = dict(self.named(role))
        if set(mine) != set(tensors):
            odd = sorted(set(mine) ^ set(tensors))
            raise AdapterError(
                f"adapter tensors do not match this base: {len(odd)} differ, "
                f"the first is {odd[0]}; train on the same model and lora.targets"
            )
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                raise AdapterError(
                    f"{name} has shape {tuple(tensors[name].shape)}, wanted "
                    f"{tuple(parameter.shape)}; use the lora.rank the file was trained with"
                )
            parameter.copy_(tensors[name])

    def copy(self, target: Role, source: Role) -> None:
        """`target = source`, both of one shape."""
        self.load(target, self.tensors(source))

    @torch.no_grad()
    def blend(self, target: Role, source: Role, keep: float) -> None:
        """`target = keep * target + (1 - keep) * source`: EMA, and IDA's critic pull."""
        pairs = zip(self.parameters(target), self.parameters(source), strict=True)
        for mine, other in pairs:
            mine.lerp_(other, 1.0 - keep)

"""Checks that a model runs only code whose results freezing knows: it reads weights and would ignore any other code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch.nn.modules.module as torch_module
from torch import nn

from vaebm_fast.models import distributions, energy, layers, nvae, vaebm
from vaebm_fast.models.building import skeleton
from vaebm_fast.models.energy import EnergyNetwork
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.models.vaebm import VAEBM
from vaebm_fast.runtime.errors import UserError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of modules without effect on a forward pass in evaluation mode.
FREE = frozenset({"training", "momentum", "config", "track_running_stats"})
# Methods through which torch runs any module.
CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "_conv_forward", "_check_input_dim")
# Functions of `models` that a chain never runs.
UNUSED = frozenset(
    {"elbo", "log_importance_weights", "importance_weighted_bound", "initialize_from_data", "initialize_from"}
    | {"from_preset", "freeze", "channels_last", "bits_per_dim", "num_logits"}
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.Identity)
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ELU, nn.ReLU, nn.Sigmoid)
ABSENT = object()

Definition = tuple[str, Mapping[str, Any], str, Any]  # its name for people; where it stands, its key there, what it is


def _definitions() -> Iterator[Definition]:
    """The code of the plain modules as it is when this module is imported.

    These are functions, classes and numbers of `models`, methods of its classes, and methods through which torch runs
    modules.
    """
    kinds: list[type] = [*CONTAINERS, *LAYERS]
    for module in (layers, distributions, energy, nvae, vaebm):
        for name, value in list(vars(module).items()):
            if name in UNUSED or name.startswith("__") or not isinstance(value, (FunctionType, type, int, float)):
                continue
            yield f"{module.__name__}.{name}", vars(module), name, value
            if isinstance(value, type) and value.__module__ == module.__name__:
                kinds.append(value)
                methods = (FunctionType, property, classmethod, staticmethod)
                for key, member in list(vars(value).items()):
                    if isinstance(member, methods) and key not in UNUSED and not key.startswith("__"):
                        yield f"{value.__name__}.{key}", vars(value), key, member
    for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__ if issubclass(base, nn.Module)):
        for key in CALLS:
            yield f"{base.__name__}.{key}", vars(base), key, vars(base).get(key, ABSENT)


DEFINITIONS = list(_definitions())
METHODS = frozenset(key for _, space, key, _ in DEFINITIONS if not isinstance(space, dict))  # of classes


class _Watched(NamedTuple):
    """A module, what to read of its `__dict__`, what that was, and the methods that must not be there."""

    module: nn.Module
    kind: type
    read: Callable[[dict[str, Any]], tuple[Any, ...]]
    found: tuple[Any, ...]
    methods: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, attributes: Iterable[str]) -> _Watched:
        values = vars(module)
        read = itemgetter("_modules", *HOOKS, *(key for key in attributes if key in values))
        found = tuple(dict(value) if isinstance(value, dict) else value for value in read(values))
        return cls(module, type(module), read, found, METHODS & set(dir(module)))

    @property
    def has_changed(self) -> bool:
        values = vars(self.module)
        try:
            now = self.read(values)
        except KeyError:  # an attribute has gone
            return True
        return now != self.found or type(self.module) is not self.kind or not self.methods.isdisjoint(values)


class KnownCode:
    """The modules of a model, each checked to be what its configuration builds, without hooks or patches.

    Raises UserError naming the first module that is not. Afterwards watches the modules that a chain runs.
    """

    def __init__(self, model: VAEBM | NVAE) -> None:
        self._model = model
        fault = _fault(model)
        if fault is not None:
            raise UserError(f"Freezing reads weights and would ignore code of this model: {fault}. {_advice(model)}")
        self._kind, self._networks = type(model), _parts_of(model)
        vae, *others = self._networks
        run = [vae, *vae.dec_sampler.modules(), *vae.dec_tower.modules(), *vae.post_process.modules()]
        run += [*vae.image_conditional.modules(), *(vae.stem_decoder.modules() if vae.config.is_vanilla else ())]
        run += [module for network in others for module in network.modules()]
        known = (module for network in self._networks for module in skeleton(network.config).modules())
        attributes = {type(module): list(_attributes(module)) for module in known}
        self._watched = [_Watched.of(module, attributes[type(module)]) for module in run]

    @property
    def modules_replaced(self) -> bool:
        """Whether the model has other modules now."""
        return self._networks != _parts_of(self._model) or any(
            module._modules != found[0] for module, _, _, found, _ in self._watched
        )

    @property
    def has_changed(self) -> bool:
        """Whether a module was replaced, added, hooked, patched or given other attributes; about 1 us per module."""
        return (
            type(self._model) is not self._kind
            or self._networks != _parts_of(self._model)
            or any(watched.has_changed for watched in self._watched)
            or _own_code("", self._model) is not None
            or _patched_definition() is not None
            or _has_global_hooks()
        )


def _parts_of(model: VAEBM | NVAE) -> list[Any]:
    return [model] if isinstance(model, NVAE) else [model.vae, model.energy]


def _advice(model: nn.Module) -> str:
    if isinstance(model, NVAE):
        return "Undo that, or sample the NVAE as it is with its decode and pixels."
    return "Undo that, or sample the model as it is, more slowly, with LangevinSampler(model, ..., freeze=False)."


def _fault(model: VAEBM | NVAE) -> str | None:
    """The first code of the model's own, as a clause; None if there is none."""
    networks = _networks(model)
    for name, network, kind in networks:
        if type(network) is not kind:
            return f"{name} is a {_called(type(network))}, not {kind.__name__} itself"
    patched = _patched_definition()
    if patched is not None:
        return f"{patched} is patched"
    if _has_global_hooks():
        return "torch.nn.modules.module has global hooks"
    for name, network, kind in networks:
        fault = _own_code(name, network) if kind is VAEBM else _difference(name, network, skeleton(network.config))
        if fault is not None:
            return fault
    return None


def _networks(model: VAEBM | NVAE) -> list[tuple[str, Any, type]]:
    """Name, network and the class that it must have."""
    if isinstance(model, NVAE):
        return [("vae", model, NVAE)]
    return [("the joint model", model, VAEBM), ("vae", model.vae, NVAE), ("energy", model.energy, EnergyNetwork)]


def _difference(prefix: str, network: nn.Module, expected: nn.Module) -> str | None:
    there = dict(network.named_modules(prefix=prefix, remove_duplicate=False))
    known = dict(expected.named_modules(prefix=prefix, remove_duplicate=False))
    for name, module in known.items():
        fault = _module_difference(name, there[name], module) if name in there else f"{name} is missing"
        if fault is not None:
            return fault
    added = [name for name in there if name not in known]
    return f"{added[0]} is not in its configuration" if added else None


def _module_difference(name: str, module: nn.Module, expected: nn.Module) -> str | None:
    if type(module) is not type(expected):
        return f"{name} is a {_called(type(module))} instead of a plain {type(expected).__name__}"
    fault = _own_code(name, module)
    if fault is not None:
        return fault
    for what in ("_parameters", "_buffers"):
        known = _shapes(getattr(expected, what))
        shapes = {key: shape for key, shape in _shapes(getattr(module, what)).items() if key in known}
        if shapes != known:
            return f"{name} has the tensors {shapes} instead of {known}"
    for key, value in _attributes(expected).items():
        if key != "eps" and getattr(module, key, value) != value:  # freezing reads eps
            return f"{name}.{key} is {getattr(module, key)!r} instead of {value!r}"
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What its forward pass may read besides tensors and submodules."""
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in FREE}


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """None stands for a slot without a tensor."""
    return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}


def _own_code(name: str, module: nn.Module) -> str | None:
    for hooks in HOOKS:
        if getattr(module, hooks):
            return f"{name} has {hooks[1:].replace('_', ' ')}"
    patched = [key for key in vars(module) if key in METHODS and hasattr(type(module), key)]
    return f"{name}.{patched[0]} is patched" if patched else None


def _patched_definition() -> str | None:
    """The first function of a forward pass that is not the one that was imported."""
    return next((name for name, space, key, value in DEFINITIONS if space.get(key, ABSENT) is not value), None)


def _has_global_hooks() -> bool:
    """Whether there are hooks of all modules, other than torch's own, which only observe (FlopCounterMode)."""
    hooks = (hook for kind in HOOKS for hook in getattr(torch_module, f"_global{kind}", {}).values())
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def _called(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

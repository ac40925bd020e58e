"""``pkg.module:factory``: where a command finds the model to look at."""

import argparse
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .arguments import device

FORM = "pkg.module:factory"
RETURNS = "(model, *example inputs), or (loss_fn, params, *batch)"


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the target and the device."""
    parser.add_argument("target", metavar=FORM, help=f"a function without arguments that returns {RETURNS}")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="e.g. cuda (cpu)")


def load(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Any, ...]:
    """What the factory returns, on the device. A bad target ends the command with exit code 2."""
    text: str = arguments.target
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        parser.error(f"target must be {FORM}, e.g. my_models:build_mlp, got {text!r}")
    factory = _attribute(parser, _imported(parser, module_name), name)
    if not callable(factory):
        parser.error(f"target {text!r} must be a function that returns {RETURNS}, it is {_kind(factory)}")
    return _moved(_checked(parser, text, factory()), arguments.device)


def _imported(parser: argparse.ArgumentParser, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and needs another
        parser.error(
            f"target: there is no module {error.name!r}; run this where {name.partition('.')[0]!r} is, "
            "or install it"
        )


def _attribute(parser: argparse.ArgumentParser, module: ModuleType, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            own = [n for n, value in vars(found).items() if _is_factory(value, module.__name__)]
            there = f"; it has {', '.join(own)}" if own else ""
            parser.error(f"target: {module.__name__!r} has no {path!r}{there}")
        found = getattr(found, name)
    return found


def _is_factory(value: Any, module: str) -> bool:
    return isinstance(value, Callable) and getattr(value, "__module__", None) == module  # type: ignore[arg-type]


def _checked(parser: argparse.ArgumentParser, text: str, made: Any) -> tuple[Any, ...]:
    parts = tuple(made) if isinstance(made, tuple | list) else (made,)
    if not parts or not (isinstance(parts[0], nn.Module) or callable(parts[0])):
        parser.error(f"target {text!r} must return {RETURNS}, what it returned is {_kind(made)}")
    if len(parts) == 1:
        parser.error(f"target {text!r} must return {RETURNS}: without inputs nothing can be traced")
    return parts


def _moved(parts: tuple[Any, ...], where: torch.device) -> tuple[Any, ...]:
    def move(value: Any) -> Any:
        return value.to(where) if isinstance(value, Tensor | nn.Module) else value

    return tuple(pytree.tree_map(move, part) for part in parts)


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"of type {kind}: {value!r}" if isinstance(value, int | float | str) else f"of type {kind}"

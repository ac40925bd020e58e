"""The examples in the docstrings of the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import thor_fx
import thor_fx.distributed
import thor_fx.graphs
import thor_fx.inverses
import thor_fx.page
import thor_fx.passes

PACKAGES = (
    thor_fx,
    thor_fx.distributed,
    thor_fx.graphs,
    thor_fx.inverses,
    thor_fx.page,
    thor_fx.passes,
)
NOT_MODULES = {"__main__", *(package.__name__.rpartition(".")[2] for package in PACKAGES[1:])}

# An editable install does not list passes/ under thor_fx: look into both.
MODULES = [
    f"{package.__name__}.{module.name}".removesuffix(".__init__")
    for package in PACKAGES
    for module in [pkgutil.ModuleInfo(None, "__init__", False), *pkgutil.iter_modules(package.__path__)]
    if module.name not in NOT_MODULES
]

NEEDS = {"thor_fx.passes.symmetric_kernel": "triton"}
"""What a module imports that not every installation has."""


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "see the captured output"

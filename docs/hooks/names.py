"""Names that are a function and the module it comes from, such as ``thor_fx.thor``: the function is meant."""

from collections.abc import Iterator
from typing import Any

import griffe


class Names(griffe.Extension):
    """Puts what a package exports in the place of modules of the same name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look up everything that packages export while modules are where they are; then exchange."""
        found = [
            (module, name, exported(module, name))
            for module in packages(pkg)
            for name in module.exports or ()
            if isinstance(name, str)
        ]
        for module, name, target in found:
            module.members[name] = griffe.Alias(name, target, parent=module)


def packages(package: griffe.Module) -> Iterator[griffe.Module]:
    """A package, and those in it."""
    yield package
    for module in package.modules.values():
        if not module.is_alias and module.is_init_module:
            yield from packages(module)


def exported(package: griffe.Module, name: str) -> griffe.Object:
    """What ``package.name`` is after ``import package``."""
    member = package.members[name]
    if member.is_module and f"{member.path}.{name}" == package.imports.get(name):
        member = member.members[name]
    return member.final_target if isinstance(member, griffe.Alias) else member

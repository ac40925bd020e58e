"""Bugs that somebody could write, and the tests that must find each of them.

:data:`BUGS` is the list. ``python tests/seeded_bugs.py`` puts one after the other into a copy of the package,
runs its tests, and prints a table of which found it; it ends with 1 if a bug survives. Parts of what bugs do,
as arguments, choose some. The checkout is not touched.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    """One text in place of another.

    Attributes:
        what: is wrong then.
        path: of a file, from the root.
        right: a text that the file has once.
        wrong: what stands there instead.
        tests: arguments for pytest, in ``tests/``; they pass without the bug.
    """

    what: str
    path: str
    right: str
    wrong: str
    tests: Sequence[str]


BUGS = [
    # --- sites and factors in the graph ---------------------------------------------------------
    Bug(
        "a transposed operand: activations and cotangents change places",
        "passes/contractions.py",
        "yield Site(walk.param, path, gradient, activation=rows_first, cotangent=rows_last)",
        "yield Site(walk.param, path, gradient, activation=rows_last, cotangent=rows_first)",
        ["test_emit_factors.py"],
    ),
    Bug(
        "a dropped shared use: of several uses of a weight only the first is measured",
        "passes/emit_factors.py",
        "found = sum(parts[1:], start=parts[0])",
        "found = parts[0]",
        ["test_embeddings.py", "test_convolutions.py"],
    ),
    Bug(
        "of the cells of a recurrent net only the first two are measured",
        "passes/emit_factors.py",
        "x = torch.cat([operand.read(*own) for operand, own in zip(operands, given, strict=True)])",
        "x = torch.cat([operand.read(*own) for operand, own in [*zip(operands, given, strict=True)][:2]])",
        ["test_emit_factors.py", "test_recurrent.py"],
    ),
    Bug(
        "layers that share rows share whatever is computed from them, counts and factors alike",
        "passes/emit_factors.py",
        "key = repr((what, operands))",
        "key = repr(operands)",
        ["test_shared_factors.py", "test_emit_factors.py"],
    ),
    Bug(
        "the terms of a grouped layer count for one group",
        "passes/emit_factors.py",
        "return count.sum() if count.dim() else count",
        "return count[0] if count.dim() else count",
        ["test_emit_factors.py", "test_experts.py", "test_convolutions.py"],
    ),
    Bug(
        "the corner of a joint bias is 1 and not the number of rows",
        "passes/emit_factors.py",
        "count.expand(total.shape[:-1]).unsqueeze(-1)",
        "torch.ones_like(count).expand(total.shape[:-1]).unsqueeze(-1)",
        ["test_biases.py"],
    ),
    Bug(
        "a summand of a gradient loses its factor",
        "passes/walk.py",
        "(second, scale * sign * alpha)",
        "(second, scale * sign)",
        ["test_walk.py"],
    ),
    Bug(
        "the second piece of a fused weight is taken for the first",
        "passes/walk.py",
        "yield from walk.visit(piece, (*path, Narrow(axis, start, stop)))\n        start = stop",
        "yield from walk.visit(piece, (*path, Narrow(axis, start, stop)))",
        ["test_walk.py", "test_sites.py", "test_emit_factors.py"],
    ),
    Bug(
        "panels of a symmetric product are mirrored from the half that was not computed",
        "passes/panels.py",
        "        out[..., end:, panel] = beside.mT\n",
        "        out[..., end:, panel] = 0\n",
        ["test_products.py"],
    ),
    Bug(
        "every portion of the layers of one shape takes the inverses of the first",
        "thor_fx/inverses/method.py",
        "tuple(part[i] for part in field) for field in fields",
        "tuple(part[0] for part in field) for field in fields",
        ["test_portions.py"],
    ),
    Bug(
        "a tap is taken to see the pixels that only its neighbour sees",
        "passes/shifts.py",
        "(taps < run.taps.stop)",
        "(taps <= run.taps.stop)",
        ["test_convolutions.py"],
    ),
    Bug(
        "patches of a transposed convolution have their taps in the order of a plain one",
        "passes/few_images.py",
        "    seen = seen.flip(axes) if g.transposed else seen\n",
        "",
        ["test_convolutions.py"],
    ),
    Bug(
        "every image of a convolution counts as one row",
        "passes/patches.py",
        "rows = x.shape[0] * math.prod(self._positions(x))\n        return torch.full(",
        "rows = x.shape[0]\n        return torch.full(",
        ["test_convolutions.py"],
    ),
    Bug(
        "lookups of the padding count in an embedding's factor",
        "passes/lookups.py",
        "return kept if self.padding < 0 else kept * (index.flatten() != self.padding)",
        "return kept",
        ["test_embeddings.py"],
    ),
    # --- factors from sums ----------------------------------------------------------------------
    Bug(
        "a missing 1/R: activations are summed and not averaged",
        "thor_fx/factors.py",
        "m.activations / _like(m.rows.clamp(min=1), m.activations)",
        "m.activations",
        ["test_factors.py"],
    ),
    Bug(
        "a missing n: cotangents keep the mean of the loss",
        "thor_fx/factors.py",
        'return terms / loss_scale**2 if fisher == "empirical" else 1 / measured',
        'return 1 / loss_scale**2 if fisher == "empirical" else 1 / measured',
        ["test_factors.py"],
    ),
    Bug(
        "the scale of the loss is taken off G once and not twice",
        "thor_fx/factors.py",
        'return terms / loss_scale**2 if fisher == "empirical"',
        'return terms / loss_scale if fisher == "empirical"',
        ["test_precondition.py", "test_optimizer.py", "test_doors.py"],
    ),
    Bug(
        "drawn labels are summed and not averaged",
        "thor_fx/factors.py",
        'if fisher == "empirical" else 1 / measured',
        'if fisher == "empirical" else 1.0',
        ["test_estimators.py"],
    ),
    Bug(
        "the sides of the transposed use of a tied weight are not exchanged",
        "thor_fx/factors.py",
        "pairs.append(sides if sums.flipped else sides[::-1])",
        "pairs.append(sides[::-1])",
        ["test_both_ways.py", "test_factors.py"],
    ),
    Bug(
        "the weights of two uses of a tied weight are exchanged",
        "thor_fx/factors.py",
        "return _add(a, other_a, 1 / pi), _add(g, other_g, pi)",
        "return _add(a, other_a, pi), _add(g, other_g, 1 / pi)",
        ["test_both_ways.py", "test_factors.py"],
    ),
    # --- damping, inverses, blocks --------------------------------------------------------------
    Bug(
        "a swapped damping: A is damped with what belongs to G",
        "thor_fx/refresh.py",
        "return pi * strength, strength / pi",
        "return strength / pi, pi * strength",
        ["test_damping.py", "test_precondition.py"],
    ),
    Bug(
        "damping of sqrt(lambda) is lambda",
        "thor_fx/refresh.py",
        "strength = lam**0.5",
        "strength = lam",
        ["test_damping.py", "test_precondition.py", "test_golden.py"],
    ),
    Bug(
        "relative damping is relative to the trace and not to the mean eigenvalue",
        "thor_fx/refresh.py",
        "trace(factors, side) / side.dim",
        "trace(factors, side)",
        ["test_damping.py", "test_precondition.py"],
    ),
    Bug(
        "the Schur complement is added and not subtracted",
        "thor_fx/inverses/cholesky.py",
        "corner, corner.mT, alpha=-1)",
        "corner, corner.mT, alpha=1)",
        ["test_damped_inverses.py"],
    ),
    Bug(
        "an inverse that failed is used",
        "thor_fx/inverses/pair.py",
        "return keep(good, inverse, spare).reshape(before.shape)",
        "return inverse.reshape(before.shape)",
        ["test_precondition.py", "test_damped_inverses.py", "test_inverses.py"],
    ),
    Bug(
        "a block that fails is damped no more than before",
        "thor_fx/inverses/attempts.py",
        "return torch.where(failing > 0, more, damping)",
        "return damping",
        ["test_numerics.py"],
    ),
    Bug(
        "a block that never had an inverse stands still",
        "thor_fx/inverses/pair.py",
        "spare = keep(nothing, simple if old.dim() == 2 else torch.diag_embed(simple), old)",
        "spare = old",
        ["test_numerics.py"],
    ),
    Bug(
        "the rest behind the last full block is cut from the beginning",
        "thor_fx/blocks.py",
        "start += count * b\n    return tuple(parts)",
        "start += 0\n    return tuple(parts)",
        ["test_blocks.py"],
    ),
    Bug(
        "EKFAC's second moments forget that the loss is a mean",
        "thor_fx/inverses/ekfac.py",
        "(1 - DECAY) * terms * rotated**2",
        "(1 - DECAY) * rotated**2",
        ["test_ekfac.py"],
    ),
    Bug(
        "Eva subtracts along the curvature without damping",
        "thor_fx/inverses/eva.py",
        "share = along / (lam + a.square()",
        "share = along / (a.square()",
        ["test_eva.py"],
    ),
    Bug(
        "the iteration of Newton and Schulz stops early",
        "thor_fx/inverses/newton_schulz.py",
        "for _ in range(steps(matrices.dtype)):",
        "for _ in range(steps(matrices.dtype) // 2):",
        ["test_newton_schulz.py", "test_damped_inverses.py"],
    ),
    # --- averages and refreshes -----------------------------------------------------------------
    Bug(
        "running averages are not corrected for their start at zero",
        "thor_fx/averages.py",
        "(side[0] / weight if side else None",
        "(side[0] if side else None",
        ["test_averages.py"],
    ),
    Bug(
        "a batch with a NaN enters the averages",
        "thor_fx/averages.py",
        "factors[name] = _map(_chosen(finite[name]), new, old)",
        "factors[name] = new",
        ["test_averages.py"],
    ),
    Bug(
        "a stale inverse: what is inverted are the averages before this step",
        "thor_fx/precondition.py",
        "state = state._replace(memory=memory, failures=state.failures + lost)",
        "memory, state = state.memory, state._replace(memory=memory, failures=state.failures + lost)",
        ["test_averages.py"],
    ),
    Bug(
        "the trace rule compares with the factors of the last step and not with those that were inverted",
        "thor_fx/trace_rule.py",
        "used=torch.where(_mask(layers, refresh, watch.used), watch.seen, watch.used)",
        "used=watch.seen",
        ["test_refresh_rules.py"],
    ),
    Bug(
        "inverses that were computed beside the steps act one step late",
        "thor_fx/overlap.py",
        'return "install" if place == self.lag else "invert"',
        'return "install" if place == self.lag + 1 else "invert"',
        ["test_refresh_async.py"],
    ),
    Bug(
        "staggered portions are all recomputed after the first step of the interval",
        "thor_fx/refresh_rules.py",
        "return starts.index(place) if place in starts else None",
        "return 0 if place in starts else None",
        ["test_refresh_rules.py"],
    ),
    # --- the update -----------------------------------------------------------------------------
    Bug(
        "Nesterov's momentum is the heavy ball's",
        "thor_fx/transform.py",
        "return {name: u + mu * moving[name] for name, u in updates.items()}, new_state",
        "return moving, new_state",
        ["test_transform.py", "test_golden.py"],
    ),
    Bug(
        "a skipped step leaves its mark on the state",
        "thor_fx/skipping.py",
        "return old if new is old else torch.where(finite, new, old)",
        "return new",
        ["test_transform.py"],
    ),
    Bug(
        "a finite update that a parameter cannot hold is written",
        "thor_fx/skipping.py",
        "all_finite(apply_updates({name: params[name] for name in new}, new).values())",
        "all_finite(new.values())",
        ["test_numerics.py"],
    ),
    Bug(
        "a GPU's schedules go on in steps that it skipped",
        "thor_fx/hearing.py",
        "return Heard(counts=False, missed=bool",
        "return Heard(counts=True, missed=bool",
        ["test_hearing.py"],
    ),
    Bug(
        "factors of a step that a GPU skipped are missed although later ones were measured",
        "thor_fx/hearing.py",
        "bool(word & FACTORS) and not any(map(_had_factors, self._words))",
        "bool(word & FACTORS)",
        ["test_hearing.py"],
    ),
    Bug(
        "G keeps the square of the scale of a GradScaler",
        "thor_fx/transform.py",
        "return once if name in plain else once / scale",
        "return once",
        ["test_mixed_precision.py"],
    ),
    Bug(
        "weight decay reaches parameters that the filter excludes",
        "thor_fx/transform.py",
        "u + rate * params[name] if decays(name) else u for name",
        "u + rate * params[name] for name",
        ["test_transform.py", "test_golden.py", "test_steps.py"],
    ),
    Bug(
        "short updates are stretched to the norm that long ones are clipped to",
        "thor_fx/transform.py",
        "largest / norm.clamp_min(largest))",
        "largest / norm)",
        ["test_transform.py", "test_clips.py"],
    ),
    Bug(
        "the bound on the KL divergence takes lr where it has lr^2",
        "thor_fx/clips.py",
        "lr(signals.hyper, name) ** 2 *",
        "lr(signals.hyper, name) *",
        ["test_clips.py"],
    ),
    Bug(
        "the elementwise rule of norms forgets n",
        "thor_fx/precondition.py",
        "scale = gradient**2 / terms + damping",
        "scale = gradient**2 + damping",
        ["test_precondition.py", "test_norms.py", "test_golden.py"],
    ),
    Bug(
        "Adam corrects its second moment with the rate of the first",
        "thor_fx/adam.py",
        "((squares[name] / (1 - b2**t)).sqrt() + EPS)",
        "((squares[name] / (1 - b1**t)).sqrt() + EPS)",
        ["test_steps.py", "test_step_norm.py"],
    ),
    Bug(
        "Levenberg and Marquardt's damping rises where it should fall",
        "thor_fx/levenberg_marquardt.py",
        "damping *= factor\n        elif not ratio >= self.low:\n            damping /= factor",
        "damping /= factor\n        elif not ratio >= self.low:\n            damping *= factor",
        ["test_levenberg_marquardt.py"],
    ),
    Bug(
        "an entry of a stack is read in the place of another",
        "thor_fx/stacked_updates.py",
        "members |= {node: Member(values[-1], entry) for entry, node in enumerate(nodes)}",
        "members |= {node: Member(values[-1], 0) for entry, node in enumerate(nodes)}",
        ["test_stacked_updates.py"],
    ),
    Bug(
        "the entries of a stack are written to the wrong parameters",
        "thor_fx/stacked_updates.py",
        "targets = [part.leaves[role] for part in alike]",
        "targets = [part.leaves[role] for part in reversed(alike)]",
        ["test_stacked_updates.py"],
    ),
    Bug(
        "parameters with different numbers in their updates are stacked",
        "thor_fx/stacked_updates.py",
        "first.setdefault((node.target, repr(args)), node.name)",
        "first.setdefault(node.target, node.name)",
        ["test_stacked_updates.py"],
    ),
    Bug(
        "an operator on stacks of numbers gives them the dtype of whole tensors",
        "thor_fx/stacked_updates.py",
        "and not any(others) and (not others or all(entries))",
        "and not any(others)",
        ["test_stacked_updates.py"],
    ),
    # --- the doors ------------------------------------------------------------------------------
    Bug(
        "two runs in one pass count their terms twice",
        "thor_fx/collector.py",
        "else terms.maximum(known)",
        "else terms + known",
        ["test_compile.py", "test_optimizer.py"],
    ),
    Bug(
        "zero_grad keeps the factors of gradients that it forgets",
        "thor_fx/optimizer.py",
        "super().zero_grad(set_to_none)\n        self._collector.clear()",
        "super().zero_grad(set_to_none)",
        ["test_optimizer.py"],
    ),
    Bug(
        "the mean over ranks enters G once and not twice",
        "thor_fx/distributed/averaging.py",
        "moments._replace(cotangents=moments.cotangents / (self.world.size // self.copies) ** power)",
        "moments._replace(cotangents=moments.cotangents / (self.world.size // self.copies))",
        ["test_distributed.py"],
    ),
    Bug(
        "the triangle that travels is mirrored column by column",
        "thor_fx/distributed/packing.py",
        "places = (low * (2 * d - low - 1))",
        "places = (low * (2 * d - low + 1))",
        ["test_packing.py"],
    ),
]


def copy_with(bug: Bug | None, folder: Path) -> None:
    """The package, laid out as when installed, with one bug or none."""
    shutil.copytree(
        ROOT / "thor_fx", folder / "thor_fx", symlinks=True, ignore=shutil.ignore_patterns("passes")
    )
    shutil.copytree(ROOT / "passes", folder / "thor_fx" / "passes", ignore=shutil.ignore_patterns("passes"))
    if bug is not None:
        path = folder / (bug.path if bug.path.startswith("thor_fx/") else f"thor_fx/{bug.path}")
        path.write_text(with_bug(bug, path.read_text()))


def with_bug(bug: Bug, source: str) -> str:
    """The source of a file with the bug.

    Raises:
        ValueError: the right text is not there once.
    """
    if source.count(bug.right) != 1:
        raise ValueError(f"{bug.path} has {source.count(bug.right)} times: {bug.right}")
    return source.replace(bug.right, bug.wrong)


def pytest_with(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests of the checkout on a copy of the package, up to the first that fails."""
    script = Path(sys.executable).with_name("pytest")  # `python -m pytest` would put the checkout on the path
    chosen = [str(ROOT / "tests" / test) for test in tests]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not inductor and not fuzz"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(script), *options, *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def found_by(bug: Bug) -> str | None:
    """The test that fails with the bug; None if all pass.

    Raises:
        RuntimeError: pytest ran no test, or was stopped.
    """
    with tempfile.TemporaryDirectory() as name:
        copy_with(bug, Path(name))
        done = pytest_with(Path(name), bug.tests)
    if done.returncode not in {0, 1}:
        raise RuntimeError(done.stdout + done.stderr)
    failures = [
        line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))
    ]
    return failures[0].removeprefix("tests/") if done.returncode else None


def main() -> None:
    """Seed bug after bug."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of what the bugs do; all if none is given")
    names = parser.parse_args().names
    chosen = [bug for bug in BUGS if not names or any(name in bug.what for name in names)]
    survivors = []
    print(f"| bug ({len(chosen)}) | in | found by | seconds |\n| --- | --- | --- | --- |")
    for bug in chosen:
        start = time.monotonic()
        test = found_by(bug)
        survivors += [] if test else [bug.what]
        seconds = time.monotonic() - start
        print(f"| {bug.what} | {bug.path} | {test or '**nothing**'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} found")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()

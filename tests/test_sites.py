"""Every use of a weight is found from its gradient; every other parameter has a reason."""

import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import models
import oracle
import thor_fx
from graphs import joint_graph, plain_graph, step_graph
from thor_fx.passes import Input, Param, Tangent, canonicalize, find_sites, outputs, run
from thor_fx.passes.layout import transposed
from thor_fx.passes.sites import UNUSED

BUILDS = pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)


def assert_found(gm, case):
    """What a report says is what the case expects of the parameters that the graph has."""
    report = find_sites(gm)
    present = {d.name for d in outputs.input_nodes(gm) if isinstance(d, Param)}
    assert {name: sites[0].dims for name, sites in report.layers.items()} == case.layers
    assert report.norms == case.norms
    assert set(report.reasons) == set(case.reasons) & present
    for name, text in report.reasons.items():
        assert re.search(case.reasons[name], text), text
    assert (report.nearest and report.nearest.layer) == case.nearest


@BUILDS
@pytest.mark.parametrize("trace", [step_graph, joint_graph, plain_graph])
def test_sites_norms_and_reasons(build, trace):
    assert_found(trace(build), build())


@BUILDS
def test_canonical_graphs_have_the_same_sites(build):
    assert_found(run(step_graph(build), [canonicalize]), build())


@BUILDS
def test_every_parameter_is_in_exactly_one_place(build):
    report = find_sites(step_graph(build))
    with_sites = {site.param for site in report.sites}
    places = [*with_sites, *report.norms, *report.reasons]
    assert sorted(places) == sorted(build().params)


@BUILDS
def test_one_site_for_every_use_with_all_its_rows(build):
    sites = find_sites(step_graph(build)).sites
    found = sorted(
        (transposed(site.layer) if site.flipped else site.layer, site.activation.rows) for site in sites
    )
    expected = sorted((name, use.a.shape[-2]) for name, uses in oracle.uses(build()).items() for use in uses)
    assert found == expected


@BUILDS
def test_both_operands_have_the_same_rows(build):
    for site in find_sites(step_graph(build)).sites:
        assert site.activation.rows == site.cotangent.rows


@BUILDS
def test_the_site_nearest_the_loss_counts_its_terms(build):
    case, report = build(), find_sites(step_graph(build))
    assert (1 if report.nearest is None else report.nearest.activation.rows) == case.terms


def test_the_three_kinds_of_graph_start_backward_in_different_ways():
    tangent, folded, none = joint_graph(models.mlp), step_graph(models.mlp), plain_graph(models.mlp)
    assert outputs.input_nodes(tangent)[Tangent(0)].op == "placeholder"
    assert outputs.input_nodes(folded)[Tangent(0)].op == "call_function"
    assert Tangent(0) not in outputs.input_nodes(none)


def test_find_sites_is_an_analysis():
    gm = step_graph(models.cross_attention)
    text = str(gm.graph)
    assert find_sites(gm) == find_sites(gm)
    assert str(gm.graph) == text


def test_layers_in_order_of_the_parameters():
    assert list(find_sites(step_graph(models.mlp)).layers) == ["0.weight", "2.weight"]


def reasons_of(loss_fn, *shape):
    """The reasons for a parameter ``w`` of this shape."""
    params, x = models.weights(torch.float64, w=shape), models.random(1, torch.float64, 6, 4)
    return find_sites(thor_fx.trace_step(loss_fn, params, x)).reasons


def test_a_reason_names_the_operators_last_first():
    text = reasons_of(lambda p, x: ((x * p["w"]) @ x.T).sin().mean(), 4)["w"]
    assert "its gradient is sum <- mul <- mm" in text


def test_a_penalty_on_a_weight_is_a_reason():
    text = reasons_of(lambda p, x: (x @ p["w"]).sin().mean() + p["w"].square().sum(), 4, 3)["w"]
    assert "mul" in text


def test_a_function_that_is_not_linear_in_the_weight_is_a_reason():
    assert "mul" in reasons_of(lambda p, x: (x @ p["w"].sin()).sin().mean(), 4, 3)["w"]


def test_a_strided_slice_is_a_reason():
    assert "stride" in reasons_of(lambda p, x: (x @ p["w"][:, ::2]).sin().mean(), 4, 4)["w"]


def test_a_weight_whose_transpose_is_used_too_has_marked_sites():
    sites = [site for site in find_sites(step_graph(models.both_ways)).sites if site.param == "w"]
    assert sorted((site.flipped, site.dims, site.path) for site in sites) == [
        (False, (3, 4), ()),
        (True, (3, 4), ()),
    ]


@pytest.mark.parametrize(
    ("part", "shape"),
    [(lambda w: w.T, (4, 5)), (lambda w: w.reshape(5, 4), (5, 2, 2))],
    ids=["transposed", "reshaped"],
)
def test_slices_behind_a_view_do_not_overlap(part, shape):
    """Two slices of a view of a weight share no entry: they are two layers, or the reason is another."""

    def loss_fn(p, x):
        return (x @ part(p["w"])[:2].T).sin().mean() + (x @ part(p["w"])[2:].T).cos().tanh().mean()

    assert "overlap" not in reasons_of(loss_fn, *shape).get("w", "")


def test_overlapping_slices_are_a_reason():
    def loss_fn(p, x):
        return (x @ p["w"][:3].T).sin().mean() + (x @ p["w"][2:].T).cos().tanh().mean()

    assert "overlap" in reasons_of(loss_fn, 5, 4)["w"]


def test_a_frozen_parameter_is_not_called_unused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    params = dict(model.named_parameters())
    gm = thor_fx.trace_step(lambda p, x: functional_call(model, p, (x,)).mean(), params, torch.ones(6, 4))
    assert find_sites(gm).reasons.get("0.weight") != UNUSED


def test_a_flat_graph_whose_backward_computes_activations_again():
    """In a checkpointed block, constants of the forward pass appear in backward: nothing starts there."""

    def build():
        def forward(tap, p, x):
            def block(x):
                scale = torch.full((3,), 2.0, dtype=x.dtype)
                h = tap("a", x, x @ p["a"]).tanh() * scale
                return tap("b", h, h @ p["b"]).tanh()

            return checkpoint(block, x, use_reentrant=False).sum(-1).mean()

        params = models.weights(torch.float64, a=(4, 3), b=(3, 2))
        batch = (models.random(1, torch.float64, 6, 4),)
        layers = {"a": (3, 4), "b": (2, 3)}
        return models.Case("", models.untapped(forward), forward, params, batch, layers, 6, nearest="b")

    assert_found(plain_graph(build), build())


def test_a_graph_described_by_hand_needs_no_trace_step():
    gm = plain_graph(models.f_linear)
    assert list(outputs.input_nodes(gm)) == [Param("w"), Param("b"), Input(0), Input(1)]
    (site,) = find_sites(gm).sites
    assert (site.param, site.layer, site.dims, site.path) == ("w", "w", (3, 4), ())
    assert site.activation.node is outputs.input_nodes(gm)[Input(0)]

"""What second-order training would cost on many devices: a model of traffic, memory and time, no measurement.

    python benchmarks/scaling.py

W ranks train in data parallel: each holds all parameters, has its own data, and nothing is sharded but what
*work sharing* says. Numbers are float32 unless said otherwise; MB and GB are powers of ten.

===============  =========================================================================================
gradients        all-reduced on every step. A ring moves ``2 (W-1)/W`` times the bytes through every rank,
                 in ``2 (W-1) latency + moved / bandwidth`` (Patarasuk & Yuan 2009). They pay one latency:
                 those of further buckets are taken to hide behind backward
factors          the sums of ``A`` and ``G`` of every layer, all-reduced once on a factor step. A symmetric
                 (d, d) is sent as ``d (d+1)/2`` numbers, F blocks of b as ``F b (b+1)/2`` with the last
                 one padded, a diagonal as d. Beside them, in float64: the rows of every layer, and the
                 terms of the loss. Every bucket is a collective and pays its latency; the counts are one
                 more. With ``"gradient"`` a bucket has as much for every rank as layers allow, and is
                 reduce-scattered, half of an all-reduce; what a rank has added up and another one owns is
                 sent there, in one more collective that takes as long as it takes the rank that gets most
refresh          damped inverses by Cholesky, ``b^3`` operations for a block of b
preconditioning  on every step
===============  =========================================================================================

Work sharing; KAISA (Pauloski et al. 2021) calls the last two COMM-OPT and MEM-OPT. DP-KFAC (Zhang et al.
2022) is like the last, but a factor is measured by its owner alone, and none are sent; that is not modelled.

===============  =========================================================================================
``"none"``       every rank inverts everything
``"inverse"``    the inverses of a layer are computed by one rank and broadcast, as triangles, after every
                 refresh. Layers
                 are dealt out by the operations of their inversion, the longest first, each to the rank with
                 the least so far (Graham 1969); a refresh takes as long as the busiest rank
``"gradient"``   a rank keeps the inverses of its own layers only, and applies them: on every step the
                 preconditioned gradients, (out, in) each, are broadcast. Layers are dealt out as above
===============  =========================================================================================

A broadcast of B bytes is passed around a ring, in ``(W-1) latency + B / bandwidth``; those of all owners fill
buckets together. Rings have a latency for every rank; libraries take trees where there are many.

A *step* is forward and backward, the all-reduce of gradients, and preconditioning, one after the other; a
*factor step* also measures, sends and inverts. Both sides leave out scores of attention and what applies an
update to the parameters.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, get_args

from scaling_models import MODELS, Model, layers
from tables import Report, record, table

from thor_fx.costs import cost
from thor_fx.distributed.buckets import BUCKET_BYTES, by_bytes, by_readers
from thor_fx.distributed.delivery import Shares
from thor_fx.distributed.inverse_packing import packed_numbers
from thor_fx.distributed.packing import packed_numel
from thor_fx.distributed.work import Mode
from thor_fx.inverses import METHODS
from thor_fx.layers import Layer
from thor_fx.passes.sides import Side
from thor_fx.refresh_rules import dealt

HERE = Path(__file__).parent
FLOAT32, FLOAT64 = 4, 8  # bytes
SHARINGS: tuple[Mode, ...] = get_args(Mode)


# --- traffic -----------------------------------------------------------------------------------------


def sides_of(layers: Iterable[Layer]) -> list[Side]:
    """The factors that a factor step returns for some layers, those of a coverage or of a model here."""
    return [side for layer in layers for side in layer.measured]


def bytes_of_factors(sides: Iterable[Side], itemsize: int = FLOAT32) -> int:
    """Bytes of all factors as they are sent, without the counts."""
    return itemsize * sum(map(packed_numel, sides))


def bytes_of_counts(layers: Iterable[Layer]) -> int:
    """Bytes of the rows of every layer, by group where they differ, and of the terms of the loss."""
    return FLOAT64 * (1 + sum(prod(sums.rows) for layer in layers for sums in layer.sums))


@dataclass(frozen=True)
class Network:
    """A ring of equal links.

    Attributes:
        name: what tables call it.
        bandwidth: bytes that a rank sends in a second, while it receives as many.
        latency: seconds from a rank to the next one.
    """

    name: str
    bandwidth: float
    latency: float

    def all_reduce(self, size: int, ranks: int, collectives: int = 1) -> float:
        """Seconds of adding up ``size`` bytes of every rank."""
        rounds = 2 * (ranks - 1)
        return collectives * rounds * self.latency + rounds / ranks * size / self.bandwidth

    def deliver(self, shares: Shares, itemsize: int) -> float:
        """Seconds of adding up numbers that one rank each waits for."""
        rounds = len(shares.lengths) - 1
        scattered = rounds * (self.latency + itemsize * shares.piece / self.bandwidth)
        if shares.in_place:
            return scattered
        most = max(shares.moved(rank) for rank, length in enumerate(shares.lengths) if length)
        return scattered + rounds * self.latency + itemsize * most / self.bandwidth

    def broadcast(self, size: int, ranks: int, collectives: int = 1) -> float:
        """Seconds until all ranks have ``size`` bytes, whoever owned them."""
        if ranks == 1:
            return 0.0
        return collectives * (ranks - 1) * self.latency + size / self.bandwidth


NETWORKS = (
    Network("100 Gb/s Ethernet", bandwidth=12.5e9, latency=10e-6),
    Network("400 GB/s NVLink-class", bandwidth=400e9, latency=2e-6),
)


# --- work ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one layer, or several, take.

    Attributes:
        gradient: bytes.
        inverses: bytes, kept between steps.
        sent: bytes of them that tell another rank all: triangles.
        measure: operations of the products ``A`` and ``G``.
        refresh: operations of the inversion.
        precondition: operations on every step.
    """

    gradient: int = 0
    inverses: int = 0
    sent: int = 0
    measure: int = 0
    refresh: int = 0
    precondition: int = 0

    def __iter__(self) -> Iterator[int]:
        return iter(vars(self).values())

    def __add__(self, other: "Work") -> "Work":
        return Work(*(one + two for one, two in zip(self, other, strict=True)))


def work_of(layer: Layer, block_size: int | None) -> Work:
    """What thor_fx says that a layer takes (:mod:`thor_fx.costs`)."""
    added = cost(layer, block_size, FLOAT32)
    refresh = METHODS["cholesky"].work(layer, block_size).refresh_flops
    return Work(
        gradient=FLOAT32 * layer.groups * layer.out * layer.in_,
        inverses=added.state_bytes,
        sent=FLOAT32 * packed_numbers(METHODS["cholesky"], layer, block_size),
        measure=added.factor_flops - refresh,
        refresh=refresh,
        precondition=added.step_flops,
    )


def deal(works: Sequence[Work], ranks: int) -> list[Work]:
    """What every rank owns: the layer that is longest to invert goes to the rank with least, and so on."""
    return [sum((works[place] for place in hand), start=Work()) for hand in hands(works, ranks)]


def hands(works: Sequence[Work], ranks: int) -> list[list[int]]:
    """The places of what every rank owns."""
    return dealt({place: work.refresh for place, work in enumerate(works)}, ranks)


def shares_of(
    layers: Sequence[Layer], block_size: int | None, ranks: int, setting: "Setting"
) -> list[Shares]:
    """What the owners of layers wait for, bucket by bucket."""
    numbers = dict(enumerate(sum(map(packed_numel, sides_of([layer]))) for layer in layers))
    owned = hands([work_of(layer, block_size) for layer in layers], ranks)
    owners = {place: rank for rank, hand in enumerate(owned) for place in hand}
    sizes = {place: setting.itemsize * count for place, count in numbers.items()}
    found = []
    for bucket in by_readers(sizes, owners, ranks, setting.bucket):
        lengths = ranks * [0]
        for place in bucket:
            lengths[owners[place]] += numbers[place]
        found.append(Shares(tuple(lengths)))
    return found


# --- time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is assumed for all models and networks.

    Attributes:
        frequency: steps from one factor step to the next.
        itemsize: bytes of a number of a factor as it is sent; sums are held in float32.
        bucket: bytes.
        flops: operations in a second of float32: factors, inversion, preconditioning.
        model_flops: operations in a second of forward and backward.
    """

    frequency: int = 100
    itemsize: int = FLOAT32
    bucket: int = BUCKET_BYTES
    flops: float = 40e12
    model_flops: float = 400e12

    def buckets(self, size: int) -> int:
        """How many of them ``size`` bytes fill."""
        return ceil(size / self.bucket)

    def of_factors(self, layers: Sequence[Layer]) -> int:
        """How many the factors of layers travel in: one is closed when it is full."""
        sizes = {i: bytes_of_factors(sides_of([layer]), self.itemsize) for i, layer in enumerate(layers)}
        return len(by_bytes(sizes, self.bucket))


@dataclass(frozen=True)
class Case:
    """One model, cut into blocks, on so many ranks.

    Attributes:
        model: what is trained.
        block_size: of the factors; None: whole.
        layers: of the model.
        total: what all of its layers take.
        busiest: what a rank takes at most, of each kind of work, when layers are dealt out.
        ranks: W.
    """

    model: Model
    block_size: int | None
    layers: tuple[Layer, ...]
    total: Work
    busiest: Work
    ranks: int


def cases(model: Model, block_size: int | None, devices: Iterable[int]) -> list[Case]:
    """One model on several numbers of ranks."""
    found = layers(model, block_size)
    works = [work_of(layer, block_size) for layer in found]
    total = sum(works, start=Work())
    return [Case(model, block_size, found, total, _largest(deal(works, ranks)), ranks) for ranks in devices]


def _largest(works: Iterable[Work]) -> Work:
    return Work(*map(max, zip(*works, strict=True)))


@dataclass(frozen=True)
class Times:
    """Seconds on one rank.

    Attributes:
        first_order: forward, backward and the all-reduce of gradients.
        precondition: on every step, with the broadcast of its results.
        measure: of the sums, on a factor step.
        reduce: their sums over all ranks.
        refresh: the inversions of the busiest rank.
        broadcast: of the inverses.
    """

    first_order: float
    precondition: float
    measure: float
    reduce: float
    refresh: float
    broadcast: float

    @property
    def step(self) -> float:
        """A step between factor steps."""
        return self.first_order + self.precondition

    @property
    def factor_step(self) -> float:
        """A step that renews all inverses."""
        return self.step + self.measure + self.reduce + self.refresh + self.broadcast

    def amortised(self, frequency: int) -> float:
        """The mean step."""
        return self.step + (self.factor_step - self.step) / frequency


def times(case: Case, sharing: Mode, network: Network, setting: Setting) -> Times:
    """What the steps of a case take."""
    total, ranks = case.total, case.ranks
    refreshed = total if sharing == "none" else case.busiest
    applied = case.busiest if sharing == "gradient" else total

    def broadcast(size: int, wanted: Mode) -> float:
        return network.broadcast(size, ranks, setting.buckets(size)) if sharing == wanted else 0.0

    return Times(
        first_order=case.model.flops / setting.model_flops
        + network.all_reduce(FLOAT32 * case.model.parameters, ranks),
        precondition=applied.precondition / setting.flops + broadcast(total.gradient, "gradient"),
        measure=total.measure / setting.flops,
        reduce=reduction(case, sharing, network, setting),
        refresh=refreshed.refresh / setting.flops,
        broadcast=broadcast(total.sent, "inverse"),
    )


def reduction(case: Case, sharing: Mode, network: Network, setting: Setting) -> float:
    """Seconds of adding up the factors of all ranks, for all of them or for their owners."""
    layers, ranks = case.layers, case.ranks
    factors, counts = bytes_of_factors(sides_of(layers), setting.itemsize), bytes_of_counts(layers)
    if sharing != "gradient" or ranks == 1:
        return network.all_reduce(factors + counts, ranks, setting.of_factors(layers) + 1)
    shares = shares_of(layers, case.block_size, ranks, setting)
    delivered = sum(network.deliver(one, setting.itemsize) for one in shares)
    return delivered + network.all_reduce(counts, ranks)


def choose(ways: dict[Mode, Times], frequency: int) -> Mode:
    """The work sharing with the shortest mean step; of equals the simplest."""
    return min(ways, key=lambda sharing: ways[sharing].amortised(frequency))


# --- the report ----------------------------------------------------------------------------------------


def report(
    networks: Sequence[Network] = NETWORKS,
    devices: Sequence[int] = (8, 64, 512, 4096),
    block_sizes: Sequence[int | None] = (128, None),
    setting: Setting = Setting(),
    models: Sequence[Model] = MODELS,
) -> Report:
    """Bytes of every model and block size; seconds of every network and number of devices, too."""
    every = [cases(model, b, devices) for model in models for b in block_sizes]
    return {
        "settings": asdict(setting),
        "devices": list(devices),
        "networks": [asdict(network) for network in networks],
        "models": [
            {"model": m.name, "batch": m.batch, "datum": m.datum, "first_order": m.first_order}
            for m in models
        ],
        "bytes": [_bytes(same, setting) for same in every],
        "times": [_times(case, network, setting) for network in networks for same in every for case in same],
    }


def _bytes(same: Sequence[Case], setting: Setting) -> dict[str, Any]:
    case = same[0]
    numbers = case.model.parameters
    sums = FLOAT32 * sum(side.numel for side in sides_of(case.layers))
    sent = bytes_of_factors(sides_of(case.layers), setting.itemsize)
    return {
        **_which(case),
        "layers": len(case.layers),
        "parameters": numbers,
        "parameter_bytes": FLOAT32 * numbers,
        "gradient_bytes": FLOAT32 * numbers,
        "momentum_bytes": FLOAT32 * numbers,
        "adamw_bytes": 2 * FLOAT32 * numbers,
        "inverse_bytes": {
            "none": case.total.inverses,
            "inverse": case.total.inverses,
            "gradient": {str(case.ranks): case.busiest.inverses for case in same},
        },
        "inverse_sent_bytes": case.total.sent,
        "sum_bytes": sums,
        "sent_bytes": sent,
        "count_bytes": bytes_of_counts(case.layers),
        "collectives": setting.of_factors(case.layers) + 1,
        "preconditioned_bytes": case.total.gradient,
    }


def _times(case: Case, network: Network, setting: Setting) -> dict[str, Any]:
    ways = {sharing: times(case, sharing, network, setting) for sharing in SHARINGS}
    chosen = choose(ways, setting.frequency)
    best = ways[chosen]
    return {
        **_which(case),
        "network": network.name,
        "devices": case.ranks,
        "chosen": chosen,
        "ratio": best.amortised(setting.frequency) / best.first_order,
        "ways": {
            sharing: {
                **asdict(way),
                "step": way.step,
                "factor_step": way.factor_step,
                "amortised": way.amortised(setting.frequency),
            }
            for sharing, way in ways.items()
        },
    }


def _which(case: Case) -> dict[str, Any]:
    return {"model": case.model.name, "block_size": case.block_size}


# --- Markdown --------------------------------------------------------------------------------------------


def summary(result: Report) -> str:
    """What is assumed, bytes, and mean steps."""
    parts = [_assumptions(result), *_memory(result), *_traffic(result)]
    for network in result["networks"]:
        parts += _ratios(result, network["name"])
    return "\n\n".join(parts) + "\n"


def markdown(result: Report) -> str:
    """The summary, and the parts of every step."""
    parts = [summary(result).rstrip()]
    for network in result["networks"]:
        parts += _details(result, network["name"])
    return "\n\n".join(parts) + "\n"


def _assumptions(result: Report) -> str:
    setting = result["settings"]
    networks = " and ".join(
        f"{n['name']} ({n['bandwidth'] / 1e9:g} GB/s per device, {n['latency'] * 1e6:g} microseconds)"
        for n in result["networks"]
    )
    batches = "; ".join(f"{m['model']} {m['batch']} ({m['datum']})" for m in result["models"])
    return (
        f"A model, not a measurement. It assumes {networks}; {setting['flops'] / 1e12:g} TFLOP/s of "
        "float32 for factors, inversion and preconditioning, and "
        f"{setting['model_flops'] / 1e12:g} TFLOP/s for forward and backward; a factor step every "
        f"{setting['frequency']} steps; {setting['itemsize']} bytes for a number of a factor that is sent; "
        f"buckets of {setting['bucket'] / 2**20:g} MiB. Data on a device: {batches}."
    )


def _memory(result: Report) -> list[str]:
    head = ["", "blocks", "layers", "parameters", "gradients", "momentum", "AdamW's moments", "inverses"]
    head += [*(f"at {n}" for n in result["devices"]), "factor sums"]
    body = []
    for row in result["bytes"]:
        kept = row["inverse_bytes"]
        values = [row[f"{name}_bytes"] for name in ("parameter", "gradient", "momentum", "adamw")]
        values += [kept["none"], *kept["gradient"].values(), row["sum_bytes"]]
        body.append([*_names(row), str(row["layers"]), *(_number(value / 1e9) for value in values)])
    text = (
        "GB on a device. *Inverses*: all of them, as with work sharing `none` and `inverse`; *at W*: those "
        "of the rank with most, where W ranks keep their own layers only (`gradient`). *Factor sums*: during "
        "a factor step."
    )
    return [text, table(head, body, texts=2)]


def _traffic(result: Report) -> list[str]:
    head = [
        "",
        "blocks",
        "gradients, every step",
        "factors, factor step",
        "collectives",
        "factors over gradients",
    ]
    head += ["inverses (`inverse`), factor step", "preconditioned (`gradient`), every step"]
    body = []
    for row in result["bytes"]:
        sent, gradients = row["sent_bytes"], row["gradient_bytes"]
        others = row["inverse_sent_bytes"], row["preconditioned_bytes"]
        cells = [_number(gradients / 1e6), _number(sent / 1e6), str(row["collectives"])]
        cells += [f"{sent / gradients:.3f}", *(_number(value / 1e6) for value in others)]
        body.append([*_names(row), *cells])
    return ["MB that are reduced or broadcast.", table(head, body, texts=2)]


def _ratios(result: Report, network: str) -> list[str]:
    devices = result["devices"]
    ratios: dict[tuple[str, str], list[str]] = {}
    for row in _on(result, network):
        ratios.setdefault(_names(row), []).append(f"{row['ratio']:.2f} {row['chosen']}")
    text = (
        f"**{network}**: the mean step over a first-order step (forward, backward, gradients), with the work "
        "sharing that makes it shortest, by the number of devices."
    )
    head = ["", "blocks", *map(str, devices)]
    return [text, table(head, [[*names, *cells] for names, cells in ratios.items()], texts=2)]


def _details(result: Report, network: str) -> list[str]:
    head = ["", "blocks", "devices", "first-order", "sum of factors", "factor step", "refresh, all"]
    head += ["refresh, busiest", *(f"mean, {sharing}" for sharing in SHARINGS), "chosen"]
    body = []
    for row in _on(result, network):
        ways = row["ways"]
        best = ways[row["chosen"]]
        values = [best["first_order"], best["reduce"], best["factor_step"]]
        values += [ways["none"]["refresh"], ways["inverse"]["refresh"]]
        values += [ways[sharing]["amortised"] for sharing in SHARINGS]
        cells = [str(row["devices"]), *(_number(1e3 * value) for value in values), row["chosen"]]
        body.append([*_names(row), *cells])
    text = (
        f"**{network}**, ms. *Factor step*: with the work sharing that is chosen; *refresh*: the inversions "
        "of all layers, and those of the busiest rank; *mean*: the mean step, by work sharing."
    )
    return [text, table(head, body, texts=2)]


def _on(result: Report, network: str) -> list[dict[str, Any]]:
    return [row for row in result["times"] if row["network"] == network]


def _names(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], "whole" if row["block_size"] is None else str(row["block_size"])


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# --- the command -----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.bandwidth is None) != (options.latency is None):
        parser.error("give --bandwidth and --latency together")
    setting = Setting(
        options.frequency,
        options.factor_dtype_bytes,
        round(options.bucket * 2**20),
        options.flops,
        options.model_flops,
    )
    networks: Sequence[Network] = NETWORKS
    if options.bandwidth is not None:
        networks = (Network("as given", 1e9 * options.bandwidth, 1e-6 * options.latency),)
    result = report(networks, options.devices, options.block_size, setting)
    print(markdown(result))
    if not options.print:
        save(result, options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--bandwidth", type=float, help="GB/s per device; with --latency, in place of the two networks")
    add("--latency", type=float, help="microseconds from a device to the next")
    add("--devices", type=int, nargs="+", default=[8, 64, 512, 4096])
    add("--block-size", type=_block_size, nargs="+", default=[128, None], help="or None: whole factors")
    add("--frequency", type=int, default=Setting.frequency, help="steps from one factor step to the next")
    add("--factor-dtype-bytes", type=int, choices=(4, 2), default=4, help="of a factor's number that is sent")
    add("--bucket", type=float, default=BUCKET_BYTES / 2**20, help="MiB")
    add("--flops", type=float, default=Setting.flops, help="float32, sustained, in a second")
    add("--model-flops", type=float, default=Setting.model_flops, help="of forward and backward")
    add("--results", type=Path, default=HERE / "results", help="a folder; README.md lies beside it")
    add("--print", action="store_true", help="print only; leave results and README.md")
    return parser


def _block_size(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def save(result: Report, folder: Path) -> None:
    """Write all of it under ``folder``, and its summary into a README beside that."""
    data = json.dumps(result, indent=1) + "\n"
    record(folder, "scaling", markdown(result), data, section=summary(result))


if __name__ == "__main__":
    main()

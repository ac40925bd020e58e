"""The layers of known models, by their shapes alone: nothing is allocated.

Weights of products and convolutions are preconditioned. Embeddings and the heads of language models are left
to the first-order rule, as docs/steps.md advises, and so are biases and norms.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from thor_fx.layers import Layer, Sums
from thor_fx.passes.layout import short_side


@dataclass(frozen=True)
class Shape:
    """Weights of one shape, each a matrix (out, in).

    Attributes:
        name: the parameter's, with ``*`` for the number of the block.
        in_: length of the input side; of a convolution, channels times taps.
        out: length of the output side.
        rows: terms of the contraction, of one datum: positions of a sequence, pixels of the output.
        count: how many weights.
    """

    name: str
    in_: int
    out: int
    rows: int
    count: int = 1

    @property
    def numel(self) -> int:
        """Numbers in one weight."""
        return self.in_ * self.out


@dataclass(frozen=True)
class Model:
    """A model and what a device trains it on.

    Attributes:
        name: what tables call it.
        shapes: of the weights that are preconditioned.
        first_order: how many parameters are left to the first-order rule.
        published: how many parameters the model is known to have.
        batch: data on a device.
        datum: what one of them is.
        head: a product whose weight is left to the first-order rule.
    """

    name: str
    shapes: tuple[Shape, ...]
    first_order: int
    published: int
    batch: int
    datum: str
    head: Shape | None = None

    @property
    def parameters(self) -> int:
        """How many there are."""
        return self.first_order + sum(shape.count * shape.numel for shape in self.shapes)

    @property
    def flops(self) -> int:
        """Of the products of forward and backward on one device: two operations, three times.

        Scores of attention are not among them.
        """
        products = (*self.shapes, self.head) if self.head else self.shapes
        return 6 * self.batch * sum(shape.count * shape.rows * shape.numel for shape in products)


def layers(model: Model, block_size: int | None) -> tuple[Layer, ...]:
    """The layers of ``model`` as thor_fx keeps them, without a limit on the length of a side."""
    return tuple(
        replace(layer, name=name, param=name)
        for shape in model.shapes
        for layer in [_layer(shape, model.batch, block_size)]
        for name in (shape.name.replace("*", str(i)) for i in range(shape.count))
    )


def _layer(shape: Shape, batch: int, block_size: int | None) -> Layer:
    sides = short_side(shape.in_, block_size), short_side(shape.out, block_size)
    rows = batch * shape.rows
    sums = Sums(shape.name, *sides, rows=(), flipped=False, count=rows)
    return Layer(shape.name, shape.name, *sides, path=(), sums=(sums,), uses=1, rows=str(rows))


# --- ResNet-50 -------------------------------------------------------------------------------------

STAGES = ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))
"""``(blocks, channels, pixels on a side of the output)``"""


def resnet50() -> Model:
    """ResNet-50 v1.5 on images of 224 x 224 (He et al. 2016), as torchvision has it."""
    convolutions = tuple(_convolutions())
    shapes = (*convolutions, Shape("fc.weight", 2048, 1000, 1))
    norms = sum(2 * shape.out for shape in convolutions)
    return Model("ResNet-50", shapes, norms + 1000, 25_557_032, batch=32, datum="image of 224 x 224")


def _convolutions() -> Iterator[Shape]:
    yield Shape("conv1.weight", 3 * 7**2, 64, 112**2)
    inputs, before = 64, 56
    for stage, (blocks, width, pixels) in enumerate(STAGES, start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield Shape(f"{name}.conv1.weight", inputs, width, before**2)
            yield Shape(f"{name}.conv2.weight", width * 3**2, width, pixels**2)  # takes the stride
            yield Shape(f"{name}.conv3.weight", width, 4 * width, pixels**2)
            if block == 0:
                yield Shape(f"{name}.downsample.0.weight", inputs, 4 * width, pixels**2)
            inputs, before = 4 * width, pixels


# --- language models -------------------------------------------------------------------------------


def gpt2(name: str, blocks: int, width: int, published: int, batch: int) -> Model:
    """GPT-2 (Radford et al. 2019): q, k and v in one weight, embedding and head the same matrix."""
    vocabulary, length = 50257, 1024
    sides = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    shapes = _blocks("transformer.h.*", sides, length, blocks)
    biases = sum(out for _, out in sides.values())
    norms = 2 * 2 * width
    first_order = (vocabulary + length) * width + blocks * (biases + norms) + 2 * width
    head = Shape("lm_head.weight", width, vocabulary, length)
    return Model(name, shapes, first_order, published, batch, f"sequence of {length}", head)


def llama(
    name: str, blocks: int, width: int, hidden: int, heads: int, groups: int, published: int, batch: int
) -> Model:
    """Llama 2 (Touvron et al. 2023): ``groups`` heads of keys and values; the last layer is not tied."""
    vocabulary, length = 32000, 4096
    shared = width // heads * groups
    sides = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, shared),
        "self_attn.v_proj": (width, shared),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    shapes = _blocks("model.layers.*", sides, length, blocks)
    first_order = 2 * vocabulary * width + (2 * blocks + 1) * width
    head = Shape("lm_head.weight", width, vocabulary, length)
    return Model(name, shapes, first_order, published, batch, f"sequence of {length}", head)


def _blocks(prefix: str, sides: dict[str, tuple[int, int]], rows: int, count: int) -> tuple[Shape, ...]:
    return tuple(Shape(f"{prefix}.{name}.weight", *pair, rows, count) for name, pair in sides.items())


MODELS = (
    resnet50(),
    gpt2("GPT-2 124M", 12, 768, 124_439_808, batch=8),
    gpt2("GPT-2 1.5B", 48, 1600, 1_557_611_200, batch=8),
    llama("Llama 7B", 32, 4096, 11008, 32, 32, 6_738_415_616, batch=1),
    llama("Llama 13B", 40, 5120, 13824, 40, 40, 13_015_864_320, batch=1),
    llama("Llama 70B", 80, 8192, 28672, 64, 8, 68_976_648_192, batch=1),
)

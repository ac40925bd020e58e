"""The kernel of symmetric products: interpreted, compiled for GPUs that are not there, and traced.

What only a GPU can show is marked ``gpu``.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from models import random
from thor_fx.passes import splice
from thor_fx.passes import symmetric as rule
from thor_fx.passes.products import gram, product
from thor_fx.passes.symmetric import worth_it
from training import assert_same, build, by_drop_in_door, by_functional_door

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="this torch has no Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# --- in the interpreter ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    """What ``interpreted_kernel.py`` prints."""
    ran = subprocess.run(
        [sys.executable, HERE / "interpreted_kernel.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in ran.stderr:
        pytest.skip("the interpreter of this Triton is older than this NumPy")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@needs_triton
def test_the_kernel_is_the_product(interpreted: dict[str, dict[str, Any]]):
    """Against float64; the interpreter computes float32 where a GPU would round to TF32."""
    assert len(interpreted) == 14
    for name, found in interpreted.items():
        assert 0 <= found["error"] <= 1, name
        assert found["symmetric"], f"{name}: to the last bit"
        assert (found["shape"], found["dtype"]) == (True, "torch.float32"), name


# --- the tiles -------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("sizes", [range(1, 70), [1999], [2000]], ids=["1 to 69", "1999", "2000"])
def test_every_tile_of_the_lower_half_has_one_program(sizes: Any):
    from thor_fx.passes.symmetric_kernel import tile_of

    for n in sizes:
        found = [tile_of.fn(program, n) for program in range(n * (n + 1) // 2)]
        assert all(0 <= j <= i < n for i, j in found)
        assert len(set(found)) == len(found), n


@needs_triton
def test_small_results_are_cut_along_their_rows():
    from thor_fx.passes.symmetric_kernel import PARTS, PROGRAMS, parts_of

    assert [parts_of(n) for n in (1, 4, 6, 8, 15, 16, 2000)] == [PARTS, PARTS, 4, 2, 1, 1, 1]
    assert all(parts_of(n) * n * (n + 1) // 2 <= max(PROGRAMS, n * (n + 1) // 2) for n in range(1, 100))


# --- compiled, for GPUs that are not there ---------------------------------------------------------

UNITS = {  # the tensor cores of an architecture
    (80, "bf16"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    (80, "fp16"): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    (80, "fp32"): "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    (90, "bf16"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    (90, "fp16"): "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16",
    (90, "fp32"): "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32",
}
SHARED = 99 * 1024  # bytes of one program's memory on the smallest of these GPUs (8.6, 8.9)


@needs_triton
@pytest.mark.parametrize("contiguous", ["rows", "features"])
@pytest.mark.parametrize(("architecture", "dtype"), list(UNITS))
def test_it_compiles_to_tensor_cores(
    architecture: int, dtype: str, contiguous: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default; else it warns of a later one
    compiled = compile_for(architecture, dtype, "stride_r" if contiguous == "features" else "stride_f")
    ptx = compiled.asm["ptx"]
    used = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[\w.]*", ptx))
    assert used == {UNITS[architecture, dtype]}
    assert "st.local" not in ptx, "registers do not suffice"
    assert compiled.metadata.shared <= SHARED
    assert compiled.asm["cubin"]


def compile_for(architecture: int, dtype: str, unit_stride: str) -> Any:
    """The kernel for aligned rows, as a launch specialises it; one of the strides is 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thor_fx.passes import symmetric_kernel as kernel

    names = kernel.tiles_kernel.arg_names
    fixed = {
        "TILE": kernel.TILE,
        "ROWS": kernel.BYTES_OF_ROWS // (4 if dtype == "fp32" else 2),
        "PRECISION": "tf32",
        unit_stride: 1,
    }
    types = {"x": f"*{dtype}", "out": "*fp32"} | dict.fromkeys(fixed, "constexpr")
    aligned = [i for i, name in enumerate(names) if name not in {*fixed, "parts"}]
    source = ASTSource(
        kernel.tiles_kernel,
        {name: types.get(name, "i32") for name in names},
        constexprs=fixed,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": kernel.WARPS, "num_stages": kernel.STAGES}
    try:
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except RuntimeError as error:
        if "Cannot find ptxas" in str(error):
            pytest.skip(str(error))
        raise


# --- where it is used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "features", "dtype", "tf32", "expected"),
    [
        (1024, 512, BF16, False, True),
        (1024, 512, FP16, False, True),
        (1024, 512, FP32, True, True),
        (1024, 512, FP32, False, False),  # all bits of float32 are asked for
        (1024, 512, torch.float64, True, False),
        (1023, 512, BF16, False, False),
        (1024, 496, BF16, False, False),
        (1024, 520, BF16, False, False),  # rows that begin anywhere
        (4096, 4096, BF16, False, True),
        ("symbolic", 512, BF16, False, True),
    ],
)
def test_what_the_kernel_is_worth(rows: Any, features: int, dtype: torch.dtype, tf32: bool, expected: bool):
    assert worth_it(rows, features, dtype, tf32=tf32) is expected


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def operators(
    dtype: torch.dtype, rounded: torch.dtype | None, shape: tuple[int, ...], device: str
) -> set[Any]:
    """What a product becomes in a graph; on fake tensors, which may be on a GPU that is not there."""
    with FakeTensorMode():
        gm = spliced(torch.empty(shape, dtype=dtype, device=device), rounded)
    return {node.target for node in gm.graph.nodes if node.op == "call_function"}


def spliced(x: torch.Tensor, rounded: torch.dtype | None) -> fx.GraphModule:
    graph = fx.Graph()
    rows = graph.placeholder("x")
    rows.meta["val"] = x
    found = splice(rows, lambda x: gram(x, rounded), rows)
    assert found.meta["val"].shape == (*x.shape[:-2], x.shape[-1], x.shape[-1])
    assert (found.meta["val"].dtype, found.meta["val"].device) == (x.dtype, x.device)
    graph.output((found,))
    return fx.GraphModule({}, graph)


@needs_triton
def test_graphs_hold_it_where_tensor_cores_multiply(precision: Callable[[str], None]):
    kernel = torch.ops.thor_fx.symmetric.default
    precision("highest")
    assert kernel in operators(FP32, BF16, (2048, 512), "cuda")
    assert kernel in operators(FP32, BF16, (3, 2048, 512), "cuda")
    assert kernel in operators(FP32, BF16, (2, 3, 2048, 512), "cuda")
    assert kernel in operators(BF16, None, (2048, 512), "cuda")
    assert kernel not in operators(FP32, None, (2048, 512), "cuda")
    assert kernel not in operators(torch.float64, BF16, (2048, 512), "cuda")
    assert kernel not in operators(FP32, BF16, (2048, 512), "cpu")
    precision("high")
    assert kernel in operators(FP32, None, (2048, 512), "cuda")
    assert kernel not in operators(torch.float64, None, (2048, 512), "cuda")


def test_without_triton_a_gpu_computes_one_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rule, "symmetric", None)
    found = operators(FP32, BF16, (2048, 512), "cuda")
    assert {op for op in found if "mm" in op.__name__} == {torch.ops.aten.mm.dtype}


@needs_triton
def test_an_install_without_triton_works():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises
import thor_fx
from thor_fx.passes import symmetric
assert symmetric.symmetric is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- traced and lowered ----------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to compile for, which nothing is run on."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


@needs_triton
@pytest.mark.parametrize("symbolic", [False, True])
def test_aotautograd_sees_the_kernel_in_the_operator(driver: None, symbolic: bool):
    env = ShapeEnv() if symbolic else None
    with FakeTensorMode(shape_env=env) as mode:
        x = torch.empty(batch_of(env) if env else 4096, 512, device="cuda")
    gm, lowered = spliced(x, BF16), []

    def compiler(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        lowered.append(gm)
        return make_boxed_func(gm.forward)

    with tracing(TracingContext(mode)), torch.no_grad():
        aot_module_simplified(gm, [x], fw_compiler=compiler)
    kernels = lowered[0].graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional
    )
    assert [node.kwargs["tensors_to_clone"] for node in kernels] == [["out"]], "the rows are only read"
    assert not env or (len(env.guards) == 0 and isinstance(kernels[0].kwargs["kwargs"]["rows"], fx.Node))


def batch_of(env: ShapeEnv) -> Any:
    """A symbolic size."""
    return env.create_symintnode(env.create_symbol(4096, source=ConstantSource("batch")), hint=4096)


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("shape", [(1, 4096, 512), (3, 1500, 640), (1, 70, 129), (1, 20_000, 1936)])
@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, 0), (FP16, 0), (FP32, 2**-9)])
def test_it_is_the_product_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, rounding: float):
    from thor_fx.passes.symmetric_kernel import symmetric

    x = random(1, torch.float64, *shape).cuda().to(dtype)
    found, exact = symmetric(x), x.double().mT @ x.double()
    allowed = x.double().abs().mT @ x.double().abs() * (rounding + x.shape[1] * 2**-23)
    assert ((found - exact).abs() <= allowed).all()
    assert torch.equal(found, found.mT)
    assert torch.equal(found, symmetric(x)), "the same bits in every call"
    torch.library.opcheck(symmetric, (x,))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_gpu_returns_the_float32_sums_of_rounded_rows():
    x = random(1, FP32, 4096, 512).cuda()
    found, plain = gram(x, BF16), product(x.mT, x, BF16)
    assert found.dtype == FP32
    assert torch.equal(found, found.mT)
    assert (found - plain).abs().max() <= plain.abs().max() * 1e-5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))


@pytest.mark.gpu
@pytest.mark.inductor
@needs_triton
@needs_gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("door", "called"), [(by_functional_door, "tiles_kernel"), (by_drop_in_door, "thor_fx.symmetric")]
)
def test_both_doors_train_with_it_on_a_gpu(
    door: Callable[..., Any], called: str, monkeypatch: pytest.MonkeyPatch
):
    settings = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2, "block_size": None}
    x = random(2, FP32, 3, 2048, 512).cuda()
    data = [(rows, rows[:, :10].argmax(-1)) for rows in x]

    def trajectory() -> tuple[Any, str]:
        torch._dynamo.reset()
        no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
        with no_graphs, torch._functorch.config.patch(enable_autograd_cache=False):
            found, sources = run_and_get_code(
                lambda: door(build(net, FP32).cuda(), data, backend="inductor", factor_dtype=BF16, **settings)
            )
        return found, "\n".join(sources)

    found, code = trajectory()
    monkeypatch.setattr(rule, "symmetric", None)
    expected, plain = trajectory()
    assert called in code
    assert called not in plain
    assert_same(found, expected, rtol=1e-4)

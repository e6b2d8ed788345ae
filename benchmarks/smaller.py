"""Groups of `run.py`: how much faster pruned models run, and train."""

import contextlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime
import timm.layers
import torch
from measure import multiply_adds_left, random_model, row, step_seconds, under
from torch import nn
from tqdm import tqdm

from sparsity_factory import KERNELS, Masks, compute_masks, shrink, sparse_kernels
from sparsity_factory.sparse_kernels import in_turns
from utils import Compute

NAME = "deit_small_patch16_224"
BATCHES = (1, 64)
PROMISED = 0.85  # the target, as a part of the speedup that the multiply-adds promise

#: The target of the speedup for the fraction of heads and neurons that is pruned.
SPEEDUPS = {0.5: 1.8, 0.25: 1.25}

#: The target of the speedup with sparse kernels: by batch size, pattern and sparsity.
KERNEL_SPEEDUPS = {
    1: {
        "unstructured": {0.5: 1.0, 0.7: 1.3, 0.8: 1.7, 0.9: 2.3, 0.95: 2.8, 0.98: 3.3},
        "block:4x1": {0.5: 1.4, 0.7: 1.9, 0.8: 2.2, 0.9: 2.6},
        "2:4": {0.5: 1.0},
    },
    64: {
        "unstructured": {0.7: 1.3, 0.8: 1.7, 0.9: 2.3, 0.95: 2.8},
        "block:4x1": {0.5: 1.4, 0.8: 2.2},
    },
}


def structured() -> list[dict]:
    """DeiT-Small without half, and without a quarter, of its heads and hidden neurons."""
    dense = random_model(NAME).eval()
    image = torch.zeros(1, 3, 224, 224)
    rows = []
    for share, times in SPEEDUPS.items():
        small = shrink(dense, compute_masks(dense, "unif", share, pattern="heads+neurons"))
        promised = multiply_adds_left(dense, image) / multiply_adds_left(small, image)
        what = f"DeiT-Small without {share:.0%} of heads and neurons"

        for batch in BATCHES:
            found = compare(dense, small, batch)
            rows.append(
                row(
                    f"{what}, batch {batch}",
                    f"{times} times the dense model, and 85 % of what the multiply-adds promise",
                    f"{found} times of {promised:.2f} promised",
                    under(found, times) or under(found, PROMISED * promised),
                )
            )

        if share == 0.5:
            rows += in_onnx(what, dense, small)
            rows.append(training(what, dense, small))
    return rows


def kernels() -> list[dict]:
    """Pruned models with sparse kernels, beside dense ones in the quickest dtype."""
    timm.layers.set_fused_attn(False)  # as main.py has it on CPUs
    dtype = Compute.choose("cpu", "auto").dtype
    cases = [
        (NAME, batch, pattern, sparsity, times)
        for batch, patterns in KERNEL_SPEEDUPS.items()
        for pattern, targets in patterns.items()
        for sparsity, times in targets.items()
    ]
    cases.append(("deit_base_patch16_224", 1, "unstructured", 0.8, 2.0))
    return [kernel_row(*case, dtype) for case in tqdm(cases, "kernels")]


def kernel_row(
    name: str, batch: int, pattern: str, sparsity: float, times: float, dtype: torch.dtype
) -> dict:
    """A pruned model in a dtype, beside the dense model in that dtype."""
    model = random_model(name).eval()
    asked = None if pattern == "2:4" else sparsity  # which it has by itself
    Masks(model, compute_masks(model, "unif", asked, pattern=pattern))
    model.to(dtype)
    images = torch.randn(batch, 3, 224, 224).to(dtype)

    quick, report = sparse_kernels(model, images)
    used = sum(layer.kernel != "dense" for layer in report.layers) if report.used else 0
    found = ratio_of({"dense": partial(model, images), "pruned": partial(quick, images)}, 8)
    title = name.removesuffix("_patch16_224")
    kind = str(dtype).removeprefix("torch.")
    return row(
        f"`--sparse-kernels`, {title}, `unif` {pattern} {sparsity:.0%}, batch {batch}, {kind}",
        f"{times} times the dense model" if times > 1 else "no slower than the dense model",
        f"{found} times, {used} of {len(report.layers)} layers sparse",
        under(found if report.used else 1.0, times),
    )


@torch.no_grad()
def sparse_products() -> list[dict]:
    """fc1 of DeiT-Small for an image, in float32 on one thread: ours and other sparse products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [product_row(sparsity) for sparsity in (0.5, 0.8, 0.9, 0.95)]
    finally:
        torch.set_num_threads(threads)


def product_row(sparsity: float) -> dict:
    """All products of a weight with this sparsity, in turns, beside torch's dense one."""
    torch.manual_seed(0)
    layer = nn.Linear(384, 1536).requires_grad_(False)
    layer.weight[torch.rand(layer.weight.shape) < sparsity] = 0
    x = torch.randn(197, 384)
    ours = KERNELS["tiles"](layer, torch.float32)
    mkl = KERNELS["csr-mkl"](layer, torch.float32)
    calls = {"dense": partial(layer, x), "ours": partial(ours, x), "MKL": partial(mkl, x)}

    # What is not installed is left out
    with contextlib.suppress(ImportError):
        from scipy.sparse import csr_matrix

        weight, tokens = csr_matrix(layer.weight.numpy()), np.ascontiguousarray(x.numpy().T)
        calls["scipy"] = lambda: weight @ tokens

    file = io.BytesIO()
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False, input_names=["x"]).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    calls["onnxruntime, dense"] = partial(session.run, None, {"x": x.numpy()})

    with contextlib.suppress(ImportError):
        import openvino

        options = {
            "INFERENCE_NUM_THREADS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.1,
        }
        model = openvino.Core().compile_model(openvino.convert_model(file), "CPU", options)
        calls["OpenVINO"] = partial(model, x.numpy())

    taken = in_turns(calls, 5)
    dense, ours, *others = taken.values()
    times = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in taken.items())
    return row(
        f"fc1 of DeiT-Small, {sparsity:.0%}, one image, one thread, float32",
        "quicker than all others",
        f"{dense / ours:.2f} times the dense product ({times})",
        under(min(dense, *others) / ours, 1),
    )


# ---- helpers ----


class Ratio(float):
    """How many times as fast the second of two functions is; printed with their times, if known."""

    taken: dict[str, float] = {}

    def __str__(self):
        times = ", ".join(f"{1000 * seconds:.0f} ms {name}" for name, seconds in self.taken.items())
        return f"{float(self):.2f}" + (f" ({times})" if times else "")


def ratio_of(functions: dict[str, Callable], seconds: float = 20) -> Ratio:
    """Measures two functions in turns. seconds: for all turns."""
    taken = in_turns(functions, seconds)
    dense, small = taken.values()
    found = Ratio(dense / small)
    found.taken = taken
    return found


@torch.no_grad()
def compare(dense: nn.Module, small: nn.Module, batch: int) -> Ratio:
    images = torch.randn(batch, 3, 224, 224)
    return ratio_of({"dense": partial(dense, images), "pruned": partial(small, images)})


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def in_onnx(what: str, dense: nn.Module, small: nn.Module) -> list[dict]:
    """Size and speed of a smaller model as an ONNX file."""
    files = {"dense": onnx_file(dense), "small": onnx_file(small)}
    ratio = len(files["dense"]) / len(files["small"])
    weights = size(dense) / size(small)
    rows = [
        row(
            f"{what}, ONNX file",
            "as many times smaller as the weights are fewer",
            f"{ratio:.2f} times of {weights:.2f}",
            under(ratio, 0.98 * weights),
        )
    ]

    for batch in BATCHES:
        found = compare_sessions(files, batch)
        rows.append(
            row(
                f"{what}, onnxruntime, batch {batch}",
                "1.7 times the dense model in onnxruntime",
                f"{found} times",
                under(found, 1.7),
            )
        )
    return rows


def onnx_file(model: nn.Module) -> bytes:
    images = (torch.randn(2, 3, 224, 224),)
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, images, dynamic_shapes=any_batch)
    names = {"input_names": ["images"], "output_names": ["logits"]}

    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(file)
    return file.getvalue()


def compare_sessions(files: dict[str, bytes], batch: int) -> Ratio:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    images = {"images": np.random.RandomState(0).randn(batch, 3, 224, 224).astype(np.float32)}
    sessions = {
        name: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    runs = {name: partial(session.run, None, images) for name, session in sessions.items()}
    return ratio_of(runs)


def training(what: str, dense: nn.Module, small: nn.Module) -> dict:
    """The speed of training a model after `--shrink`."""
    models = {"dense": dense, "pruned": small}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()
    }
    taken = {name: float("inf") for name in models}
    for name in (*models, *models):  # in turns, since the speed of a machine drifts
        step = step_seconds(models[name], optimizers[name], 32, torch.float32)
        taken[name] = min(taken[name], step)

    ratio = taken["dense"] / taken["pruned"]
    return row(
        f"{what}, training after `--shrink`, batch 32",
        "1.6 times the steps a second of the dense model",
        f"{ratio:.2f} times ({taken['dense']:.2f} s, {taken['pruned']:.2f} s a step)",
        under(ratio, 1.6),
    )

"""The same judgement on a GPU. Skipped, and reported as skipped, where there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.datasets import from_arrays
from robustbench_cure.geometry.detection import detect
from robustbench_cure.zoo import build

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.mark.parametrize("model", ["digits_normal", "digits_cure"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_samples_break_on_cpu_and_gpu(digits, model, precision):
    battery = load_battery("digits")
    cpu = evaluate(load_model(model, device="cpu", precision="fp32"), battery, digits, n=100)
    gpu = evaluate(load_model(model, device="cuda", precision=precision), battery, digits, n=100)
    assert (cpu.samples["clean_pred"] == gpu.samples["clean_pred"]).all()
    assert gpu.manifest.config.device == "cuda"
    for spec in battery.attacks:
        differ = cpu.samples[f"{spec.id}.broken"] != gpu.samples[f"{spec.id}.broken"]
        # Rounding moves single samples of iterative attacks; reduced precision a few more.
        assert differ.sum() <= (2 if precision == "fp32" else 5), spec.id


def test_noise_is_bit_equal_on_cpu_and_gpu():
    cpu = Noise.for_samples(0, "pgd", [str(i) for i in range(9)], "cpu")
    gpu = Noise.for_samples(0, "pgd", [str(i) for i in range(9)], "cuda")
    assert torch.equal(cpu.bits(100, 3), gpu.bits(100, 3).cpu())
    assert torch.equal(cpu.uniform((3, 5, 5), 2), gpu.uniform((3, 5, 5), 2).cpu())
    assert torch.equal(cpu.signs((3, 7), 1), gpu.signs((3, 7), 1).cpu())


def test_full_precision_means_no_tf32():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    model = Classifier(net, num_classes=10, input_shape=(3, 32, 32), device="cuda")
    x = torch.rand(64, 3, 32, 32)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        got = model.logits(x.cuda()).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.allclose(got, net(x), atol=1e-5)


def test_a_run_fits_the_memory_it_is_given():
    """Too large a batch is halved until it fits, and gives the numbers of a small one."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (512, 3, 32, 32), dtype=np.uint8)
    data = from_arrays(
        "toy",
        "test",
        images,
        rng.integers(0, 10, 512),
        ids=[str(i) for i in range(512)],
        classes="0123456789",
    )
    torch.manual_seed(0)
    net = build("resnet18", 10, 3, {"width": 64})
    battery = load_battery("table2")
    options = {"num_classes": 10, "input_shape": (3, 32, 32), "device": "cuda", "precision": "bf16"}
    small = evaluate(Classifier(net, batch_size=32, **options), battery, data)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / total))
    try:
        model = Classifier(net, batch_size=4096, **options)
        large = evaluate(model, battery, data)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.batch_size < 4096
    differ = small.samples["pgd20.broken"] != large.samples["pgd20.broken"]
    assert differ.sum() <= 5


@pytest.mark.parametrize("at", ["image", "boundary"])
def test_a_detector_on_the_gpu_takes_images_from_the_cpu(digits, at):
    model = load_model("digits_cure", device="cuda", precision="fp32")
    said = detect(model, digits.images[:4], h=0.5, at=at, directions=3)
    assert said.score.device.type == "cuda"
    assert not said.score.isnan().any()


@pytest.mark.parametrize(
    ("verb", "file", "column"),
    [
        ("boundary", "boundary.csv", "distance"),
        ("detect", "detect.csv", "auc"),
        ("shared", "shared.csv", "adversarial"),
    ],
)
def test_geometry_is_the_same_on_cpu_and_gpu(tmp_path, verb, file, column):
    found = {}
    for device in ("cpu", "cuda"):
        out = str(tmp_path / device)
        given = [verb, "--model", "digits_normal", "--n", "20", "--device", device, "--out", out]
        assert CliRunner().invoke(cli, given, catch_exceptions=False).exit_code == 0
        found[device] = pd.read_csv(tmp_path / device / file)[column].to_numpy()
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0.05)

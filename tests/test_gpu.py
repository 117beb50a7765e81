"""What a GPU asks of the code, shown where there is none: one graph, no waiting, nothing left on the CPU, fp16, memory.

The scripts' own loops run here, not copies of them. Frozen networks are untrained: their numbers do not matter.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CODE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CODE), str(CODE / "docs")]
import data  # noqa: E402
import finetune  # noqa: E402
import memory  # noqa: E402
import pretrain  # noqa: E402
import segment  # noqa: E402
import tokenizer as vqkd  # noqa: E402
from support.launch import STOP_SIGNALS  # noqa: E402
from support.options import load_config  # noqa: E402
from support.run import Metrics, Run  # noqa: E402
from support.teachers import TEACHERS  # noqa: E402

SCRIPTS = {"tokenizer": vqkd, "pretrain": pretrain, "finetune": finetune, "segment": segment}
# 16 patches of 4 x 4 pixels. 20 images: two steps of two micro-batches of 4 an epoch, and 4 images too few for a third.
TINY = """
data: {dataset: shapes, image_size: 16, train_images: 20, val_images: 5, workers: 0}
model: {embed_dim: 16, depth: 2, num_heads: 2, patch_size: 4}
tokenizer: {teacher: hog, embed_dim: 16, depth: 1, num_heads: 2, decoder_depth: 1, codebook_size: 16, codebook_dim: 8,
  epochs: 2, batch_size: 8, device_batch_size: 4, warmup_epochs: 5, revive_below: 0.1}
pretrain: {num_masked: 6, min_block: 2, early_layers: 1, head_layers: 1, epochs: 2, batch_size: 8, device_batch_size: 4,
  knn_every: 0}
finetune: {weights: none, epochs: 2, batch_size: 8, device_batch_size: 4, ema_decay: 0.9, probe_epochs: 2}
segment: {weights: none, crop_size: 16, stride: 8, short_side: 16, long_side: 16, feature_layers: [0, 0, 1, 1],
  iterations: 4, eval_every: 2, batch_size: 8, device_batch_size: 4, overlays: 0}
"""


@pytest.fixture(autouse=True)
def as_found(monkeypatch):
    """A run takes over signals and threads, and caches hold tensors of its device: put all of them back."""
    signals, threads = {number: signal.getsignal(number) for number in STOP_SIGNALS}, torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread: see test_scripts.py
    yield
    torch.set_num_threads(threads)
    for number, handler in signals.items():
        signal.signal(number, handler)
    data.channels.cache_clear()


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run a script with a config file, or with TINY, and an untrained tokenizer; returns the folder of its output."""
    def untrained_tokenizer(config, *_):
        return vqkd.build_vqkd(config, teacher_dim=512).requires_grad_(False).eval(), None

    def run(script: str, *changes: str, file: str | Path = tmp_path / "tiny.yaml") -> Path:
        (tmp_path / "tiny.yaml").write_text(TINY)
        monkeypatch.setattr(pretrain, "load_tokenizer", untrained_tokenizer)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", str(file), f"output_dir={tmp_path}", *changes])
        SCRIPTS[script].main()
        return tmp_path

    return run


# -- one graph ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, changes, networks", [
    ("tokenizer", [], 2), ("pretrain", [], 2), ("finetune", [], 1), ("segment", [], 1),
    ("pretrain", ["model.checkpoint_activations=true", "pretrain.drop_path=0.1"], 2)])
def test_each_model_compiles_as_one_graph_for_all_steps(start, monkeypatch, script, changes, networks):
    """Two epochs with validation between them: no break (`fullgraph`), and nothing is compiled a second time. The frozen
    network beside the trained one, teacher or tokenizer, is compiled too.

    Both are up to dynamo, which reads the Python code. So its graph is run as it is here, and not made into kernels.
    """
    compiled, sizes, torch_compile = {}, [], torch.compile

    def compile(network):
        graphs = compiled.setdefault(network, [])
        parallel = torch_compile(network, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
        if any(parameter.requires_grad for parameter in getattr(network, "parameters", list)()):
            parallel.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return parallel

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile)
    start(script, "compile=true", "device=cpu", "precision=bf16", *changes)
    graphs = list(map(len, compiled.values()))
    assert graphs == [1] * networks, f"each network should be compiled once: {graphs}"
    assert sizes == [4] * 8, "8 micro-batches of 4 images: a smaller last one is left out"


# -- no waiting, nothing left on the CPU --------------------------------------------------------------------------


class FakeGPU(FakeTensorMode):
    """A GPU without numbers: what is on it has a shape, a type and a device. What happens on the CPU is real.

    So reading a value from it fails, whatever asks for it: item, tolist, bool, nonzero, a mask as an index. An operation
    on tensors of both devices fails as well, as it would on a real one. What would not fail, but make the host wait, is
    a copy from one device to the other: from the GPU always, to the GPU unless `non_blocking`.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.in_step = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        tensors = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
        from_gpu = any(isinstance(value, FakeTensor) for value in tensors)
        target = torch.device(options["device"]).type if options.get("device") is not None else None
        if not from_gpu and target != "cuda":
            return function(*arguments, **options)
        if function is torch.ops.aten._fused_sgd_.default:
            return None  # it changes weights in place, and PyTorch has no fake of it
        if function is torch.ops.aten._to_copy.default and self.in_step:
            assert not (from_gpu and target == "cpu"), "a step copies a tensor from the GPU, and waits for it"
            assert from_gpu or options.get("non_blocking"), "a step copies a tensor to the GPU, and waits for it"
        if function is torch.ops.aten.copy_.default and self.in_step:
            assert len({value.device for value in tensors}) == 1, "a step copies between the devices, and waits for it"
        return super().__torch_dispatch__(function, types, arguments, options)


class EpochDone(Exception):
    """The training steps of the first epoch are over. What follows reads values, and may."""


@pytest.fixture
def fake_gpu(monkeypatch):
    """Scripts believe that there is a GPU, and train an epoch on it."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch was built without CUDA, and lacks what even fake tensors on a GPU need")
    gpu = FakeGPU()
    try:
        with gpu:
            q = torch.empty(1, 1, 2, 8).to(torch.device("cuda", 0))
            nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        if "driver" not in str(error):
            raise
        pytest.skip("this PyTorch asks a real GPU's driver even for fake tensors (2.6 does)")
    micro_batches = Run.micro_batches

    def watched(run, epoch):
        for dealt in micro_batches(run, epoch):
            gpu.in_step = run.step > 0  # the first step fills caches
            yield dealt
            gpu.in_step = False

    def backward(loss):
        """PyTorch runs no backward pass on a GPU that is not there. Only its result is needed: gradients."""
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [next_node for next_node, _ in node.next_functions]
                if hasattr(node, "variable"):
                    node.variable.grad = torch.zeros_like(node.variable)

    def to(module, device):
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(value.detach().to(device), value.requires_grad)
            part._buffers = {name: value.to(device) for name, value in part._buffers.items()}
        return module

    def epoch_done(run):
        assert run.step == run.steps_per_epoch >= 2
        raise EpochDone

    monkeypatch.setattr("support.run.setup_distributed", lambda device, threads: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(Run, "micro_batches", watched)
    monkeypatch.setattr(Run, "save", epoch_done)
    monkeypatch.setattr(Metrics, "read", lambda metrics: {name: [0.0] * len(window)
                                                          for name, window in metrics.window.items()})
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", to)
    return gpu


@pytest.mark.parametrize("script, changes", [
    ("tokenizer", ["tokenizer.revive_below=0"]),  # revival draws from a generator that only a real GPU has
    ("pretrain", []), ("finetune", []), ("finetune", ["finetune.mode=linear_probe"]), ("segment", [])])
def test_no_step_waits_for_the_gpu_or_leaves_a_tensor_on_the_cpu(start, fake_gpu, script, changes):
    """With fp16, where a step must also be skipped without asking."""
    with fake_gpu, pytest.raises(EpochDone):
        start(script, "compile=false", "precision=fp16", *changes)


RECIPES = [("base", "tokenizer"), ("base", "pretrain"), ("base", "finetune"), ("large", "pretrain"),
           ("large", "finetune")]


def recipe(name: str):
    return load_config(memory.SECTIONS, [str(CODE / f"configs/{name}.yaml")])


@pytest.mark.parametrize("name, script", RECIPES)
def test_the_papers_recipes_take_their_steps_on_a_gpu(start, fake_gpu, monkeypatch, name, script):
    """At full size, with the configured device_batch_size; but one micro-batch a step, and one image many times."""
    images = getattr(recipe(name), script).device_batch_size
    draw, sample = data.TrainSamples.__getitem__, []

    def same_sample(samples, key):
        sample.extend([] if sample else [draw(samples, key)])
        return sample[0]

    def on_gpu(build):
        def built(*arguments, **options):
            with torch.device("cuda"):
                return build(*arguments, **options)
        return built

    monkeypatch.setattr(data.TrainSamples, "__getitem__", same_sample)
    monkeypatch.setattr(vqkd, "open_teacher", on_gpu(lambda config: TEACHERS["clip_vitb16"].build(grid=14)))
    for place, build in ((vqkd, "build_vqkd"), (pretrain, "build_model"), (finetune, "Classifier")):
        monkeypatch.setattr(place, build, on_gpu(getattr(place, build)))
    with fake_gpu, pytest.raises(EpochDone):
        start(script, "compile=false", "precision=bf16", "data.dataset=shapes", f"data.train_images={2 * images}",
              f"{script}.batch_size={images}", "data.val_images=1", "data.workers=0", "finetune.weights=none",
              file=CODE / f"configs/{name}.yaml")


# -- fp16 ---------------------------------------------------------------------------------------------------------


def test_fp16_skips_a_step_that_overflows_and_goes_on(start, monkeypatch):
    """Pre-training in fp16 on the CPU. The third step's gradient is infinite: weights stay, and the scale is halved.

    (That of the first may overflow by itself: the scale begins high on purpose.)
    """
    weights, scales, scaler = [], [], torch.amp.GradScaler
    unscale, update = scaler.unscale_, scaler.update

    def unscale_(self, optimizer):
        self.optimizer = optimizer
        if len(weights) == 2:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        unscale(self, optimizer)

    def after_the_step(self):
        update(self)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        weights.append(nn.utils.parameters_to_vector(parameters).detach().clone())
        scales.append(self.get_scale())

    monkeypatch.setattr(scaler, "unscale_", unscale_)
    monkeypatch.setattr(scaler, "update", after_the_step)
    folder = start("pretrain", "device=cpu", "precision=fp16", "pretrain.warmup_epochs=0", "pretrain.log_every=1")
    assert scales[2] == scales[1] / 2 and scales[3] == scales[2]
    assert torch.equal(weights[2], weights[1]) and not torch.equal(weights[3], weights[2])
    assert weights[3].isfinite().all()
    assert (folder / "pretrain/last.pt").is_file()


# -- memory -------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_lives_at_the_same_time():
    with FakeTensorMode(), memory.PeakMemory() as counted:
        x = torch.empty(1000)  # 4000 bytes
        y = x.view(10, 100) * 2  # 4000 more; the view has none of its own
        del y
        z = x.to(torch.bfloat16)  # 2000
    assert (counted.now, counted.peak) == (6000, 8000)
    del x, z
    assert counted.now == 0


@pytest.mark.parametrize("name, script", RECIPES)
def test_the_papers_recipes_fit_gpus_of_24_gb(name, script):
    """With a margin for what is not counted; and the table of docs/gpus.md says what is counted."""
    config = recipe(name)
    images = getattr(config, script).device_batch_size
    size = memory.step_memory(config, script, images)
    assert size <= 20
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (CODE / "docs/gpus.md").read_text().splitlines()
            if line.startswith(("| GB per GPU", f"| {name}, {script}"))]
    row = next(row for row in rows if ("checkpoint_activations" in row[0]) == config.model.checkpoint_activations
               and row != rows[0])
    assert row[rows[0].index(f"{images} images")] == f"**{size:.1f}**"

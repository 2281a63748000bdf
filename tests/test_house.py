"""House rules that a machine can check: imports flow one way, files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "yolos_jax"

# Data flows one way: a module imports only from lines above its own. Modules of one line do not
# import each other.
ORDER = [
    ["boxes", "labels", "batch", "health", "interrupt", "other_names"],
    ["watchdog", "cluster", "preemption", "parameter_groups"],
    ["data.sizes", "data.files", "data.patches"],
    ["data.image"],
    ["data.problems", "data.coco", "data.shards"],
    ["data.clean", "data.parts"],
    ["data.index"],
    ["data.truth", "data.tfds", "data.validate_pictures"],
    ["data.cache", "data.validate", "data.packing"],
    ["data.records"],
    ["data.augment"],
    ["data.buckets"],
    ["data.canvases"],
    ["data.layout", "data.plan"],
    ["data.tensorflow_import"],
    ["data.rows"],
    ["data.pipeline"],
    ["data.shapes"],
    ["models.precision", "models.registers", "models.platforms"],
    ["models.repeat"],
    ["models.head_attention", "models.splash_attention", "models.position"],
    ["models.attention"],
    ["models.masked_attention", "models.detr_position", "models.relu", "models.linear"],
    ["models.norm"],
    ["models.vit"],
    ["models.heads", "models.resnet"],
    ["models.detr_transformer"],
    ["models.yolos", "models.detr"],
    ["models.detr_model"],
    ["models.build"],
    ["matching", "losses"],
    ["optimizer", "schedules"],
    ["agreement", "meeting"],
    ["waiting"],
    ["mesh", "launch", "pullback", "programs"],
    ["claim"],
    ["train_state", "metrics"],
    ["passes"],
    ["step", "predict_step"],
    ["compilation"],
    ["checkpoint_files"],
    ["checkpoint_read", "checkpoint_manager"],
    ["checkpoint"],
    ["answers", "given", "lettering"],
    ["runlog", "settings", "checks", "unused", "progress"],
    ["convert.places"],
    ["convert.names"],
    ["convert.start", "convert.read", "convert.detr_names"],
    ["convert.conversion"],
    ["convert.original", "convert.from_backbone", "convert.torch_layers"],
    ["convert.hf_folder", "convert.npz", "convert.detr", "convert.detr_hf_names"],
    ["convert.huggingface", "convert.detr_huggingface"],
    ["convert.vit_layouts", "convert.resnets", "convert.systems"],
    ["convert.backbones"],
    ["convert.weights"],
    ["convert.export"],
    ["detector"],
    ["convert.reference_detr"],
    ["convert.reference"],
    ["convert.compare"],
    ["convert.command"],
    ["scoring"],
    ["evaluation"],
    ["reference_padding", "datasets"],
    ["evaluator"],
    ["visualize"],
    ["pictures"],
    ["report", "run"],
    ["startup"],
    ["trainer"],
    ["predict", "demo", "attend"],
]
LIBRARIES = {
    "flax": ("models",),
    "tensorflow": ("data.tensorflow_import",),
    "tensorflow_datasets": ("data.tfds",),
    "array_record": ("data.shards", "data.packing"),
    "torch": ("convert",),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place():
    listed = [name for line in ORDER for name in line]
    assert sorted(listed) == sorted(modules()), "add the module to ORDER, where it belongs"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_flow_one_way(module):
    line = {name: i for i, names in enumerate(ORDER) for name in names}
    for name in imported(modules()[module]):
        other = name.removeprefix("yolos_jax.")
        if name.startswith("yolos_jax.") and other in line:
            assert line[other] < line[module], f"{module} imports {other}, which is not above it"


@pytest.mark.parametrize("module", sorted(modules()))
def test_heavy_libraries_stay_in_their_rooms(module):
    for name in imported(modules()[module]):
        rooms = LIBRARIES.get(name.split(".")[0])
        if rooms is not None:
            assert module.startswith(rooms), f"{module} imports {name}; only {rooms} may"


def sources() -> list[Path]:
    """Our own files: not those of a virtual environment, a build or a run."""
    top = [path for path in ROOT.iterdir() if path.suffix == ".py"]
    folders = ("yolos_jax", "configs", "tests", "benchmarks")
    return sorted([*top, *(path for name in folders for path in (ROOT / name).rglob("*.py"))])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300, f"{path}: a file that asks for a wall"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 61, f"{path}:{node.lineno} {node.name} has {length} lines"

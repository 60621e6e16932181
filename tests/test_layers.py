"""Imports run downwards only, and the words of the design are kept."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "redrafter_mlx"
LAYERS = [
    ["__main__"],
    ["chat.__main__", "doctor", "generate", "train", "tune"],
    ["chat.session"],
    ["chat.answers", "chat.terminal"],
    ["chat.commands", "chat.screen"],
    ["chat.conversation", "chat.settings"],
    ["diagnosis"],
    ["training.forecast"],
    ["training.run", "training.card"],
    ["training.start", "training.loop", "training.report"],
    ["training.gradients"],
    ["training.recipes", "training.replay"],
    [
        "training.recipes.dflash",
        "training.recipes.eagle3",
        "training.recipes.medusa",
        "training.recipes.recurrent",
    ],
    ["training.recipes.layers"],
    ["training.recipes.recipe"],
    ["training.features", "training.initial"],
    ["training.objective"],
    ["server.__main__"],
    ["server.serving"],
    ["server.app"],
    [
        "server.anthropic",
        "server.asking",
        "server.document",
        "server.guard",
        "server.metrics",
        "server.models",
        "server.page",
        "server.responses",
    ],
    ["server.openai", "server.replies"],
    ["server.plan"],
    ["server.speech"],
    ["server.schemas_anthropic", "server.schemas_responses", "server.tools"],
    ["server.faults", "server.schemas"],
    ["engine"],
    ["engine.conversation", "engine.engine"],
    ["engine.run", "engine.saved"],
    ["engine.prefixes"],
    ["engine.served"],
    ["engine.request"],
    ["check", "loading.context"],
    ["measuring.tuning", "stream"],
    ["generation"],
    ["measuring.knowledge"],
    ["measuring.acceptance", "measuring.measure", "measuring.profile"],
    ["decoding", "rounds.stats"],
    ["loading.drafters"],
    ["loading.hub"],
    ["loading.demo", "loading.known_heads"],
    ["loading.places"],
    ["gguf.importer", "training.data"],
    ["training.manifest", "training.sources"],
    ["training.estimate"],
    ["training.scripts", "training.windows"],
    ["training.loss", "training.shards"],
    ["gguf.config", "gguf.tokenizer"],
    ["gguf.rope"],
    ["gguf.architectures", "gguf.blocks", "gguf.metadata"],
    ["gguf.file"],
    ["rounds.verification"],
    ["drafters.kinds"],
    [
        "drafters.cascade",
        "drafters.dflash",
        "drafters.eagle3",
        "drafters.medusa",
        "drafters.mtp",
        "drafters.union",
    ],
    ["drafters.mtp_weights", "drafters.published"],
    ["drafters.block", "drafters.checkpoint", "drafters.mtp_families"],
    ["drafters.tensors"],
    ["drafters.attention", "drafters.parallel", "drafters.recurrent"],
    ["drafters.beams"],
    ["drafters.text"],
    [
        "drafters.head",
        "drafters.max_gram",
        "drafters.model",
        "training.lockstep",
        "training.questions",
    ],
    [
        "drafters.beam_search",
        "drafters.drawn",
        "drafters.lookback",
        "drafters.protocol",
        "drafters.suffixes",
    ],
    ["pricing.budget", "pricing.experience"],
    ["pricing.survey"],
    ["pricing.policy"],
    ["pricing.calibration"],
    ["target.adapter"],
    ["target.exchange", "target.hooks", "target.parallel", "target.probe", "target.tape"],
    ["target.fingerprint"],
    ["target.layers"],
    [
        "target.layers.afm",
        "target.layers.baichuan",
        "target.layers.lightning",
        "target.layers.llama4",
        "target.layers.longcat",
        "target.layers.mamba",
        "target.layers.recurrent_gemma",
        "target.layers.rwkv7",
    ],
    ["target.layers.positions"],
    ["target.caches", "target.recurrence", "target.rope"],
    ["target.cache", "target.state"],
    ["target.lineage"],
    ["rounds.round"],
    ["rounds.sampling"],
    ["loading.precision"],
    ["rounds.tree", "machine.device"],
    ["model_flags"],
    ["cli", "drafters.spec", "server.options", "training.options"],
    ["config", "training.jobs"],
    ["measuring.picture"],
    ["pricing.curve"],
    ["machine.blas"],
    ["machine.openblas"],
    ["machine.storage", "training.deadline", "training.filters", "training.picture"],
    ["errors"],
]
"""From the top down: a module may import from lower lines only."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py" or name in LEVEL:
            yield name, path


def imported(path):
    """Modules of this package that a file imports when it runs, not just for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            module = node.module or ""
            if module == "redrafter_mlx":
                yield from (alias.name for alias in node.names)
            elif module.startswith("redrafter_mlx."):
                package = module.removeprefix("redrafter_mlx.")
                names = [f"{package}.{alias.name}" for alias in node.names]
                yield from (names if set(names) <= LEVEL.keys() else [package])


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: str(v).split("/")[-1])
def test_imports_run_downwards(name, path):
    for other in imported(path):
        assert LEVEL[other] > LEVEL[name], f"{name} imports {other}"


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == LEVEL.keys()


def test_torch_is_imported_by_the_converter_only():
    """And there in one place, when a PyTorch file is read or --verify was asked for."""
    found = {
        str(path.relative_to(ROOT))
        for top in ("redrafter_mlx", "convert", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if re.search(r"^\s*(import|from) torch\b", path.read_text(encoding="utf-8"), re.M)
    }
    assert found == {"convert/pickles.py"}


def test_the_package_does_not_know_its_converter():
    for name, path in modules():
        assert not re.search(r"^\s*(import|from) convert\b", path.read_text(), re.M), name
        assert "convert" not in {other.split(".")[0] for other in imported(path)}, name


def test_no_cache_of_ours_can_be_tested_for_truth():
    """mlx-lm asks `if cache`: with __len__ or __bool__ an empty cache would be no cache."""
    from redrafter_mlx.target.cache import TreeCache

    assert not hasattr(TreeCache, "__len__")
    assert not hasattr(TreeCache, "__bool__")


def test_only_one_place_waits_for_the_device():
    """mx.eval in the package: device.read, and where whole chunks or weights are finished."""
    waits = {
        name
        for name, path in modules()
        if re.search(r"mx\.eval\(|\.item\(\)", path.read_text(encoding="utf-8"))
    }
    assert waits == {
        "machine.device",
        "drafters.tensors",
        "training.gradients",
        "training.initial",
        "training.lockstep",
        "training.loop",
    }

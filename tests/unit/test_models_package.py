"""Model packages: what a manifest may say, and how each lie about weights is refused."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from facelane_server.domain import FacelaneError, Reason, Stage
from facelane_server.models.api import AlignedCrop, ContextCrop, DeviceOptions
from facelane_server.models.catalog import Catalog
from facelane_server.models.package import Package, read_package
from facelane_server.modeltools.importer import RECIPES, guess_recipe, import_model
from facelane_server.worker.networks.load import load, network_with_weights

SMALL = {"widths": [4, 8, 8, 8, 8, 8]}


def small_state(**changes: Any) -> dict[str, torch.Tensor]:
    from facelane_server.worker.networks.architectures.yunet import YuNet

    torch.manual_seed(3)
    state = dict(YuNet(**SMALL).state_dict())
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a package of a small detector, with changes; returns its folder."""

    def make(
        manifest: dict[str, Any] | None = None,
        state: dict[str, torch.Tensor] | None = None,
        name: str = "small",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        file = folder / "weights.safetensors"
        save_file(small_state() if state is None else state, file)
        table: dict[str, Any] = {
            "schema": 1,
            "name": name,
            "version": "1.2.3",
            "task": "detector",
            "architecture": "yunet",
            "license": "Apache-2.0",
            "description": "small",
            "options": SMALL,
            "weights": [
                {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            ],
            "input": {"max_side": 64},
            "thresholds": {"score": 0.5, "nms": 0.3},
        }
        table |= manifest or {}
        table = {key: value for key, value in table.items() if value is not None}
        (folder / "model.toml").write_text(tomli_w.dumps(table))
        return folder

    return make


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(FacelaneError) as caught:
        action()
    assert caught.value.reason is Reason.MODEL_INVALID
    return caught.value.message


def test_a_sound_package_is_read_and_loaded(write: Write) -> None:
    package = read_package(write())
    assert package.task is Stage.DETECTOR
    assert package.thresholds.score == 0.5
    assert package.model_id == f"small@1.2.3#{package.manifest.weights[0].sha256[:8]}"
    assert not package.random_weights
    network = network_with_weights(package)
    assert torch.equal(
        network.state_dict()["backbone.model0.conv1.weight"],
        small_state()["backbone.model0.conv1.weight"],
    )


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"licence": "MIT"}, "unknown key licence; did you mean license?"),
        ({"input": {"max_sid": 64}}, "unknown key input.max_sid; did you mean max_side?"),
        ({"thresholds": {"score": 0.5, "nsm": 0.3}}, "thresholds.nsm; did you mean nms?"),
        ({"weights": [{"file": "a.pth", "sha265": "0"}]}, "weights.sha265; did you mean sha256?"),
        ({"architecture": "yunett"}, "unknown architecture 'yunett'; did you mean yunet?"),
        ({"architecture": "mobilefacenet"}, "is a recognizer, not a detector"),
        ({"task": "detektor"}, "is 'detektor', but may be: detector, recognizer, liveness"),
        ({"schema": 2}, "schema is 2"),
        ({"name": "Small One"}, "name must be"),
        ({"version": ""}, "version must be"),
        ({"license": None}, "license"),
        ({"thresholds": {"score": 0.5}}, "thresholds.nms is missing"),
        ({"thresholds": {"score": 1.5, "nms": 0.3}}, "thresholds.score is 1.5"),
        (
            {"thresholds": {"score": 0.5, "score_turned": 0.6, "nms": 0.3}},
            "score_turned must not be above thresholds.score",
        ),
        ({"input": {"max_side": 50}}, "input.max_side"),
        ({"input": {"max_side": 100}}, "multiple of 32"),
        (
            {"input": {"max_side": 64, "color": "grey"}},
            "input.color is 'grey', but may be: bgr, rgb",
        ),
        ({"output": {"decode": "scrfd"}}, "output.decode is 'scrfd', but may be: yunet"),
        ({"input": {"max_side": 64, "std": [1, 0, 1]}}, "input.std must be positive"),
        ({"weights": None}, "either weights or random_seed"),
        ({"random_seed": 3}, "either weights or random_seed"),
        ({"runtime": "onnx"}, "ending in .onnx"),
        ({"runtime": "null"}, "a null model has neither weights"),
        ({"card": "../CARD.md"}, "card must be a file inside"),
        (
            {"input": {"max_side": 64, "mean": [0.0, math.nan, 0.0]}},
            "input.mean must be a finite number",
        ),
        ({"memory": {"weights_mib": math.inf}}, "memory.weights_mib must be a finite number"),
        ({"memory": {"weights_mib": -1.0}}, "memory.weights_mib must not be negative"),
        ({"weights": None, "random_seed": -1}, "random_seed must be in"),
        ({"options": {"widths": date(2030, 1, 1)}}, "options may be texts, numbers"),
        ({"options": {"width": [1]}}, "has no option width; did you mean widths?"),
        ({"options": {"widths": [1, 2]}}, "widths needs six positive numbers"),
        ({"options": {"widths": 7}}, "cannot be built"),
    ],
)
def test_what_a_manifest_may_not_say(write: Write, manifest: dict[str, Any], message: str) -> None:
    folder = write(manifest)
    assert message in refusal(lambda: network_with_weights(read_package(folder)))


@pytest.mark.parametrize(
    "file", ["../weights.safetensors", "/etc/hostname.pth", "a/../../b.pth", "", "a\\b.pth"]
)
def test_weights_outside_of_the_package_are_refused(write: Write, file: str) -> None:
    folder = write({"weights": [{"file": file, "sha256": "0" * 64}]})
    assert "inside the package" in refusal(lambda: read_package(folder))


def test_a_link_out_of_the_package_is_refused(write: Write, tmp_path: Path) -> None:
    folder = write()
    outside = tmp_path / "outside.safetensors"
    (folder / "weights.safetensors").rename(outside)
    (folder / "weights.safetensors").symlink_to(outside)
    assert "outside of the package" in refusal(lambda: network_with_weights(read_package(folder)))


def test_a_wrong_hash_names_the_file_and_both_hashes(write: Write) -> None:
    folder = write()
    data = bytearray((folder / "weights.safetensors").read_bytes())
    declared = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    message = refusal(lambda: network_with_weights(read_package(folder)))
    assert "weights.safetensors" in message
    assert declared in message
    assert hashlib.sha256(data).hexdigest() in message


def test_a_missing_file_is_named(write: Write) -> None:
    folder = write()
    (folder / "weights.safetensors").unlink()
    message = refusal(lambda: network_with_weights(read_package(folder)))
    assert "weights.safetensors cannot be read" in message


KEY = "backbone.model0.conv1.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: small_state(**{KEY: None}), f"lacks the key {KEY}"),
        (lambda: small_state(extra=torch.zeros(1)), "has the unexpected key extra"),
        (
            lambda: small_state(**{KEY: torch.zeros(4, 3, 5, 5)}),
            f"{KEY} has shape [4, 3, 5, 5], but the architecture needs [4, 3, 3, 3]",
        ),
        (lambda: small_state(**{KEY: torch.full((4, 3, 3, 3), torch.nan)}), "not finite"),
    ],
)
def test_wrong_tensors_are_named(
    write: Write, state: Callable[[], dict[str, torch.Tensor]], message: str
) -> None:
    folder = write(state=state())
    assert message in refusal(lambda: network_with_weights(read_package(folder)))


def package_of(write: Write, file: str, data: bytes) -> Package:
    folder = write({"weights": [{"file": file, "sha256": hashlib.sha256(data).hexdigest()}]})
    (folder / file).write_bytes(data)
    return read_package(folder)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_with_code_is_refused_and_not_run(write: Write, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": {"a": Attack(marker)}}, tmp_path / "attack.pth")
    for data in ((tmp_path / "attack.pth").read_bytes(), pickle.dumps(Attack(marker))):
        package = package_of(write, "attack.pth", data)
        assert "code are refused" in refusal(lambda: network_with_weights(package))  # noqa: B023
        assert not marker.exists()
    # The attack is real: plain unpickling runs it.
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("data", [b"", b"no weights", b"\xff" * 100, b"\x80\x02}q\x00."])
def test_rubbish_is_no_weights_file(write: Write, file: str, data: bytes) -> None:
    package = package_of(write, file, data)
    assert file in refusal(lambda: network_with_weights(package))


def test_a_checkpoint_with_a_state_dict_inside_loads(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in small_state().items()}}, path
    )
    package = package_of(write, "weights.pth", path.read_bytes())
    assert torch.equal(network_with_weights(package).state_dict()[KEY], small_state()[KEY])


def test_half_precision_weights_load_as_full(write: Write) -> None:
    folder = write(state={k: v.half() for k, v in small_state().items() if "tracked" not in k})
    network = network_with_weights(read_package(folder))
    assert network.state_dict()[KEY].dtype is torch.float32


def test_a_manifest_that_is_no_toml(write: Write) -> None:
    folder = write()
    (folder / "model.toml").write_bytes(b"name = [")
    assert "not valid TOML" in refusal(lambda: read_package(folder))
    (folder / "model.toml").write_bytes(b"schema = " + b"1" * 5_000)
    assert "too many digits" in refusal(lambda: read_package(folder))
    (folder / "model.toml").write_bytes(b"# " + b"x" * 70_000)
    assert "larger than" in refusal(lambda: read_package(folder))
    (folder / "model.toml").unlink()
    assert "cannot be read" in refusal(lambda: read_package(folder))


def test_options_that_are_nested_without_an_end(write: Write) -> None:
    folder = write()
    manifest = (folder / "model.toml").read_text().partition("[")[0]
    deep = ".".join("a" * 5_000)  # tomllib takes quadratic time
    (folder / "model.toml").write_text(f"{manifest}\noptions.{deep} = 1\n")
    assert "options may be nested" in refusal(lambda: read_package(folder))
    (folder / "model.toml").write_text(f"task.{deep} = 1\n")
    assert "task is no text, but may be" in refusal(lambda: read_package(folder))
    (folder / "model.toml").write_text(f"{'x' * 60_000} = 1\n")
    assert len(refusal(lambda: read_package(folder))) < 1_000


def test_every_shipped_package_is_sound() -> None:
    packages, broken = Catalog().scan()
    assert not broken
    assert {"null-detector", "null-recognizer", "null-liveness"} <= {p.name for p in packages}
    assert len({p.model_id for p in packages}) == len(packages)


def test_the_catalogue_finds_by_name_version_and_path(write: Write, tmp_path: Path) -> None:
    folder = write()
    catalog = Catalog([tmp_path])
    for reference in ("small", "small@1.2.3", str(folder)):
        assert catalog.resolve(reference).folder == folder
    for reference in ("smal", "small@9", "small@"):
        message = refusal(lambda: catalog.resolve(reference))  # noqa: B023
        assert "did you mean small?" in message


def test_a_broken_package_is_listed_and_says_why(write: Write, tmp_path: Path) -> None:
    write({"licence": "MIT"}, name="broken")
    packages, broken = Catalog([tmp_path]).scan()
    assert [item.folder.name for item in broken] == ["broken"]
    assert "broken" not in {package.name for package in packages}
    assert "licence" in refusal(lambda: Catalog([tmp_path]).resolve("broken"))


def test_crops_are_declared() -> None:
    catalog = Catalog()
    assert catalog.resolve("null-recognizer").crops == (AlignedCrop(112),)
    assert catalog.resolve("null-liveness").crops == (ContextCrop(2.7, 80),)
    assert catalog.resolve("null-detector").crops == ()


def test_random_weights_are_flagged_and_repeatable(write: Write) -> None:
    def package(seed: int) -> Package:
        return read_package(write({"weights": None, "random_seed": seed}))

    def weights(package: Package) -> torch.Tensor:
        return network_with_weights(package).state_dict()[KEY]

    first, same, other = package(1), package(1), package(2)
    assert first.random_weights
    assert first.model_id == same.model_id != other.model_id
    assert torch.equal(weights(first), weights(same))
    assert not torch.equal(weights(first), weights(other))
    before = torch.random.get_rng_state()
    weights(first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_part_that_the_model_lacks(write: Write) -> None:
    folder = write()
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    part = {"file": "weights.safetensors", "sha256": digest, "part": "tail"}
    folder = write({"weights": [part]})
    assert "part tail is no part" in refusal(lambda: network_with_weights(read_package(folder)))
    folder = write({"weights": [{**part, "part": "backbone"}]})
    assert "lacks the key model0" in refusal(lambda: network_with_weights(read_package(folder)))
    state = {k.removeprefix("backbone."): v for k, v in small_state().items() if "backbone" in k}
    folder = write(state=state)
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    folder = write({"weights": [{**part, "sha256": digest, "part": "backbone"}]}, state)
    assert "fills the part neck" in refusal(lambda: network_with_weights(read_package(folder)))


def test_the_front_reads_packages_without_torch() -> None:
    code = (
        "import sys\n"
        "from facelane_server.models.catalog import Catalog\n"
        "from facelane_server.worker.networks.load import load\n"
        "from facelane_server.models.api import DeviceOptions\n"
        "from facelane_server.worker import device\n"
        "from facelane_server.worker.decoding import headers\n"
        "package = Catalog().resolve('null-recognizer')\n"
        "load(package, DeviceOptions(), batch_max=4).warm_up()\n"
        "loaded = {'torch', 'onnxruntime', 'cv2'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_options_of_a_null_detector_come_from_the_package_and_the_pool() -> None:
    package = Catalog().resolve("null-detector")

    def faces(**extra: str) -> int:
        import numpy as np

        model = load(package, DeviceOptions(), batch_max=1, extra=extra)
        picture = np.zeros((48, 64, 3), np.uint8)
        (found,) = model.begin([picture], [8]).finish()  # type: ignore[attr-defined]
        return len(found.boxes)

    assert faces() == 1
    assert faces(faces="3", something="else") == 3
    with pytest.raises(FacelaneError):
        faces(faces="many")


def test_an_import_is_complete_or_absent(tmp_path: Path) -> None:
    source = tmp_path / "yunet_n.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, source)
    into = tmp_path / "models"
    with pytest.raises(FacelaneError, match="lacks the key"):
        import_model(guess_recipe([source]), [source], into)
    assert list(into.iterdir()) == []


def test_imports_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"")
    for recipe, sources, message in (
        ("yunett", [file], "no recipe is called yunett"),
        ("minifasnet", [file], "takes 2 files"),
        ("yunet", [tmp_path / "absent.pth"], "is not a file"),
        ("rts", [file], "is not a checkpoint"),
    ):
        with pytest.raises(FacelaneError, match=message):
            import_model(recipe, sources, tmp_path / "models")
    with pytest.raises(FacelaneError, match="do not tell"):
        guess_recipe([file])


def test_an_import_replaces_packages_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "yunet.pth"
    file.write_bytes(b"")
    letters = tmp_path / "into" / "letters"
    letters.mkdir(parents=True)
    (letters / "dear.txt").write_text("...")
    with pytest.raises(FacelaneError, match="is no model package, and is not replaced"):
        import_model("yunet", [file], tmp_path / "into", name="letters", replace=True)
    assert (letters / "dear.txt").exists()
    for name in ("../letters", "a/b", "..", "/tmp/x"):
        with pytest.raises(FacelaneError, match="names a folder elsewhere"):
            import_model("yunet", [file], tmp_path / "into" / "x", name=name, replace=True)
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["letters"]


def test_an_import_into_what_is_no_folder_says_so(tmp_path: Path) -> None:
    file = tmp_path / "yunet.pth"
    file.write_bytes(b"")
    with pytest.raises(FacelaneError, match=r"yunet\.pth: (Not a directory|File exists)") as raised:
        import_model("yunet", [file], file)
    assert raised.value.reason is Reason.ARGUMENT_INVALID


def test_a_pair_comes_in_either_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("4_MiniFASNetV1SE.pth", "2.7_MiniFASNetV2.pth")]
    for file in files:
        file.write_bytes(b"")
    recipe = RECIPES["minifasnet"]
    (tmp_path / "package").mkdir()
    rows = recipe.build(recipe, files, tmp_path / "package")["weights"]
    assert [(row["file"], row["part"]) for row in rows] == [
        ("2.7_MiniFASNetV2.pth", "v2"), ("4_MiniFASNetV1SE.pth", "v1se"),
    ]  # fmt: skip


def test_every_recipe_makes_a_manifest_that_reads(tmp_path: Path) -> None:
    """All but the weights of each recipe is checked here; the weights where they exist."""
    for key, recipe in RECIPES.items():
        folder = tmp_path / key
        folder.mkdir()
        ending = "onnx" if recipe.manifest.get("runtime") == "onnx" else "pth"
        weights = [
            {"file": f"{i}.{ending}", "sha256": "0" * 64, "part": str(i)}
            for i in range(len(recipe.parts))
        ]
        table = {"schema": 1, "name": key, "version": "1", **recipe.manifest, "weights": weights}
        (folder / "model.toml").write_text(tomli_w.dumps(table))
        assert read_package(folder).name == key


def test_a_package_is_replaced_only_on_request(write: Write, tmp_path: Path) -> None:
    from facelane_server.worker.networks.architectures.irse import RtsIrSe

    torch.manual_seed(0)
    network = RtsIrSe(units=(1, 1, 1, 1), alpha=2)
    source = tmp_path / "rts.pt"
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({**state, "head.weight": torch.zeros(3)}, source)
    into = tmp_path / "models"
    options = {"options": {"units": [1, 1, 1, 1]}}
    package = import_model("rts", [source], into, overrides=options)
    # Training's second variance head and its classifier stay behind.
    loaded = network_with_weights(package).state_dict()
    assert torch.equal(loaded["features.0.0.weight"], state["module.features.0.0.weight"])
    assert not any(key.startswith("logvar_rts_plus") for key in loaded)
    with pytest.raises(FacelaneError, match="exists already"):
        import_model("rts", [source], into, overrides=options)
    again = import_model("rts", [source], into, overrides=options, replace=True, version="2")
    assert again.manifest.version == "2"

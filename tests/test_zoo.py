"""RobustBench's models: its own architectures and loading code, on weights drawn here and saved as it saves them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wda
from wda import DataUnavailable, Threat, cli, models, weights, zoo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is None, reason="RobustBench is not installed: pip install 'wda[zoo]'"
)

R18 = "robustbench:cifar10/Linf/Sehwag2021Proxy_R18"
WIDE = "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10"


def entries(dataset: str, threat: str) -> dict[str, Any]:
    """RobustBench's own table of models."""
    zoo.package()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    return model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)]


def drawn(name: str, seed: int = 0) -> nn.Module:
    """The architecture of a model with random weights, batch statistics too."""
    dataset, threat, identifier = name.removeprefix(zoo.PREFIX).split("/")
    torch.manual_seed(seed)
    net = entries(dataset, threat)[identifier]["model"]()
    for key, value in net.state_dict().items():
        if "running_" in key:
            value.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return drawn(R18)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for the network fails the test."""
    zoo.package()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr("robustbench.utils.download_gdrive_new", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WDA_DATA, empty."""
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    return tmp_path


def place(folder: Path, name: str) -> Path:
    path = folder / "robustbench" / f"{name.removeprefix(zoo.PREFIX)}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# -- loading ---------------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda state: state,
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "checkpoint": lambda state: {"epoch": 3, "state_dict": {f"model.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_robustbenchs_layouts_are_loaded(layout: str, folder: Path, resnet: nn.Module) -> None:
    torch.save(LAYOUTS[layout](resnet.state_dict()), place(folder, R18))
    net = models.load(R18)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(net(x), resnet(x))
    assert not any(module.training for module in net.modules())


def test_a_wide_network_is_loaded_and_attacked(folder: Path) -> None:
    built = drawn(WIDE)
    torch.save(built.state_dict(), place(folder, WIDE))
    net = models.load(WIDE)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = net(x)
        assert torch.equal(z, built(x))
        # its normalisation is inside: fed with what it makes of x, a network without it gives the same
        raw = (x - built.mean) / built.std
        built.mean, built.std = torch.zeros_like(built.mean), torch.ones_like(built.std)
        torch.testing.assert_close(built(raw), z)
    threat = Threat("Linf", "8/255")
    adv = wda.attack("wda", net, x, z.argmax(1), threat, kappa=2, steps=2, probe_steps=1)
    adv.audit(threat)
    with pytest.raises(
        ValueError, match=r"x has values in .* outside box=\(0.0, 1.0\): .*normalisation belongs inside"
    ):
        wda.attack("wda", net, raw, z.argmax(1), threat)


class Small(nn.Module):
    """Large enough for a name of its own: convolution, statistics, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model among those of ImageNet; as there, its file lacks the normalisation around it."""
    imagenet = entries("imagenet", "Linf")
    from robustbench.model_zoo.architectures.utils_architectures import normalize_model

    entry = {"model": lambda: normalize_model(Small(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), "gdrive_id": "123"}
    monkeypatch.setitem(imagenet, "Small2024", entry)
    return "robustbench:imagenet/Linf/Small2024"


def test_a_file_without_the_normalisation_is_enough(folder: Path, listed: str) -> None:
    own = Small().eval()
    torch.save(own.state_dict(), place(folder, listed))
    x = torch.rand(2, 3, 8, 8)
    scaled = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(models.load(listed)(x), own(scaled))


def test_weights_that_robustbench_would_leave_at_random_are_an_error(folder: Path, listed: str) -> None:
    renamed = {name.replace("conv", "stem"): tensor for name, tensor in Small().state_dict().items()}
    torch.save(renamed, place(folder, listed))
    from robustbench.utils import load_model

    load_model("Small2024", model_dir=folder / "robustbench", dataset="imagenet")  # no word of it
    with pytest.raises(
        ValueError, match=r"Small2024.pt does not fit .*it has nothing for model.conv.weight, model.conv"
    ):
        models.load(listed)


def test_every_file_of_an_ensemble_is_looked_at(
    folder: Path, resnet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([Small(), Small()])

        def forward(self, x: Tensor) -> Tensor:
            return self.models[0](x) + self.models[1](x)

    monkeypatch.setitem(entries("cifar10", "Linf"), "Two2024", {"model": Two, "gdrive_id": ["1", "2"]})
    name = "robustbench:cifar10/Linf/Two2024"
    parts = [Small().eval(), Small().eval()]
    path = place(folder, name)
    torch.save(parts[0].state_dict(), f"{path}_m0.pt")
    with pytest.raises(DataUnavailable, match=r"Two2024.pt_m1.pt are not there; `wda fetch .*Two2024` fetches them"):
        models.load(name)
    torch.save(parts[1].state_dict(), f"{path}_m1.pt")
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(models.load(name)(x), parts[0](x) + parts[1](x))
    assert [file.name for file in zoo.weight_files(name)] == ["Two2024.pt_m0.pt", "Two2024.pt_m1.pt"]


# -- what is wrong with a file ---------------------------------------------------------------------------------------


def test_missing_weights_are_named_with_the_command_that_fetches_them(folder: Path) -> None:
    with pytest.raises(DataUnavailable) as caught:
        models.load(R18)
    assert str(folder / "robustbench" / "cifar10" / "Linf" / "Sehwag2021Proxy_R18.pt") in str(caught.value)
    assert f"`wda fetch {R18}`" in str(caught.value)
    assert not (folder / "robustbench").exists()


def test_without_wda_data_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)
    with pytest.raises(
        DataUnavailable, match=r"set the variable WDA_DATA .*robustbench/cifar10/Linf/Sehwag2021Proxy_R18"
    ):
        models.load(R18)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_network(path: Path) -> None:
    torch.save(nn.Linear(3, 10).state_dict(), path)


def of_another_width(path: Path) -> None:
    state = torch.load(path)
    torch.save(state | {"linear.weight": torch.zeros(100, 512)}, path)


def with_code(path: Path) -> None:
    torch.save({"state_dict": torch.load(path), "net": nn.ReLU()}, path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut_short, "R18.pt is cut short or damaged"),
    "web page": (
        lambda path: path.write_text("<!DOCTYPE html><title>Quota</title>"),
        "R18.pt is a web page of 35 bytes",
    ),
    "empty": (lambda path: path.write_bytes(b""), "R18.pt is empty"),
    "with code": (with_code, "R18.pt holds more than tensors: torch.nn.modules.activation.ReLU"),
    "other network": (of_another_network, "R18.pt does not fit its architecture.*Missing key"),
    "other width": (of_another_width, "R18.pt does not fit its architecture.*size mismatch for linear.weight"),
    "no tensors": (lambda path: torch.save([1], path), "R18.pt holds list"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_told_apart(kind: str, folder: Path, resnet: nn.Module) -> None:
    path = place(folder, R18)
    torch.save(resnet.state_dict(), path)
    spoil, said = BROKEN[kind]
    spoil(path)
    with pytest.raises(ValueError, match=rf"(?s)model='{R18}': .*{said}"):
        models.load(R18)


# -- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_has_near_matches(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no such model; near are .*robustbench:cifar10/Linf/Carmon2019Unlabeled"):
        models.load("robustbench:cifar10/Linf/Carmon2019Unlabelled")
    with pytest.raises(ValueError, match=r"has no such model; see its list"):
        models.load("robustbench:svhn/L0/x")


@pytest.mark.parametrize("name", ["Carmon2019Unlabeled", "cifar10/Carmon", "cifar10//x", "a/b/c/d", "../../x", ""])
def test_a_name_of_another_form_is_told_the_form(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="'robustbench:DATA/THREAT/ID' is accepted"):
        models.load(f"robustbench:{name}")


@pytest.mark.parametrize("name", ["imagenet/Linf/Standard_R50", "cifar10/Linf/Debenedetti2022Light_XCiT-S12"])
def test_models_that_robustbench_would_download_by_other_means_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="from another package, not from a file of weights"):
        models.load(f"robustbench:{name}")


def test_every_model_of_the_papers_is_known() -> None:
    names = zoo.published()
    assert len(names) == len(set(names)) == 21  # 18 rows and five, two of them in both
    for name in names:
        dataset, threat, identifier = name.removeprefix(zoo.PREFIX).split("/")
        assert entries(dataset, threat)[identifier]["gdrive_id"]


# -- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[str, Path], None]]:
    """What stands for Google Drive: the last one put into the list."""
    sources: list[Callable[[str, Path], None]] = []
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", lambda source, path: sources[-1](source, path))
    return sources


def test_what_is_fetched_is_in_place_and_held_to_its_checksum(
    folder: Path, resnet: nn.Module, download: list[Callable[[str, Path], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def send(source: str, path: Path) -> None:
        assert not place(folder, R18).exists()
        asked.append(source)
        print("Downloading ...")
        torch.save(resnet.state_dict(), path)

    download.append(send)
    assert cli.main(["fetch", R18]) == 0
    path = place(folder, R18)
    assert capsys.readouterr().out == f"{path}\n"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    models.load(R18)
    assert zoo.fetch(R18) == [path]  # checked and kept
    assert asked == [entries("cifar10", "Linf")["Sehwag2021Proxy_R18"]["gdrive_id"]]
    torch.save(drawn(R18, seed=1).state_dict(), path)
    with pytest.raises(ValueError, match=rf"SHA-256 checksum .*remove the file, and `wda fetch {R18}` fetches it anew"):
        models.load(R18)
    with pytest.raises(ValueError, match="SHA-256 checksum"):
        zoo.fetch(R18)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>Too many users have viewed this file</html>", "is refused and not kept: .*is a web page"),
        (b"PK\x03\x04 and nothing more", "is refused and not kept: .*cut short"),
        (None, "is refused and not kept: .*are not there"),
    ],
)
def test_what_comes_in_the_place_of_weights_is_not_kept(
    content: bytes | None,
    said: str,
    folder: Path,
    download: list[Callable[[str, Path], None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    download.append(lambda _, path: None if content is None else path.write_bytes(content))
    with pytest.raises(DataUnavailable, match=f"(?s){said}"):
        zoo.fetch(R18)
    assert cli.main(["fetch", R18]) == 1
    assert capsys.readouterr().err.startswith(f"wda fetch: model='{R18}': what came from Google Drive")
    assert not list(folder.iterdir())


def test_offline_the_file_and_its_address_are_named(folder: Path, download: list[Callable[[str, Path], None]]) -> None:
    def fail(source: str, path: Path) -> None:
        path.write_bytes(b"some of it")
        raise ConnectionError("Failed to resolve 'drive.google.com'")

    download.append(fail)
    path = folder / "robustbench" / "cifar10" / "Linf" / "Sehwag2021Proxy_R18.pt"
    with pytest.raises(DataUnavailable, match=rf"ConnectionError: Failed to resolve .*uc\?id=.* as {path}"):
        zoo.fetch(R18)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "robustbench").write_text("a file")
    with pytest.raises(OSError, match=r"the folder .*cifar10/Linf cannot be written"):
        zoo.fetch(R18)


# -- the package -----------------------------------------------------------------------------------------------------


def test_its_import_is_quiet_and_answers_to_both_names() -> None:
    script = "from wda import zoo; zoo.package(); import autoattack, pyautoattack; print(autoattack is pyautoattack)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(DataUnavailable, match=r"pip install 'wda\[zoo\]'"):
        models.load(R18)


def test_checks_come_before_robustbench_reads(folder: Path, resnet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(folder, R18)
    torch.save(resnet.state_dict(), path)
    cut_short(path)
    called = []
    monkeypatch.setattr("robustbench.utils.load_model", lambda *_, **__: called.append(1))
    with pytest.raises(ValueError, match="cut short"):
        models.load(R18)
    assert not called
    assert zoo.weight_files(R18) == [path]
    with pytest.raises(ValueError, match="cut short"):
        weights.check(path)

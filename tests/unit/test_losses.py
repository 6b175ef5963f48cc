"""The objective, the registry, the arguments and the errors of the losses, on small drawn networks where possible."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from psp_lightning.losses import LOSSES, CompositeLoss, L2Loss, LossInputs, LossTerm, TermOutput, WNormLoss
from psp_lightning.losses.base import face_crop, register_loss
from psp_lightning.losses.identity import IDLoss
from psp_lightning.losses.lpips import LPIPSLoss
from psp_lightning.losses.moco import MocoLoss, convert_moco
from psp_lightning.losses.similarity import SimilarityLoss
from psp_lightning.utils.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "loss"


class Embedding(SimilarityLoss):
    """A small similarity loss that counts its calls."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def embed(self, image):
        self.sizes.append(len(image))
        return nn.functional.normalize(image.flatten(1), dim=1)


class Constant(LossTerm):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen: list[LossInputs] = []
        self.graph: list[bool] = []
        self.autocast: list[bool] = []

    def forward(self, inputs):
        self.seen.append(inputs)
        self.graph.append(torch.is_grad_enabled())
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return TermOutput(inputs.y_hat.mean() * 0 + self.value, {"extra": torch.tensor(7.0)})


@pytest.fixture
def inputs() -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    y_hat, y = (torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    return LossInputs(y_hat=y_hat.requires_grad_(), y=y)


def test_sum_of_weighted_terms_and_detached_values(inputs):
    loss = CompositeLoss({"a": Constant(2.0), "b": Constant(3.0), "l2": L2Loss()}, {"a": 0.5, "b": 2, "l2": 0.25})
    total, values = loss(inputs)
    l2 = (inputs.y_hat - inputs.y).square().mean().detach()
    torch.testing.assert_close(total.detach(), 0.5 * 2 + 2 * 3 + 0.25 * l2)
    assert list(values) == ["a", "b", "l2", "extra"]
    assert float(values["extra"]) == 7.0
    torch.testing.assert_close(values["l2"], l2)
    assert not any(value.requires_grad for value in values.values())
    total.backward()
    assert inputs.y_hat.grad is not None


def test_weight_zero_is_measured_without_graph_and_adds_nothing(inputs):
    term = Constant(math.nan)
    total, values = CompositeLoss({"a": term, "l2": L2Loss()}, {"a": 0, "l2": 1})(inputs)
    assert math.isfinite(float(total.detach())) and math.isnan(float(values["a"]))
    assert term.graph == [False]


def test_float32_without_autocast(inputs):
    term = Constant(1.0)
    low = LossInputs(inputs.y_hat.detach().bfloat16(), inputs.y.bfloat16())
    low = LossInputs(low.y_hat, low.y, x=low.y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values = CompositeLoss({"a": term}, {"a": 1.0})(low)
    assert term.autocast == [False]
    assert term.seen[0].y_hat.dtype == torch.float32
    assert term.seen[0].x is term.seen[0].y, "the source of an inversion must still be the same object as the target"
    assert total.dtype == torch.float32 and values["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("terms", "weights", "words"),
    [
        ([], {}, ["No loss"]),
        (["l2"], {"l2": 1.0, "l2_cropp": 1.0}, ["loss.l2_cropp.weight", "not selected", "'l2_crop'"]),
        (["l2"], {"l2": 1.0, "id": 1.0}, ["loss.id.weight", "loss=[l2,id]"]),
        (["l2", "w_norm"], {"l2": 1.0}, ["loss.w_norm.weight"]),
        (["l2"], {"l2": -1.0}, ["loss.l2.weight", "-1.0"]),
        (["l2"], {"l2": math.nan}, ["loss.l2.weight", "nan"]),
        (["l2"], {"l2": "0.1"}, ["loss.l2.weight", "'0.1'"]),
        (["l2"], {"l2": None}, ["loss.l2.weight", "None"]),
    ],
)
def test_unusable_selection_is_named(terms, weights, words):
    with pytest.raises(UserError) as caught:
        CompositeLoss({name: LOSSES[name]() for name in terms}, weights)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_registry_and_catalogue_agree():
    files = {path.stem for path in CONF.glob("*.yaml")}
    missing = {"l2", "lpips", "id", "moco", "w_norm", "l2_crop", "lpips_crop"} - files
    assert not missing, f"no catalogue file for {missing}"
    for name in ("l2", "lpips", "id", "moco", "w_norm", "l2_crop", "lpips_crop"):
        path = CONF / f"{name}.yaml"
        assert path.read_text().startswith("# @package loss\n")
        node = yaml.safe_load(path.read_text())
        assert list(node) == [name]
        cls = LOSSES[name]
        assert node[name]["_target_"] == f"{cls.__module__}.{cls.__qualname__}"
        assert cls.name == name
        arguments = set(cls.__init__.__annotations__) - {"return"} if "__init__" in vars(cls) else set()
        if cls.__mro__[1] is LPIPSLoss:
            arguments = set(LPIPSLoss.__init__.__annotations__) - {"return"}
        assert set(node[name]) == {"_target_", "weight"} | arguments


def test_a_name_can_be_registered_only_once():
    with pytest.raises(UserError, match="'l2'"):
        register_loss("l2")(Constant)
    assert LOSSES["l2"] is L2Loss


def test_face_crop_scales():
    assert face_crop(torch.zeros(1, 3, 256, 256)).shape == (1, 3, 188, 188)
    assert face_crop(torch.zeros(1, 3, 1024, 1024)).shape == (1, 3, 752, 752)
    assert face_crop(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 47, 47)
    rows = torch.arange(256.0).view(1, 1, 256, 1).expand(1, 1, 256, 256)
    assert (float(face_crop(rows)[0, 0, 0, 0]), float(face_crop(rows)[0, 0, -1, 0])) == (35, 222)
    assert float(face_crop(rows.mT)[0, 0, 0, 0]) == 32
    assert face_crop(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1), "a crop must not be empty"


def test_similarity_embeds_each_image_once(inputs):
    term = Embedding()
    output = term(LossInputs(inputs.y_hat, inputs.y, x=inputs.y))
    assert len(term.sizes) == 2, "target = source must be embedded once"
    assert set(output.logs) == {"toy_similarity", "toy_improvement"}
    torch.testing.assert_close(output.logs["toy_improvement"], output.logs["toy_similarity"] - 1)

    term = Embedding()
    output = term(LossInputs(inputs.y_hat, inputs.y, x=inputs.y.clone()))
    assert len(term.sizes) == 3


@pytest.mark.parametrize("channels", [1, 4, 19])
def test_similarity_with_a_source_that_is_not_a_picture(inputs, channels):
    term = Embedding()
    output = term(LossInputs(inputs.y_hat, inputs.y, x=torch.zeros(3, channels, 16, 16)))
    assert set(output.logs) == {"toy_similarity"} and len(term.sizes) == 2


def test_similarity_of_one_image():
    """The reference removes the batch dimension for a batch of one."""
    image = torch.rand(1, 3, 8, 8)
    assert Embedding().similarity(image, image).shape == (1,)
    torch.testing.assert_close(Embedding().similarity(image, image), torch.ones(1))


def test_w_norm_without_codes(inputs):
    with pytest.raises(UserError, match="w_norm"):
        WNormLoss()(inputs)


def test_w_norm_has_a_finite_gradient_at_the_average(inputs):
    delta = torch.zeros(2, 4, 8, requires_grad=True)
    WNormLoss()(LossInputs(inputs.y_hat, inputs.y, delta_w_plus=delta)).backward()
    assert torch.isfinite(delta.grad).all()


def test_lpips_gradient_is_finite_on_flat_pictures(lpips_weights):
    """The norm has no derivative at pixels with zero features."""
    y_hat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    LPIPSLoss("alex", lpips_weights["alex"]).distance(y_hat, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(y_hat.grad).all()


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory) -> dict[str, Path]:
    from torchvision import models

    folder = tmp_path_factory.mktemp("weights")
    builders = {"alex": models.alexnet, "squeeze": models.squeezenet1_1, "vgg": models.vgg16}
    paths = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for net, build in builders.items():
            features = build(weights=None).features.state_dict()
            paths[net] = folder / f"{net}.pth"
            # with a classifier, as in torchvision's files
            state = {f"features.{key}": value for key, value in features.items()} | {"classifier.weight": torch.ones(1)}
            torch.save(state, paths[net])
    return paths


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_equals_the_package(net, lpips_weights):
    term = LPIPSLoss(net, lpips_weights[net])
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = term.network(a, b).flatten()
    assert (expected > 0).all()
    torch.testing.assert_close(term.distance(a, b), expected, rtol=1e-5, atol=1e-8)


def test_lpips_unknown_network():
    with pytest.raises(UserError, match="'alexx'. Did you mean 'alex'"):
        LPIPSLoss("alexx")


def test_lpips_file_of_another_network(lpips_weights):
    with pytest.raises(UserError, match="vgg.pth"):
        LPIPSLoss("alex", lpips_weights["vgg"])


@pytest.mark.parametrize(
    ("build", "file"),
    [(IDLoss, "ir_se50"), (LPIPSLoss, "alexnet"), (MocoLoss, "moco"), (lambda: IDLoss("facenet"), "")],
)
def test_missing_weights_name_file_place_and_command(build, file, tmp_path, monkeypatch):
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert file in message and str(tmp_path) in message and ("curl" in message or "gdown" in message), message


def test_id_unknown_backbone():
    with pytest.raises(UserError, match="'facenett'. Did you mean 'facenet'"):
        IDLoss("facenett")


def test_facenet_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="pip install --no-deps facenet-pytorch==2.6.0"):
        IDLoss("facenet")


def test_facenet_loads_its_published_layout(tmp_path):
    facenet = pytest.importorskip("facenet_pytorch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = facenet.InceptionResnetV1(pretrained=None).state_dict()
    state |= {"logits.weight": torch.zeros(2, 512), "logits.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "facenet.pt")
    term = IDLoss("facenet", tmp_path / "facenet.pt")
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(term.similarity(image, image), torch.ones(2))


def test_moco_keys():
    tensor = torch.ones(1)
    moco = {
        "state_dict": {
            "module.encoder_q.conv1.weight": tensor,
            "module.encoder_q.fc.0.weight": tensor,
            "module.encoder_k.conv1.weight": tensor,
            "module.queue": tensor,
        }
    }
    assert list(convert_moco(moco)) == ["conv1.weight"]
    assert list(convert_moco({"conv1.weight": tensor, "fc.weight": tensor})) == ["conv1.weight"]


def test_import_is_light():
    """Backbones' packages are imported when a term is built, not with the library."""
    code = (
        "import sys, psp_lightning.losses; "
        "print([m for m in ('lpips', 'torchvision', 'facenet_pytorch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert run.stdout.strip() == "[]", run.stdout


class Returns(LossTerm):
    """A term that returns what `make` makes of the inputs."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, inputs):
        return self.make(inputs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda inputs: (inputs.y_hat - inputs.y).abs().mean((1, 2, 3)), r"a tensor of shape \(3,\)"),
        (lambda inputs: 1.5, "a float"),
        (lambda inputs: None, "a NoneType"),
        (lambda inputs: TermOutput(inputs.y, {}), r"a tensor of shape \(3, 3, 16, 16\)"),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_term_that_does_not_return_one_number_is_named(make, said, weight, inputs):
    loss = CompositeLoss({"l2": L2Loss(), "mine": Returns(make)}, {"l2": 1, "mine": weight})
    with pytest.raises(UserError, match=f"loss 'mine': Returns.forward returned {said}. Return one number as a tensor"):
        loss(inputs)


def test_a_term_that_cannot_be_called_is_reported_before_the_training():
    class TwoImages(LossTerm):
        def forward(self, y_hat, y):
            return (y_hat - y).abs().mean()

    for term, said in (
        (TwoImages(), "TwoImages.forward is called with one argument, a LossInputs .*'y'"),
        (L2Loss, r"must be an instance of a LossTerm, not .*; write L2Loss\(\.\.\.\)"),
        (lambda inputs: inputs.y.mean(), "must be an instance of a LossTerm, not <function"),
    ):
        with pytest.raises(UserError, match=f"The loss 'mine'.*{said}"):
            CompositeLoss({"mine": term}, {"mine": 1})

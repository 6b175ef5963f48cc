"""Build the two steps of an inversion, `embed` and `refine`, from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from psp_lightning.build.instantiate import instantiate, naming
from psp_lightning.data.spec import InputSpec
from psp_lightning.inference import invert
from psp_lightning.inference.invert import Inverter, Optimization, Step
from psp_lightning.latents.codes import Latents
from psp_lightning.latents.refinements import FOLDER, read_refinement
from psp_lightning.loading import load_decoder, load_psp
from psp_lightning.losses.base import LossInputs
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.models.protocols import GeneratorModule
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import UserError, plural
from psp_lightning.utils.names import native

CODES = ("w_plus", "w")
NONE, AUTO = f"{invert.__name__}.keep_codes", f"{invert.__name__}.refine_if_possible"  # targets of these options


class Distance(nn.Module):
    """The weighted sum of losses, summed over the images of a batch, so that images stay independent."""

    def __init__(self, losses: CompositeLoss) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return a scalar for two batches (B, C, S, S)."""
        return self.losses(LossInputs(y_hat=y_hat, y=y))[0] * len(y)  # each loss is a mean over the batch


def build_inverter(cfg: DictConfig, net: PSP) -> Inverter:
    """Build the steps that `embed` and `refine` select, and check that the network fits them.

    Raises:
        UserError: a setting is invalid, or the network lacks an encoder or a refiner.
    """
    embed = None if cfg.embed is None else _step(cfg, "embed")
    if isinstance(embed, Optimization) and embed.method.space not in CODES:
        raise UserError(f"embed.space={embed.method.space} must be w_plus or w. For {embed.method.space}, use refine.")
    inverter = Inverter(embed, _step(cfg, "refine"))
    if embed is not None and optimises(cfg, "refine") and cfg.refine.start == "average":
        raise UserError("refine.start=average would discard the codes of embed=optimize. Leave one of the two out.")
    if optimises(cfg, "embed") and cfg.embed.start == "features":
        raise UserError("embed.start=features must be average or encoder. Use refine.start=features.")
    if any(method.start == "average" for method in inverter.optimizers()) and not bool(net.latent_avg.any()):
        if not isinstance(net.encoder, nn.Identity):
            raise UserError(f"{cfg.ckpt} has no average latent to start from. Set start=encoder.")
        net.latent_avg.copy_(net.generator.latent_average())
    with naming(cfg, "refine"):
        inverter.check(net)
    return inverter.eval().requires_grad_(False)


def starts_from_average(cfg: DictConfig) -> bool:
    """Return whether the first step starts from the average latent, so that no encoder is needed."""
    first = cfg.refine if cfg.embed is None else cfg.embed
    return bool(first.get("start") == "average")


def load_network(cfg: DictConfig) -> PSP:
    """Load the network of `ckpt`, which may contain only a generator if a step optimises.

    Raises:
        UserError: see `load_psp`.
    """
    if not starts_from_average(cfg):
        try:
            return load_psp(cfg.ckpt)
        except UserError as error:
            advice = " With embed=optimize embed.start=average, a generator is enough." if steps(cfg) else ""
            raise UserError(f"{error}{advice}") from None
    net = load_decoder(cfg.ckpt)
    if isinstance(net.encoder, nn.Identity):
        size: int = net.generator.output_size
        net.source = InputSpec("rgb", size=min(size, 256)).to_dict()
    return net


def _step(cfg: DictConfig, key: str) -> Step:
    if not optimises(cfg, key):
        step: Step = instantiate(cfg, key)
        return step
    given: Any = OmegaConf.to_container(cfg[key].losses)
    weights = {name: weight for name, weight in given.items() if weight != 0}  # a weight of 0 would still cost time
    losses = CompositeLoss({name: instantiate(cfg, f"loss.{name}", without=["weight"]) for name in weights}, weights)
    with naming(cfg, key):
        return Optimization(Distance(losses), instantiate(cfg, key, without=["losses"]))


def optimises(cfg: DictConfig, key: str) -> bool:
    """Return whether the step `embed` or `refine` optimises, which needs gradients and the image to be reproduced."""
    return cfg[key] is not None and "losses" in cfg[key]


def check_source(cfg: DictConfig, spec: InputSpec) -> None:
    """Raise a UserError if a step optimises, but the source is not the image that is to be reproduced."""
    if (used := steps(cfg)) and (spec.kind != "rgb" or spec.task is not None):
        raise UserError(
            f"{used[0]}=optimize makes the output equal to the source, but {cfg.ckpt} is for "
            f"{spec.task or spec.kind + ' images'}. Use it with a network for inversion."
        )


def drops_refinement(cfg: DictConfig) -> bool:
    """Return whether only the codes are decoded."""
    return cfg.refine.get("_target_") == NONE


def makes_refinement(cfg: DictConfig) -> bool:
    """Return whether `refine` needs images: it is neither `auto` nor `none`."""
    return cfg.refine.get("_target_") not in (NONE, AUTO)


def is_refined(cfg: DictConfig) -> bool:
    """Return whether an inversion has more than codes. If the settings do not decide this, load the network."""
    if optimises(cfg, "refine"):
        return cfg.refine.space in ("features", "weights") or cfg.refine.start == "features"
    return not drops_refinement(cfg) and (makes_refinement(cfg) or load_network(cfg).refiner is not None)


def recorded_steps(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of the steps that are not the default; they belong to what determines the outputs."""
    found = {} if cfg.embed is None else {"embed": OmegaConf.to_container(cfg.embed, resolve=True)}
    if makes_refinement(cfg) or drops_refinement(cfg):
        found["refine"] = OmegaConf.to_container(cfg.refine, resolve=True)
    used = {name for key in steps(cfg) for name, weight in cfg[key].losses.items() if weight != 0}
    if used:
        losses: Any = OmegaConf.to_container(cfg.loss, resolve=True)
        found["loss"] = {name: losses.get(name) for name in sorted(used)}
    return found


def steps(cfg: DictConfig) -> list[str]:
    """Return which of the steps `embed` and `refine` optimise."""
    return [key for key in ("embed", "refine") if optimises(cfg, key)]


def describe_steps(cfg: DictConfig) -> str:
    """Return words for the name of a row that say how the inversion differs from the default; empty if it does not."""
    words = []
    for key in steps(cfg):
        node = cfg[key]
        start = "" if node.start == "encoder" else node.start
        space = "" if node.space == "w_plus" else f" in {node.space}"
        words += [*filter(None, [start]), f"{plural(node.steps, 'step')}{space}"]
    if not optimises(cfg, "refine"):
        words += ["codes only"] * drops_refinement(cfg) + ["features"] * makes_refinement(cfg)
    return " + ".join(words)


def has_refinements(cfg: DictConfig, latents: Latents | None) -> bool:
    """Return whether files of refinements are written with the codes."""
    if latents is None:
        return is_refined(cfg)
    return (latents.refined or cfg.refinements is not None) and not drops_refinement(cfg)


def refinement_reader(
    cfg: DictConfig, latents: Latents, generator: GeneratorModule
) -> Callable[[int], dict[str, Any]] | None:
    """Return a function that reads what refines a code, or None if only the codes are decoded."""
    if not has_refinements(cfg, latents):
        return None
    files = refinement_files(cfg, latents)
    digest = None if cfg.any_generator else latents.generator
    checked = latents.space in ("w_plus", "w") and cfg.refinements is None  # codes may have been edited on purpose

    def read(index: int) -> dict[str, Any]:
        code = latents.codes[index].expand(generator.n_styles, -1) if checked else None
        features, weights = read_refinement(files[index], generator, digest, code)
        return {key: part for key, part in (("features", features), ("weights", weights)) if part is not None}

    return read


def refinement_files(cfg: DictConfig, latents: Latents) -> list[Path]:
    """Return the file of each code: in `refinements`, or next to the codes, OUTPUT/latents.* or OUTPUT/latents/NAME."""
    names = [f"{native(name)}.safetensors" for name in latents.names]
    if cfg.refinements:
        return [Path(cfg.refinements) / name for name in names]
    path = Path(str(cfg.input)).expanduser().absolute()
    alone = [place for place in path.parents if len(names) == 1 and place / "latents" / names[0] == path]
    return [(alone or [path.parent])[0] / FOLDER / name for name in names]

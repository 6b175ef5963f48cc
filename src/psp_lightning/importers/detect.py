"""Explain what the checkpoints of other projects are, and what can be done with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from psp_lightning.checkpoints.strict import first


def explain(content: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Explain what a checkpoint without a known network is, and what can be done.

    Args:
        content: the whole checkpoint.
        state: its state dict, without the prefixes of wrappers.
    """
    keys = [str(key) for key in state]

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys[:20_000])

    if some(r"(^|\.)progression\.\d") or "g_running" in content:
        return (
            "this is a StyleGAN1 (rosinality/style-based-gan-pytorch), which has a different generator. Use a "
            "StyleGAN2 trained on the same data."
        )
    if some(r"^GAN\.|^G\.initial_block|^S\.net\."):
        return "this is a checkpoint of lucidrains/stylegan2-pytorch, whose generator differs from the published one."
    if some(r"style_mapping\.|to_rgb_layers|mapping\.dense\d|synthesis\.layer\d"):
        return (
            "this is a generator of another toolbox (GenForce, MMGeneration) with different layer names. Import the "
            "file that it was converted from."
        )
    if some(r"down_blocks|model\.diffusion_model|\bunet\b|cond_stage_model"):
        return "this is a diffusion model (diffusers or latent diffusion), not a StyleGAN2."
    if some(r"^input_layer\.0\.weight$") and some(r"^output_layer"):
        return (
            "this is a face recognition network (IR-SE50 or IR-101), not a generator. Put it into the weights folder, "
            "see psp-weights list."
        )
    if "pytorch-lightning_version" in content:
        parts = first(dict.fromkeys(key.split(".")[0] for key in keys)) or "none"
        return (
            f"this is a PyTorch Lightning checkpoint of another project; its network has the parts {parts}. None of "
            "them is a StyleGAN2 generator in the published layout (style.*, conv1.*, convs.*, to_rgbs.*). If it "
            "contains one under other names, rename its keys and save it: torch.save({'g_ema': state_dict}, FILE)."
        )
    if some(r"^convs\.\d+\.(conv\d?\.)?\d") and some(r"^final_"):
        return "this is only a discriminator; the generator is in another file or under another key."
    return (
        "this contains no StyleGAN2 generator in the published layout or NVIDIA's, and no pSp network; its keys are: "
        f"{first(keys) or 'none'}."
    )

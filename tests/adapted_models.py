"""Models as generate.py has them: with an adapter that does something, and prepared for likelihoods."""

from __future__ import annotations

from typing import Any

import torch
from make_models import make_model

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora
from kestrel.model.loss import attach_token_nll


class AdaptedModels(dict[str, torch.nn.Module]):
    """By architecture, each made when it is first asked for."""

    def __missing__(self, architecture: str) -> torch.nn.Module:
        target: Any = ["c_attn"] if architecture == "gpt2" else "all-linear"
        model = add_lora(make_model(architecture), Lora(r=4, target_modules=target), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        attach_token_nll(model)
        self[architecture] = model.eval()
        return self[architecture]

"""The embedding in the machine's memory instead of the GPU's, for cards on which it takes room that training needs.

A frozen base only looks rows up in it: a few megabytes a pass travel to the GPU, where Qwen2.5-7B's table takes a gigabyte.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.model.loss import causal_lm_of


class HostEmbedding(nn.Module):
    """As the `nn.Embedding` it is made from, for a table that is not trained.

    The table is no parameter: what moves or counts a model's parameters is to leave it where it is. A lookup waits for the GPU,
    since the token ids come back from there.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        weight = embedding.weight.detach()
        self.table = weight if weight.is_meta else weight.cpu()

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (…) → (…, hidden), on the device of the ids."""
        return F.embedding(ids.to(self.table.device), self.table).to(ids.device)


def embedding_bytes(model: nn.Module) -> int:
    """What `move_embedding_to_host` frees; 0 where the head shares the table, or the lookup is no plain one."""
    causal_lm: Any = causal_lm_of(model)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if type(embedding) is not nn.Embedding or head is None or head.weight is embedding.weight:
        return 0
    return embedding.weight.nbytes


def move_embedding_to_host(model: nn.Module) -> None:
    """Takes the table of `embedding_bytes` off the GPU, for the rest of the process."""
    causal_lm: Any = causal_lm_of(model)
    causal_lm.set_input_embeddings(HostEmbedding(causal_lm.get_input_embeddings()))
